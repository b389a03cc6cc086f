"""The same rules for folders and shards: which pictures are used, with which captions, and what is left out."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.common.config import read_yaml
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.data.captions import SUFFIXES
from fewstep.data.folder_files import check_pictures
from fewstep.data.images import Captioned, find_pictures, from_folder
from fewstep.data.prompts import read_prompts
from fewstep.data.shards import from_shards
from fewstep.inference.multilingual.pairs import Pair, read_pairs


def picture(level: int = 7, **options: object) -> bytes:
    """A grey PNG; each picture has its own level."""
    held = BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(held, format="PNG", **options)
    return held.getvalue()


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def named(name: str, *texts: str) -> bytes:
    return lines(*({"file_name": name, "text": text} for text in texts))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, held in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(held)
    return folder


def write_shard(place: Path, files: Mapping[str, bytes]) -> str:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w") as tar:
        for name, held in sorted(files.items(), key=lambda item: item[0].split("/")):
            info = tarfile.TarInfo(name)
            info.size = len(held)
            tar.addfile(info, BytesIO(held))
    return str(place)


def both(tmp_path: Path, files: Mapping[str, bytes]) -> Captioned:
    """What a folder holds, after a shard of the same files was found to hold the same."""
    folder = from_folder(write_folder(tmp_path / "folder", files), 16)
    shard = from_shards([write_shard(tmp_path / "all.tar", files)], 16, tmp_path / "cache")
    assert list(shard.captions) == list(folder.captions)
    assert shard.left_out == folder.left_out
    assert folder.pictures is not None
    assert shard.pictures is not None
    np.testing.assert_array_equal(shard.pictures.read(range(len(shard))), folder.pictures.read(range(len(folder))))
    return folder


A, B = picture(1), picture(2)
USED = [
    ("one beside each", {"a.png": A, "a.txt": b" x \n", "b.png": B, "b.json": b'{"caption": "y"}'}, [["x"], ["y"]]),
    ("kohya's suffix", {"a.png": A, "a.caption": b"x\n", "b.png": B, "b.txt": b"", "b.caption": b"y"}, [["x"], ["y"]]),
    ("text before JSON", {"a.png": A, "a.txt": b"x", "a.json": b'{"caption": "y"}'}, [["x"]]),
    ("JSON where the text is empty", {"a.png": A, "a.txt": b" \n", "a.json": b'{"caption": "y"}'}, [["y"]]),
    ("a null before a text", {"a.png": A, "a.json": b'{"caption": null, "text": "y"}'}, [["y"]]),
    ("a field that is empty", {"a.png": A, "a.json": b'{"caption": " ", "text": "y"}'}, [["y"]]),
    ("the same in a list", {"a.png": A, "metadata.jsonl": named("a.png", "")[:-2] + b', "caption": "y"}'}, [["y"]]),
    ("several in JSON", {"a.png": A, "a.json": b'{"captions": ["x", "", "y", "x"]}'}, [["x", "y"]]),
    ("several lines of text are one caption", {"a.png": A, "a.txt": b"x\r\ny\rz\n"}, [["x\ny\nz"]]),
    ("a list alone in JSON", {"a.png": A, "a.json": b'["x", "y"]'}, [["x", "y"]]),
    ("an empty list chooses nothing", {"a.png": A, "a.txt": b"x", "metadata.jsonl": b"\n"}, [["x"]]),
    ("several lines of a list", {"a.png": A, "metadata.jsonl": named("a.png", "x", "y", "x", "")}, [["x", "y"]]),
    ("a list in one", {"a.png": A, "metadata.jsonl": lines({"file_name": "a.png", "text": list("xy")})}, [["x", "y"]]),
    ("caption", {"a.png": A, "metadata.jsonl": lines({"file_name": "a.png", "caption": "x", "n": 1})}, [["x"]]),
    ("spelling", {"s/a.png": A, "metadata.jsonl": named("./s/a.png", "x") + named(r"s\a.png", "y")}, [[*"xy"]]),
    ("order", {"a.png": A, "b.png": B, "metadata.jsonl": named("b.png", "y") + named("a.png", "x")}, [["y"], ["x"]]),
    ("CSV", {"a.png": A, "metadata.csv": b'file_name,text\r\na.png,"x, ""y""\nz"\na.png,u\n'}, [['x, "y"\nz', "u"]]),
    ("dots in names", {"a.b.png": A, "a.b.txt": b"x", "1.5 m.PNG": B, "1.5 m.TXT": b"y"}, [["y"], ["x"]]),
    ("accents", {"e\u0301.png": A, "metadata.jsonl": named("\u00e9.png", "x")}, [["x"]]),
    ("large letters", {"A.JPG": A, "A.TXT": b"x", "b.Png": B, "b.Json": b'{"text": "y"}'}, [["x"], ["y"]]),
    ("two of one name", {"a.png": A, "a.webp": B, "a.txt": b"x"}, [["x"], ["x"]]),
    ("below", {"s/t/a.png": A, "s/t/a.txt": b"x", "s-t/a.png": B, "s-t/a.txt": b"y"}, [["x"], ["y"]]),
    ("line ends that are none", {"a.png": A, "a.txt": "x\u2028y\x0cz\x85w".encode()}, [["x\u2028y\x0cz\x85w"]]),
    ("the same in a list", {"a.png": A, "metadata.jsonl": named("a.png", "x\u2028y\x85z")}, [["x\u2028y\x85z"]]),
    ("lines that end at \\r", {"a.png": A, "metadata.jsonl": named("a.png", *"xy").replace(b"\n", b"\r")}, [[*"xy"]]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "wanted"), [case[1:] for case in USED], ids=[case[0] for case in USED])
def test_captions_belong_to_their_pictures(tmp_path: Path, files: dict[str, bytes], wanted: list[list[str]]) -> None:
    assert list(both(tmp_path, files).captions) == wanted


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.json", "metadata.jsonl", "metadata.csv"])
def test_text_of_every_kind_is_read_alike(tmp_path: Path, name: str, encoding: str) -> None:
    """UTF-8, and what has a mark; UTF-16 without one is refused, whatever it holds."""
    caption = "ein Käfer, 圆 🐞"
    texts = {
        "a.txt": caption,
        "a.json": json.dumps({"text": caption}, ensure_ascii=False),
        "metadata.jsonl": json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False) + "\n",
        "metadata.csv": f'file_name,text\na.png,"{caption}"\n',
    }
    files = {"a.png": A, name: texts[name].encode(encoding)}
    if encoding in ("utf-16-le", "utf-16-be"):
        for read in (lambda: from_folder(write_folder(tmp_path, files), 16), lambda: both(tmp_path / "other", files)):
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                read()
    else:
        assert list(both(tmp_path, files).captions) == [[caption]]


LEFT = [
    ({"metadata.jsonl": named("a.png", "x"), "b.png": B, "c.png": B}, 1, {"metadata.jsonl does not name": 2}),
    ({"metadata.jsonl": named("a.png", "x"), "b.png": B, "b.txt": b"y"}, 2, {"beside pictures": 1}),
    ({"metadata.jsonl": named("a.png", "x"), "metadata.csv": b"file_name,text\nb.png,y\n"}, 1, {"lists beside": 1}),
    ({".b.png": B, "._a.png": b"\0\5", ".t/c.png": B, "__MACOSX/d.png": B, "@eaDir/e.jpg": B}, 1, {"hidden": None}),
    ({"b.heic": b"?", "b.txt": b"y", "c.heic": b"?"}, 1, {".heic": 2, "text files without": 1}),
    ({"a.mask.png": B, "a.depth.16.png": B}, 1, {"further pictures": 2}),
    ({"a.json": b'{"captions": ["x", ""]}', "a.txt": b""}, 1, {"empty captions": 1}),
]


@pytest.mark.parametrize(("files", "used", "reasons"), LEFT)
def test_what_is_left_out_is_counted(
    tmp_path: Path, files: dict[str, bytes], used: int, reasons: dict[str, int | None]
) -> None:
    files = {"a.png": A, "a.txt": b"x"} | files
    folder = from_folder(write_folder(tmp_path / "folder", files), 16)
    shard = from_shards([write_shard(tmp_path / "all.tar", files)], 16, tmp_path / "cache")
    again = from_shards([str(tmp_path / "all.tar")], 16, tmp_path / "cache")
    assert again.left_out == shard.left_out
    for found in (folder, shard):
        assert len(found) == used
        for reason, count in reasons.items():
            (held,) = [number for why, number in found.left_out.items() if reason in why]
            assert count is None or held == count
            assert str(held) in found.line()
    if not any(name.startswith((".", "_", "@")) for name in files):  # of hidden folders a shard has the files alone
        assert folder.left_out == shard.left_out


REFUSED = [
    ({"b.png": B}, "b.png"),
    ({"b.png": B, "b.txt": b""}, "b.png"),
    ({"b.png": B, "b.txt": "\n \u3000".encode()}, "b.png"),
    ({"b.png": B, "b.json": b'{"caption": ""}'}, "b.png"),
    ({"b.png": B, "b.json": b'{"n": 1}'}, "b.png"),
    ({"b.png": B, "b.json": b"{"}, "b.json"),
    ({"b.png": B, "b.txt": b"caf\xe9"}, "b.txt"),
    ({"b.png": B, "b.txt": b"n\0u\0l\0"}, "b.txt"),
    ({"b.png": B, "b.json": b'{"caption": "x", "caption": "y"}'}, "b.json"),
    ({"b.png": B, "b.json": b'{"caption": "\\ud800"}'}, "b.json"),
    ({"b.png": B, "b.json": b"[" * 9999}, "b.json"),
    ({"metadata.jsonl": b'{"file_name": "a.png", "text": "\\ude00"}'}, "metadata.jsonl"),
    ({"metadata.csv": b"file_name,text\na.png,a cat, on a mat\n"}, "metadata.csv"),
    ({"metadata.csv": b"file_name,text,text\na.png,x,y\n"}, "metadata.csv"),
    ({"metadata.csv": b"a.png,a cat\n"}, "metadata.csv"),
    ({"metadata.jsonl": named("a.png", "")}, "a.png"),
    ({"metadata.jsonl": named("none.png", "x")}, "none.png"),
    ({"metadata.jsonl": b'{"file_name": "a.png", "text": "x", "text": "y"}'}, "metadata.jsonl"),
    ({"metadata.jsonl": lines({"file_name": "a.png", "text": ["x", 3]})}, "metadata.jsonl"),
    ({"metadata.jsonl": lines({"file_name": "", "text": "x"})}, "metadata.jsonl"),
    ({"metadata.jsonl": named("a.png", "x").decode().encode("latin-1") + b'{"file_name": "\xe9"}'}, "metadata.jsonl"),
    ({"metadata.csv": b"file_name;text\na.png;x\n"}, "metadata.csv"),
    ({"metadata.csv": b"file_name,text\na.png\n"}, "metadata.csv"),
    ({"metadata.csv": b'file_name,text\na.png,"x\n'}, "metadata.csv"),
    ({"b.gif": B}, "b.gif"),
    ({"b.c.png": B, "b.txt": b"y"}, "b.c.png"),
]


@pytest.mark.parametrize(("files", "named_in"), REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, files: dict[str, bytes], named_in: str) -> None:
    files = {"a.png": A, "a.txt": b"x"} | files
    refused = []
    for read in (
        lambda: from_folder(write_folder(tmp_path / "folder", files), 16),
        lambda: from_shards([write_shard(tmp_path / "all.tar", files)], 16, tmp_path / "cache"),
    ):
        with pytest.raises(UserError, match=named_in.replace(".", r"\.")) as error:
            read()
        assert "\n" not in str(error.value)
        refused.append(str(error.value).replace(str(tmp_path / "folder"), "X").replace(str(tmp_path / "all.tar"), "X"))
    assert refused[0] == refused[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_read_by_what_the_file_holds(tmp_path: Path, suffix: str) -> None:
    held = BytesIO()
    kind = Image.registered_extensions()[suffix]
    mode = "1" if suffix == ".pbm" else {".pfm": "F", ".qoi": "RGB"}.get(suffix, "L")
    Image.new("L", (16, 16), 255).convert(mode).save(held, format=kind)
    data = both(tmp_path, {f"a{suffix}": held.getvalue(), "a.txt": b"x"})
    assert data.pictures is not None
    assert data.pictures.read([0]).min() >= 250


def test_pictures_of_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    files = {"a.heic": b"?", "a.txt": b"x", "b.HEIC": b"?", "c.jxl": b"?"}
    for read in (
        lambda: from_folder(write_folder(tmp_path / "folder", files), 16),
        lambda: from_shards([write_shard(tmp_path / "all.tar", files)], 16, tmp_path / "cache"),
    ):
        with pytest.raises(UserError, match=r"2 \.heic, 1 \.jxl"):
            read()


def test_links_that_lead_to_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(UserError, match=r"a\.png"):
        from_folder(tmp_path, 16)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "far", {"c.png": picture(3), "c.txt": b"z"})
    folder = write_folder(tmp_path / "folder", {"b/a.png": A, "b/a.txt": b"x", "d.png": B, "d.txt": b"y"})
    plain = from_folder(folder, 16)
    for link, target in (("a", "b"), ("b/up", ".."), ("e", str(folder))):
        (folder / link).symlink_to(target, target_is_directory=True)
    assert plain.pictures is not None
    again = from_folder(folder, 16)
    assert again.pictures is not None
    assert again.pictures.fingerprint() == plain.pictures.fingerprint()
    (folder / "f").symlink_to(tmp_path / "far", target_is_directory=True)
    (folder / "g.png").symlink_to(tmp_path / "far" / "c.png")
    os.link(folder / "d.txt", folder / "g.txt")
    assert list(from_folder(folder, 16).captions) == [["x"], ["y"], ["z"], ["y"]]
    assert [place.name for place in find_pictures(folder)] == ["a.png", "d.png", "c.png", "g.png"]
    (folder / "g.png").unlink()
    (folder / "g.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"g\.png"):
        from_folder(folder, 16)


def test_links_in_shards_mean_their_members(tmp_path: Path) -> None:
    """As tar writes a folder with hard and symbolic links."""
    folder = write_folder(tmp_path / "folder", {"a.png": A, "a.txt": b"x", "s/c.png": B})
    os.link(folder / "a.png", folder / "b.png")
    os.link(folder / "a.txt", folder / "b.txt")
    (folder / "s" / "c.txt").symlink_to("../a.txt")
    (folder / "s" / "d.png").symlink_to("c.png")
    (folder / "s" / "d.txt").symlink_to("c.txt")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, ".")
    found = from_shards([str(tmp_path / "all.tar")], 16, tmp_path / "cache")
    wanted = from_folder(folder, 16)
    assert sorted(found.captions) == sorted(wanted.captions) == [["x"]] * 4
    assert found.pictures is not None
    assert wanted.pictures is not None
    levels = [np.sort(each.pictures.read(range(4))[:, 0, 0, 0]).tolist() for each in (found, wanted)]
    assert levels == [[1, 1, 2, 2]] * 2
    for name, target in (("e.png", "gone.png"), ("a.png", "a.png")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
        with pytest.raises(UserError, match=name):
            from_shards([str(tmp_path / f"{name}.tar")], 16, tmp_path / "cache")


@pytest.mark.parametrize("twice", ["a.png", "a.txt", "./a.png"])
def test_duplicate_members_are_refused(tmp_path: Path, twice: str) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name, held in (("a.png", A), ("a.txt", b"x"), (twice, B if twice.endswith("png") else b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(held)
            tar.addfile(info, BytesIO(held))
    with pytest.raises(UserError, match="twice"):
        from_shards([str(tmp_path / "all.tar")], 16, tmp_path / "cache")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w", encoding="latin-1") as tar:
        for name, held in (("é.png", A), ("é.txt", b"x"), ("è.png", B), ("è.txt", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(held)
            tar.addfile(info, BytesIO(held))
    found = from_shards([str(tmp_path / "all.tar")], 16, tmp_path / "cache")
    assert list(found.captions) == [["x"], ["y"]]
    assert found.pictures is not None
    assert len(found.pictures.fingerprint()) == 64
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, held in ((b"\xe9.png", A), (b"\xe9.txt", b"x")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(held)
    assert list(from_folder(folder, 16).captions) == [["x"]]


@pytest.mark.parametrize(
    ("files", "advised"),
    [
        ({"train/a.png": A, "train/metadata.jsonl": named("a.png", "x")}, "data.source={folder}/train"),
        ({"x/train/a.png": A, "x/train/metadata.csv": b"file_name,text\na.png,x\n"}, "data.source={folder}/x/train"),
        ({"train/0.tar": b"?", "train/1.tar": b"?"}, r"data.source={folder}/train/*.tar"),
        ({"0.tar": b"?"}, r"data.source={folder}/*.tar"),
        ({"data/train-0.parquet": b"?"}, "data/train-0.parquet"),
        ({"pics.tar.gz": b"?"}, "pics.tar.gz"),
        ({"pics.zip": b"?"}, "pics.zip"),
    ],
)
def test_the_error_on_a_folder_names_the_source_in_it(tmp_path: Path, files: dict[str, bytes], advised: str) -> None:
    with pytest.raises(UserError) as refused:
        from_folder(write_folder(tmp_path, files), 16)
    if not any(name.endswith(".png") for name in files):  # before a teacher is loaded
        with pytest.raises(UserError) as early:
            check_pictures(tmp_path)
        assert str(early.value) == str(refused.value)
    assert advised.format(folder=tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "name", ["pics-{0..9}.tar.gz", "pics.tgz", "all.zip", "x/*.parquet", "a.png", "none", "none/", "table.csv"]
)
def test_sources_that_are_no_folder_are_refused_by_what_they_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"data\.source = ") as refused:
        check_pictures(tmp_path / name)
    assert "UTF-8" not in str(refused.value)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="is not a folder"):
        check_pictures(tmp_path / "file")


@pytest.mark.parametrize(
    "name",
    ["t.jsonl", "t.JSON", "t.csv", "t.tsv", "t.yaml", "t.parquet", "t.tar.gz", "t.zip", "t.png", "t.h5", "t.docx"],
)
def test_files_that_hold_no_list_of_prompts_are_refused_by_their_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a cat\n")
    with pytest.raises(UserError) as refused:
        read_prompts(tmp_path / name, "validation.prompts")
    assert refused.value.field == "validation.prompts"
    assert "UTF-8" not in str(refused.value)


PROMPTS = ["a cat\u2028in a hat", "a dog\x0con a log", "next\x85line", "圆"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_where_people_end_them(tmp_path: Path, encoding: str, end: str) -> None:
    """In prompt files and in pairs; a mark that joining two files has left inside is dropped."""
    place = tmp_path / "p.txt"
    place.write_bytes(end.join(["", *PROMPTS, " ", "\ufefflast", ""]).encode(encoding))
    assert read_prompts(place) == [*PROMPTS, "last"]
    for suffix, rows in (
        ("tsv", [f"{text}\t{text}!" for text in PROMPTS]),
        ("jsonl", [json.dumps({"source": text, "target": f"{text}!"}, ensure_ascii=False) for text in PROMPTS]),
    ):
        (tmp_path / f"p.{suffix}").write_bytes(end.join([*rows, ""]).encode(encoding))
        assert read_pairs(tmp_path / f"p.{suffix}") == tuple(Pair(text, f"{text}!") for text in PROMPTS)
    (tmp_path / "p.json").write_bytes(
        json.dumps(PROMPTS, ensure_ascii=False, indent=1).replace("\n", end).encode(encoding)
    )
    assert read_json(tmp_path / "p.json") == PROMPTS


@pytest.mark.parametrize(
    "held", [b"caf\xe9\n", b"\xff\xfea", "a cat\n".encode("utf-16-le"), b"a\0b\n", b"\x1f\x8b\x08\0"]
)
def test_what_is_no_text_is_refused_by_every_reader(tmp_path: Path, held: bytes) -> None:
    place = tmp_path / "p"
    for suffix, read in (("txt", read_prompts), ("tsv", read_pairs), ("json", read_json), ("yaml", read_yaml)):
        file = place.with_suffix(f".{suffix}")
        file.write_bytes(held)
        with pytest.raises(UserError, match=rf"p\.{suffix}"):
            read(file)
