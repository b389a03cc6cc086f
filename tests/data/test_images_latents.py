"""Pictures, captions and the cache of their latents."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.mapped_tensors import MappedRows
from fewstep.common.rng import KeyedRng
from fewstep.common.tensor_cache import cached
from fewstep.data import latents
from fewstep.data.folder_files import check_pictures
from fewstep.data.images import (
    Captioned,
    HeldPictures,
    PictureFiles,
    from_folder,
    read_picture,
    size_of,
)
from fewstep.data.latents import LatentSet, Wanted, latent_set
from fewstep.data.prompts import read_prompts
from fewstep.data.row_store import Batches
from fewstep.data.shards import Member
from support.shapes import COLOURS, draw_shape

CPU = torch.device("cpu")


# ---- pictures


def test_a_folder_with_metadata(picture_folder: Path) -> None:
    data = from_folder(picture_folder, 64)
    pictures = data.pictures.read(range(16))
    assert (len(data), pictures.shape, pictures.dtype) == (16, (16, 64, 64, 3), np.uint8)
    assert data.captions[0] == ["a red disc"]
    np.testing.assert_array_equal(pictures[0], draw_shape("red", "disc"))
    np.testing.assert_array_equal(data.pictures.read([5, 2]), pictures[[5, 2]])
    assert from_folder(picture_folder, 16).pictures.read([3]).shape == (1, 16, 16, 3)


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i, colour in enumerate(("red", "blue")):
        place = tmp_path / ("sub" if i else ".") / f"{colour}.webp"
        Image.fromarray(draw_shape(colour, "disc")).save(place, lossless=True)
        place.with_suffix(".txt").write_text(f"  a {colour} disc, 圆\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a picture")
    data = from_folder(tmp_path, 64)
    assert [row[0] for row in data.captions] == ["a red disc, 圆", "a blue disc, 圆"]
    assert tuple(data.pictures.read([1])[0, 32, 32]) == COLOURS["blue"]
    (tmp_path / "red.txt").unlink()
    with pytest.raises(UserError, match=r"red.webp .* has no caption"):
        from_folder(tmp_path, 64)
    (tmp_path / "red.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"cannot read caption red.txt"):
        from_folder(tmp_path, 64)


def test_metadata_chooses_the_pictures_and_may_be_absolute(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.fromarray(draw_shape(colour, "disc")).save(tmp_path / f"{colour}.png")
    lines = [{"file_name": str(tmp_path / "blue.png"), "text": "blue\u2028disc", "more": 1}]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8"
    )
    data = from_folder(tmp_path, 64)
    assert len(data.pictures) == 1
    assert data.captions == [["blue\u2028disc"]]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"file_name": "a.png"}',
        '["a.png", "text"]',
        '{"file_name": "a.png", "text": null}',
        '{"file_name": 3, "text": "x"}',
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: .* file_name and text"):
        from_folder(tmp_path, 64)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.source = .*none"):
        check_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="holds no picture"):
        from_folder(tmp_path, 64)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    with pytest.raises(UserError, match=r"cannot read picture .*gone.png"):
        from_folder(tmp_path, 64)
    (tmp_path / "gone.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read picture .*gone.png"):
        from_folder(tmp_path, 64)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (10, 20, 30, 255)
    pixels[:32, 32:] = (0, 0, 0, 0)
    pixels[32:, 32:] = (0, 0, 0, 128)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", 64)
    assert picture[10, 10].tolist() == [10, 20, 30]
    assert picture[10, 50].tolist() == [255, 255, 255]
    assert picture[50, 50].tolist() == [127, 127, 127]
    palette = Image.fromarray(pixels, "RGBA").convert("P")
    palette.info["transparency"] = palette.getpixel((50, 10))
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((50, 10)))
    assert read_picture(tmp_path / "p.png", 64)[10, 50].tolist() == [255, 255, 255]


def test_pictures_are_cropped_in_the_middle_and_turned_upright(tmp_path: Path) -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    Image.fromarray(wide).save(tmp_path / "w.png")
    assert read_picture(tmp_path / "w.png", 20).min() == 200
    tall = np.zeros((60, 60, 3), np.uint8)
    tall[:20] = 255
    exif = Image.Exif()
    exif[274] = 3  # stored upside down
    Image.fromarray(tall).save(tmp_path / "t.jpg", quality=95, exif=exif)
    turned = read_picture(tmp_path / "t.jpg", 60)
    assert turned[5].mean() < 10
    assert turned[55].mean() > 245


def grey_png(values: np.ndarray, transparent: int | None = None) -> bytes:
    """A PNG of 16 bits; one value may be transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    hole = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + hole + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
DEEP = {
    "16 bits.png": np.rint(RAMP * 65535).astype(np.uint16),
    "16 bits.tif": np.rint(RAMP * 65535).astype(np.uint16),
    "16 bits.pgm": np.rint(RAMP * 65535).astype(np.uint16),
    "16 bits, large end first.tif": np.rint(RAMP * 65535).astype(">u2"),
    "16 bits in 32.tif": np.rint(RAMP * 65535).astype(np.int32),
    "8 bits in 32.tif": np.rint(RAMP * 255).astype(np.int32),
    "to 1.tif": RAMP.astype(np.float32),
    "to 255.tif": (RAMP * 255).astype(np.float32),
    "to 1.pfm": RAMP.astype(np.float32),
    "8 bits.png": np.rint(RAMP * 255).astype(np.uint8),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pictures_are_scaled(tmp_path: Path, name: str) -> None:
    if name == "16 bits.pgm":
        (tmp_path / name).write_bytes(b"P5 64 64 65535\n" + DEEP[name].astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP[name]).save(tmp_path / name)
    found = read_picture(tmp_path / name, 64).astype(float)
    assert np.abs(found - (RAMP * 255)[..., None]).max() <= 0.51
    assert size_of(tmp_path / name) == (64, 64)


def test_the_white_of_a_dark_picture_is_its_formats(tmp_path: Path) -> None:
    """White of a 16-bit PNG or PGM is 65,535, independent of its content; 255 of 65,535 is 1 of 255."""
    (tmp_path / "a.png").write_bytes(grey_png(np.full((8, 8), 255, np.uint16)))
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + np.full((8, 8), 255, ">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        assert read_picture(tmp_path / name, 8).max() == 1


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 2**31 - 1).astype(np.int32),
        (RAMP * 65535 - 9).astype(np.int32),
        (RAMP * 256.5).astype(np.float32),
        (RAMP * 1.2).astype(np.float32),
        (RAMP * 2 - 1).astype(np.float32),
        np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
        np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32),
    ],
)
def test_values_without_a_known_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.* values from"):
        read_picture(tmp_path / "a.tif", 8)


@pytest.mark.parametrize(
    ("values", "sample_format", "bits", "photometric", "white"),
    [
        (RAMP * 65535, 1, 16, 1, 65535),
        (RAMP * 65535, 1, 16, 0, -65535),
        (RAMP * 32767, 2, 16, 1, 32767),
        (RAMP, 3, 32, 1, 1),
        (RAMP, 3, 32, 0, -1),
    ],
)
def test_white_of_a_tiff_is_read_from_its_tags(
    tmp_path: Path, values: np.ndarray, sample_format: int, bits: int, photometric: int, white: float
) -> None:
    """Unsigned, signed and floating-point values; 0 black or (below 0 here) white."""
    kind = {(1, 16): "<u2", (2, 16): "<i2", (3, 32): "<f4"}[sample_format, bits]
    data = (np.rint(values) if sample_format < 3 else values).astype(kind).tobytes()
    entries = [(256, 64), (257, 64), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 64)]
    entries += [(279, len(data)), (339, sample_format)]
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    (tmp_path / "a.tif").write_bytes(head + data + struct.pack("<H", len(entries)) + tags + struct.pack("<I", 0))
    seen = values / abs(white) * 255
    wanted = seen if white > 0 else 255 - seen
    assert np.abs(read_picture(tmp_path / "a.tif", 64).astype(float) - wanted[..., None]).max() <= 0.52


def test_a_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    values = np.full((8, 8), 300, np.uint16)
    values[:4] = 25700
    (tmp_path / "a.png").write_bytes(grey_png(values, 300))
    found = read_picture(tmp_path / "a.png", 8)
    assert (found[0, 0, 0], found[7, 0, 0]) == (100, 255)


def test_a_picture_that_is_read_otherwise_is_another(tmp_path: Path) -> None:
    """Grey PNGs of 16 bits were clipped once: latents of these must not be taken for theirs; of others they may."""
    prints = []
    for values in (np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint8)):
        Image.fromarray(values).save(tmp_path / "a.png")
        held = (tmp_path / "a.png").read_bytes()
        own = hashlib.sha256(b"8" + hashlib.sha256(held).digest()).hexdigest()
        prints.append(PictureFiles((tmp_path / "a.png",), 8).fingerprint() == own)
    assert prints == [False, True]
    members = [Member("x.tar", "v", "a.png", 512, 9, deep) for deep in (True, False)]
    expected = hashlib.sha256(f"{Path('x.tar').resolve()} v a.png 512 9".encode()).digest()
    assert [member.identity() == expected for member in members] == [False, True]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16"])
def test_pictures_of_every_mode_keep_their_colours(tmp_path: Path, mode: str) -> None:
    """White above black. Formats that hold the mode; what is no alpha channel makes nothing transparent."""
    plain = Image.fromarray(np.repeat(np.repeat([[255], [0]], 8, 0), 16, 1).astype(np.uint8)).convert("RGB")
    if mode == "LAB":
        plain = ImageCms.profileToProfile(
            plain, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    place = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif")
    if mode == "I;16":
        Image.fromarray(np.asarray(plain)[..., 0].astype(np.uint16) * 257).save(place)
    else:
        plain.convert(mode).save(place, **({"quality": 100} if place.suffix == ".jpg" else {}))
    found = read_picture(place, 16).astype(int)
    assert abs(found[0, 0] - 255).max() <= 3
    assert found[15, 0].max() <= 3


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("tif", {})])
def test_the_first_of_several_frames_is_read(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert read_picture(tmp_path / f"a.{suffix}", 8)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path: Path, suffix: str, turned: int) -> None:
    """What is stored under each of EXIF's eight, so that the upper left quarter is seen white."""
    seen = np.zeros((48, 32), np.uint8)
    seen[:24, :16] = 255
    stored = {
        **{1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1]},
        **{5: seen.T, 6: seen.T[::-1], 7: seen.T[::-1, ::-1], 8: seen.T[:, ::-1]},
    }[turned]
    place = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = turned
    more = {"tiffinfo": {274: turned}} if suffix == "tif" else {"exif": exif}
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(place, **more)
    assert size_of(place) == (32, 48)
    found = read_picture(place, 32, 48)
    assert found.shape == (48, 32, 3)
    corners = [found[y, x].mean() > 127 for y, x in ((4, 4), (4, 28), (44, 4), (44, 28))]
    assert corners == [True, False, False, False]


@pytest.mark.parametrize(
    "held", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"BM" + b"\0" * 60]
)
def test_broken_pictures_are_refused(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "a.png").write_bytes(held)
    for read in (lambda: read_picture(tmp_path / "a.png", 8), lambda: size_of(tmp_path / "a.png")):
        with pytest.raises(UserError, match=r"cannot read picture .*a\.png"):
            read()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on broken TIFFs
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp", "avif", "qoi"])
def test_bytes_at_random_in_pictures_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    place = tmp_path / f"a.{suffix}"
    Image.fromarray(draw_shape("red", "disc")).save(place)
    whole, draw = place.read_bytes(), np.random.default_rng(0)
    for _ in range(30):
        held = bytearray(whole[: draw.integers(1, len(whole) + 1)] if draw.random() < 0.5 else whole)
        for at in draw.integers(0, len(held), 4):
            held[at] = draw.integers(0, 256)
        place.write_bytes(bytes(held))
        for read in (lambda: read_picture(place, 8).shape, lambda: size_of(place)):
            try:
                assert len(read()) in (2, 3)
            except UserError as error:
                assert place.name in str(error)  # noqa: PT017


# ---- prompts


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufeffa dog\r\n\n  a cat \n", encoding="utf-8")
    assert read_prompts(file) == ["a dog", "a cat"]
    file.write_text(" \n\n")
    with pytest.raises(UserError, match="holds no prompt; write one a line"):
        read_prompts(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"prompts = .* is not .* text"):
        read_prompts(file)


# ---- latents


class Counting:
    """Encoders that count their inputs."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.pictures = 0

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.prompts.append(list(prompts))
        return {"text": torch.tensor([[float(len(p)), float(sum(map(ord, p)) % 97)] for p in prompts])}

    def null(self, count: int) -> dict[str, Tensor]:
        return {"text": torch.full((count, 2), -1.0)}

    prompts_at_once = 256

    def pictures_at_once(self, pixels: int) -> int:
        return 128

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        self.pictures += len(pictures)
        return torch.from_numpy(pictures.reshape(len(pictures), -1)[:, :4].astype(np.float32))


def captioned(seed: int = 0) -> Captioned:
    pictures = np.random.default_rng(seed).integers(0, 255, (3, 2, 2, 3), dtype=np.uint8)
    return Captioned(HeldPictures(pictures), [["a", "bb"], ["ccc"], ["bb", "a", "dddd"]])


def test_the_cache_is_used_and_keyed_by_content(tmp_path: Path) -> None:
    first = Counting()
    data = latent_set(captioned(), first, "weights 1", tmp_path)
    assert first.prompts == [["a", "bb", "ccc", "dddd"]]
    assert first.pictures == 3
    again = Counting()
    same = latent_set(captioned(), again, "weights 1", tmp_path)
    assert (again.prompts, again.pictures) == ([], 0)
    assert torch.equal(data.latents[torch.arange(3)], same.latents[torch.arange(3)])
    assert torch.equal(data.table["text"][torch.arange(5)], same.table["text"][torch.arange(5)])
    for change, counts in (
        ((captioned(), "weights 2"), (1, 3)),
        ((captioned(1), "weights 1"), (0, 3)),
        ((Captioned(captioned().pictures, [["new"]] * 3), "weights 1"), (1, 0)),
    ):
        encoders = Counting()
        latent_set(change[0], encoders, change[1], tmp_path)
        assert (len(encoders.prompts), encoders.pictures) == counts


def test_rows_lie_in_many_files_and_none_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captions a file, the unconditional state last; a cut file is made again."""
    whole = latent_set(captioned(), Counting(), "weights", tmp_path / "whole")
    monkeypatch.setattr(latents, "CAPTION_CHUNK", 2)
    monkeypatch.setattr(latents, "CHUNK", 2)
    parted = latent_set(captioned(), Counting(), "weights", tmp_path / "parted")
    assert len(list((tmp_path / "parted").glob("captions-*/*.safetensors"))) == 3
    assert len(list((tmp_path / "parted").glob("latents-*/*.safetensors"))) == 2
    some = torch.tensor([4, 0, 3, 0, -1, 1])
    assert torch.equal(parted.table["text"][some], whole.table["text"][some])
    assert torch.equal(parted.table["text"][torch.tensor([-1])], parted.table["text"][torch.tensor([4])])
    assert parted.captions == whole.captions == 4
    assert torch.equal(parted.latents[torch.tensor([2, 0])], whole.latents[torch.tensor([2, 0])])
    assert isinstance(parted.latents, MappedRows)
    assert all(isinstance(part.array().base, np.ndarray) for part in parted.latents._parts)  # of the file
    with pytest.raises(IndexError, match=r"rows \[3\] are not within 3"):
        parted.latents[torch.tensor([3])]
    cut = next((tmp_path / "parted").glob("latents-*/00000000-*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-1])
    encoders = Counting()
    again = latent_set(captioned(), encoders, "weights", tmp_path / "parted")
    assert (encoders.prompts, encoders.pictures) == ([], 2)
    assert torch.equal(again.latents[torch.arange(3)], whole.latents[torch.arange(3)])


@pytest.mark.parametrize(("count", "batch", "chunk"), [(300, 128, 512), (1100, 128, 512), (23, 5, 8), (5, 128, 512)])
def test_a_row_is_always_computed_in_a_batch_of_one_size(count: int, batch: int, chunk: int) -> None:
    """The size decides the bits; those of all rows are computed as they were when all were computed at once."""
    ways = Batches(count, batch, chunk)
    whole = {
        row: len(rows[start : start + batch])
        for first in range(0, count, chunk)
        for rows in [range(first, min(first + chunk, count))]
        for start in range(0, len(rows), batch)
        for row in rows[start : start + batch]
    }
    assert ways.sizes().tolist() == [whole[row] for row in range(count)]
    rng, stored = np.random.default_rng(0), np.zeros(0, dtype=np.int64)
    for share in (0.01, 0.1, 0.5, 1.0):
        wanted = np.unique(rng.integers(0, count, max(1, int(share * count)))) if share < 1 else np.arange(count)
        calls = ways.lists(wanted, stored)
        for rows in calls:
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                assert {whole[row] for row in part.tolist()} == {len(part)}
        assert set(wanted.tolist()) <= set(np.concatenate([*calls, stored]).tolist())
        assert len(np.concatenate([*calls, stored])) <= len(wanted) + len(stored) + 2 * batch
        stored = np.unique(np.concatenate([*calls, stored]))
    assert ways.lists(np.arange(count), stored) == []


def test_only_what_is_wanted_is_encoded_and_the_rest_later(tmp_path: Path) -> None:
    """Runs of other rows add to one store; whatever came first, all have the same bits."""
    pictures = np.random.default_rng(0).integers(0, 255, (700, 2, 2, 3), dtype=np.uint8)
    data = Captioned(HeldPictures(pictures), [[f"{i}"] for i in range(700)])
    whole = latent_set(data, Counting(), "w", tmp_path / "whole")
    first, second, third = Counting(), Counting(), Counting()
    some = Wanted(np.array([3, 5, 690]), np.array([7]))
    few = latent_set(data, first, "w", tmp_path / "parts", wanted=some)
    assert first.pictures == 128 + 60  # one batch of those that are full, and the last one
    assert torch.equal(few.latents[torch.tensor([690, 3])], whole.latents[torch.tensor([690, 3])])
    with pytest.raises(IndexError, match="not stored"):
        few.latents[torch.tensor([400])]
    latent_set(data, second, "w", tmp_path / "parts", wanted=some)
    assert (second.pictures, second.prompts) == (0, [])
    every = latent_set(data, third, "w", tmp_path / "parts")
    assert third.pictures == 512
    assert torch.equal(every.latents[torch.arange(700)], whole.latents[torch.arange(700)])
    assert torch.equal(every.table["text"][torch.arange(701)], whole.table["text"][torch.arange(701)])
    assert every.key == whole.key == few.key


def test_two_runs_at_once_encode_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    encoders = [Counting(), Counting()]
    with ThreadPoolExecutor(2) as pool:
        sets = list(pool.map(lambda one: latent_set(captioned(), one, "w", tmp_path), encoders))
    assert sum(one.pictures for one in encoders) == 3
    assert torch.equal(*[data.latents[torch.arange(3)] for data in sets])


def test_encoding_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "CHUNK", 1)

    class Dying(Counting):
        def to_latents(self, pictures: np.ndarray) -> Tensor:
            if self.pictures == 2:
                raise KeyboardInterrupt
            return super().to_latents(pictures)

    with pytest.raises(KeyboardInterrupt):
        latent_set(captioned(), Dying(), "w", tmp_path)
    again, whole = Counting(), Counting()
    resumed = latent_set(captioned(), again, "w", tmp_path)
    assert again.pictures == 1
    assert torch.equal(resumed.latents[torch.arange(3)], whole.to_latents(captioned().pictures.read(range(3))))


def test_a_broken_cache_is_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"x": torch.arange(3.0)}

    for _ in range(2):
        assert torch.equal(cached(tmp_path, "key", make)["x"], torch.arange(3.0))
    assert len(made) == 1
    file = tmp_path / "key.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    assert torch.equal(cached(tmp_path, "key", make)["x"], torch.arange(3.0))
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_captions_belong_to_their_pictures_and_take_turns(tmp_path: Path) -> None:
    """[a, bb] is filled up to three as a, bb, a; a lone caption is always drawn."""
    encoders = Counting()
    data = latent_set(captioned(), encoders, "w", tmp_path)
    assert data.rows.tolist() == [[0, 1, 0], [2, 2, 2], [1, 0, 3]]
    rng = KeyedRng(0, 0, tuple(range(3000)))
    items = torch.arange(3000) % 3
    lengths = data.condition(items, rng, 0.0, CPU)["text"][:, 0]
    assert set(lengths[items == 1].tolist()) == {3.0}
    shares = [float((lengths[items == 2] == n).float().mean()) for n in (1, 2, 4)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
    assert float((lengths[items == 0] == 1).float().mean()) == pytest.approx(2 / 3, abs=0.05)
    assert data.condition(items, rng, 0.0, CPU)["text"].dtype == torch.float32


def test_the_empty_prompt_takes_its_share(tmp_path: Path) -> None:
    data = latent_set(captioned(), Counting(), "w", tmp_path)
    rng = KeyedRng(0, 0, tuple(range(4000)))
    items = torch.arange(4000) % 3
    for share in (0.0, 0.1, 1.0):
        empty = data.condition(items, rng, share, CPU)["text"][:, 0] == -1
        assert float(empty.float().mean()) == pytest.approx(share, abs=0.02)
    # the others keep the caption they would have had
    with_empty, without = (data.condition(items, rng, share, CPU)["text"] for share in (0.1, 0.0))
    kept = with_empty[:, 0] != -1
    assert torch.equal(with_empty[kept], without[kept])
    assert data.null(2, CPU)["text"].tolist() == [[-1.0, -1.0]] * 2


def test_a_caption_depends_on_its_sample_alone(tmp_path: Path) -> None:
    data: LatentSet = latent_set(captioned(), Counting(), "w", tmp_path)
    items = torch.tensor([0, 2, 2, 0])
    whole = data.condition(items, KeyedRng(1, 4, (8, 9, 10, 11)), 0.3, CPU)["text"]
    half = data.condition(items[2:], KeyedRng(1, 4, (10, 11)), 0.3, CPU)["text"]
    assert torch.equal(whole[2:], half)
