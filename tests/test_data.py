"""Pictures, captions and the cache of their latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import COLOURS, draw_shape
from fewstep.data import latents
from fewstep.data.latents import LatentSet, cached, latent_set
from fewstep.data.pictures import Captioned, HeldPictures, from_folder, read_picture
from fewstep.data.prompts import read_prompts
from fewstep.draws import Draws
from fewstep.errors import UserError
from fewstep.mapped import MappedRows

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
    with pytest.raises(UserError, match=r"red.webp has no caption: write red.txt"):
        from_folder(tmp_path, 64)
    (tmp_path / "red.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read caption"):
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
    with pytest.raises(UserError, match="needs lines with file_name and text"):
        from_folder(tmp_path, 64)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; give a folder of pictures or 'emoji8'"):
        from_folder(tmp_path / "none", 64)
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
    """Encoders that count what they are asked."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.pictures = 0

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.prompts.append(list(prompts))
        return {"text": torch.tensor([[float(len(p)), float(sum(map(ord, p)) % 97)] for p in prompts])}

    def null(self, count: int) -> dict[str, Tensor]:
        return {"text": torch.full((count, 2), -1.0)}

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        self.pictures += len(pictures)
        return torch.from_numpy(pictures.reshape(len(pictures), -1)[:, :4].astype(np.float32))


def captioned(seed: int = 0) -> Captioned:
    pictures = np.random.default_rng(seed).integers(0, 255, (3, 2, 2, 3), dtype=np.uint8)
    return Captioned(HeldPictures(pictures), [["a", "bb"], ["ccc"], ["bb", "a", "dddd"]])


def test_the_cache_is_used_and_knows_what_it_holds(tmp_path: Path) -> None:
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
        asked = Counting()
        latent_set(change[0], asked, change[1], tmp_path)
        assert (len(asked.prompts), asked.pictures) == counts


def test_rows_lie_in_many_files_and_none_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captions a file, the unconditional state last; a cut file is made again."""
    whole = latent_set(captioned(), Counting(), "weights", tmp_path / "whole")
    monkeypatch.setattr(latents, "SAID", 2)
    monkeypatch.setattr(latents, "CHUNK", 2)
    parted = latent_set(captioned(), Counting(), "weights", tmp_path / "parted")
    assert len(list((tmp_path / "parted").glob("captions-*.safetensors"))) == 2
    assert len(list((tmp_path / "parted").glob("latents-*.safetensors"))) == 2
    some = torch.tensor([4, 0, 3, 0, -1, 1])
    assert torch.equal(parted.table["text"][some], whole.table["text"][some])
    assert torch.equal(parted.table["text"][torch.tensor([-1])], parted.table["text"][torch.tensor([4])])
    assert parted.captions == whole.captions == 4
    assert torch.equal(parted.latents[torch.tensor([2, 0])], whole.latents[torch.tensor([2, 0])])
    assert isinstance(parted.latents, MappedRows)
    assert all(isinstance(part.array().base, np.ndarray) for part in parted.latents._parts)  # of the file
    with pytest.raises(IndexError, match=r"rows \[3\] are not within 3"):
        parted.latents[torch.tensor([3])]
    cut = next((tmp_path / "parted").glob("latents-*-0-2.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-1])
    asked = Counting()
    again = latent_set(captioned(), asked, "weights", tmp_path / "parted")
    assert (asked.prompts, asked.pictures) == ([], 2)
    assert torch.equal(again.latents[torch.arange(3)], whole.latents[torch.arange(3)])


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
    draws = Draws(0, 0, tuple(range(3000)))
    items = torch.arange(3000) % 3
    lengths = data.condition(items, draws, 0.0, CPU)["text"][:, 0]
    assert set(lengths[items == 1].tolist()) == {3.0}
    shares = [float((lengths[items == 2] == n).float().mean()) for n in (1, 2, 4)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
    assert float((lengths[items == 0] == 1).float().mean()) == pytest.approx(2 / 3, abs=0.05)
    assert data.condition(items, draws, 0.0, CPU)["text"].dtype == torch.float32


def test_the_empty_prompt_takes_its_share(tmp_path: Path) -> None:
    data = latent_set(captioned(), Counting(), "w", tmp_path)
    draws = Draws(0, 0, tuple(range(4000)))
    items = torch.arange(4000) % 3
    for share in (0.0, 0.1, 1.0):
        empty = data.condition(items, draws, share, CPU)["text"][:, 0] == -1
        assert float(empty.float().mean()) == pytest.approx(share, abs=0.02)
    # the others keep the caption they would have had
    with_empty, without = (data.condition(items, draws, share, CPU)["text"] for share in (0.1, 0.0))
    kept = with_empty[:, 0] != -1
    assert torch.equal(with_empty[kept], without[kept])
    assert data.null(2, CPU)["text"].tolist() == [[-1.0, -1.0]] * 2


def test_a_caption_depends_on_its_sample_alone(tmp_path: Path) -> None:
    data: LatentSet = latent_set(captioned(), Counting(), "w", tmp_path)
    items = torch.tensor([0, 2, 2, 0])
    whole = data.condition(items, Draws(1, 4, (8, 9, 10, 11)), 0.3, CPU)["text"]
    half = data.condition(items[2:], Draws(1, 4, (10, 11)), 0.3, CPU)["text"]
    assert torch.equal(whole[2:], half)


def test_the_bundled_set_has_its_captions() -> None:
    from fewstep.world import emoji8

    data = emoji8.captioned(3, 0)
    assert data.pictures.read([0]).shape == (1, 64, 64, 3)
    assert len(data.captions) == len(data.pictures) > 1000
    assert {len(row) for row in data.captions} == {3}
