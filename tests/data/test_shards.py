"""Webdataset shards: the pictures and captions of their tar files, wherever these are."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.torch import load_file

from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.data import shards
from fewstep.data.buckets import bucketed
from fewstep.data.images import from_folder
from fewstep.data.prompts import is_prompt_file, is_shards
from fewstep.data.shards import expanded, find_shards, from_shards
from fewstep.distillation import distill as distillation
from fewstep.distillation.checks import check_distillation
from fewstep.distillation.config import resolve


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    held = BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return held.getvalue()


def members_of(folder: Path, rows: range) -> list[tuple[str, bytes]]:
    """Some pictures of a folder; captions are before them, after them, as text and as JSON."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    members: list[tuple[str, bytes]] = []
    for row in rows:
        name, text = lines[row]["file_name"], lines[row]["text"]
        picture = (f"part/{row:04}.png", (folder / name).read_bytes())
        record = json.dumps({"width": 64, "caption": text if row % 3 else "not this one"}).encode()
        beside = [] if row % 3 else [(f"part/{row:04}.txt", f" {text}\n".encode())]
        members += [picture, (f"part/{row:04}.json", record), *beside, (f"part/{row:04}.cls", b"7")]
        if row % 2:
            members[-3:] = [members[-1], *members[-3:-1]]
    return members


@pytest.fixture
def bucket(picture_folder: Path) -> Iterator[str]:
    """All 16 pictures in two shards of a file system in memory; what names them."""
    files = fsspec.filesystem("memory")
    for number, rows in enumerate((range(10), range(10, 16))):
        files.pipe_file(f"/emoji/pics-{number:02}.tar", tar_of(members_of(picture_folder, rows)))
    yield "memory://emoji/pics-{00..01}.tar"
    files.rm("/emoji", recursive=True)


def test_shards_hold_what_the_folder_holds(bucket: str, picture_folder: Path, tmp_path: Path) -> None:
    """By braces and by a pattern; pixels, captions, and the sizes for buckets."""
    wanted = from_folder(picture_folder, 64)
    for source in (bucket, "memory://emoji/*.tar"):
        found = from_shards(find_shards(source), 64, tmp_path)
        assert list(found.captions) == list(wanted.captions)
        np.testing.assert_array_equal(found.pictures.read(range(16)), wanted.pictures.read(range(16)))
        np.testing.assert_array_equal(found.pictures.read([11, 3]), wanted.pictures.read([11, 3]))
        assert bucketed(found, 64, 16).pictures.of == bucketed(wanted, 64, 16).pictures.of


def test_a_run_on_shards_is_the_run_on_the_folder(
    bucket: str, picture_folder: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    students = []
    for source in (bucket, picture_folder):
        out = tmp_path / str(len(students))
        config = resolve("tcd", None, [*tiny_overrides, f"data.source={source}", "loop.steps=2"])
        check_distillation(config, read_folder(Path(config.teacher)))
        distillation.distill(config, out, quiet=True)
        students.append(load_file(out / "checkpoints" / "step-00000002" / "student.safetensors"))
    assert all(bool((value == students[1][name]).all()) for name, value in students[0].items())


def test_members_are_listed_once_for_each_version(
    bucket: str, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = from_shards(find_shards(bucket), 64, tmp_path)
    requests: list[str] = []
    listing = shards.samples_of

    def noted(files: object, path: str, shard: str) -> list[shards.Sample]:
        requests.append(shard)
        return listing(files, path, shard)

    monkeypatch.setattr(shards, "samples_of", noted)
    again = from_shards(find_shards(bucket), 64, tmp_path)
    assert requests == []
    assert again.pictures.fingerprint() == first.pictures.fingerprint()
    other = [(name, content + b" ") for name, content in members_of(picture_folder, range(10, 13))]
    fsspec.filesystem("memory").pipe_file("/emoji/pics-01.tar", tar_of(other))
    changed = from_shards(find_shards(bucket), 64, tmp_path)
    assert requests == ["memory://emoji/pics-01.tar"]
    assert len(changed) == 13
    assert changed.pictures.fingerprint() != first.pictures.fingerprint()
    with pytest.raises(UserError, match=r"the shard has changed|cannot read picture"):
        first.pictures.read(range(10, 16))


@pytest.mark.parametrize("fact", ["ETag", "Content-MD5", "Digest", "Last-Modified"])
def test_the_headers_of_a_web_server_version_a_shard(
    fact: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four headers that fsspec hands on from HTTP; a shard of the same size is another one when they change."""
    memory, entry = fsspec.filesystem("memory"), {"name": "x", "size": 5, "type": "file", fact: "first"}

    class Web:
        def info(self, path: str) -> dict[str, object]:
            return entry

        def open(self, path: str, mode: str) -> object:
            return memory.open("/emoji/pics-00.tar", mode)

    monkeypatch.setattr(shards, "place_of", lambda url: (Web(), "/emoji/pics-00.tar"))
    version, samples = shards.listed("https://host/pics.tar", tmp_path)
    assert shards.listed("https://host/pics.tar", tmp_path) == (version, samples)
    entry[fact] = "second"
    assert shards.listed("https://host/pics.tar", tmp_path) != (version, samples)
    assert len(list(tmp_path.glob("shard-*.json"))) == 2


def test_shards_on_a_disk(picture_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "pics.tar"
    place.write_bytes(tar_of(members_of(picture_folder, range(4))))
    assert is_shards(str(place))
    assert not is_prompt_file(str(place))
    wanted = from_folder(picture_folder, 64)
    found = from_shards(find_shards(str(place)), 64, tmp_path)
    assert list(found.captions) == list(wanted.captions)[:4]
    np.testing.assert_array_equal(found.pictures.read([2]), wanted.pictures.read([2]))


def test_names_of_shards() -> None:
    assert expanded("s3://b/{1..2}/x-{08..10}.tar")[::5] == ["s3://b/1/x-08.tar", "s3://b/2/x-10.tar"]
    assert expanded("x.tar") == ["x.tar"]
    assert is_shards("https://host/x.tar?download=true")
    assert not is_shards("pictures/of.tarts")


def test_what_is_no_shard(picture_folder: Path, tmp_path: Path) -> None:
    """One line each, which names the file."""
    files = fsspec.filesystem("memory")
    picture = members_of(picture_folder, range(1))[0]
    plain = tar_of([picture])
    for name, content, words in [
        ("packed", gzip.compress(plain), "not a plain tar, readable by byte ranges"),
        ("cut", plain[:700], "not a plain tar"),
        ("silent", plain, r"picture part/0000.png of .* has no caption"),
        ("null", tar_of([picture, ("part/0000.json", b'{"caption": null}')]), "has no caption"),
        ("bare", tar_of([("a.txt", b"words")]), "holds no picture"),
    ]:
        files.pipe_file(f"/bad/{name}.tar", content)
        with pytest.raises(UserError, match=words):
            from_shards(find_shards(f"memory://bad/{name}.tar"), 64, tmp_path)
    for source, words in [
        ("memory://bad/{1..3}.tar", "there is no memory://bad/1.tar"),
        ("memory://none/*.tar", "names no file"),
        ("ftq://host/x.tar", "cannot read ftq://host/x.tar: Protocol not known"),
    ]:
        with pytest.raises(UserError, match=words):
            find_shards(source)
    files.rm("/bad", recursive=True)
