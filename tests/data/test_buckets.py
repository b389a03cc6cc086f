"""Pictures of other sizes and shapes than the trained one: in buckets, in batches of one shape, and drawn so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.backbones.base import load_backbone
from fewstep.common.errors import UserError
from fewstep.common.tensors import digest, load_tensors
from fewstep.data.buckets import BucketedFiles, BucketedLatents, bucket_shapes, bucketed, filled, nearest_shape
from fewstep.data.images import from_folder, size_of
from fewstep.diffusion.config import Sampling
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import resolve
from fewstep.inference.generator import load_image_generator
from fewstep.inference.pipeline import call_settings
from support import tiny_pipelines
from support.drawn import by_pipeline
from support.shapes import draw_shape

NEW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("z_image", "qwen_image", "flux2", "chroma", "krea2", "anima")
]
KINDS = ["sd", "sdxl", "pixart", "sd3", "flux", "sana", *NEW]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_pipelines.Lazily(lambda kind: tiny_pipelines.FAMILIES[kind](tmp_path_factory.mktemp(kind) / "tiny"))


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide, tall and square pictures, one turned by its EXIF; a stripe shows what a crop keeps."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = []
    for i, (width, height) in enumerate([(96, 64), (100, 60), (64, 96), (60, 110), (64, 64), (80, 80), (90, 62)]):
        picture = Image.fromarray(draw_shape("red", "disc")).resize((width, height))
        name = f"{i}.png"
        picture.save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a red disc {i}"}))
    turned = Image.fromarray(draw_shape("blue", "bar")).resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # seen turned by a quarter: 64 x 96
    turned.save(folder / "turned.jpg", exif=exif)
    lines.append(json.dumps({"file_name": "turned.jpg", "text": "a blue bar"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def words(teacher: Path, source: Path, *more: str) -> list[str]:
    return [
        f"teacher={teacher}", f"data.source={source}", "device=cpu", "student.rank=2", "loop.steps=4", "loop.batch=2",
        "loop.save_every=1", "loop.validate_every=null", "optim.lr=1e-2", "optim.ema=null", "optim.warmup=0", *more,
    ]  # fmt: skip


def test_shapes_of_one_area() -> None:
    shapes = bucket_shapes(1024, 64)
    assert (1024, 1024) in shapes
    assert (832, 1216) in shapes
    assert (1216, 832) in shapes
    for width, height in shapes:
        assert width % 64 == height % 64 == 0
        assert abs(width * height / 1024**2 - 1) < 0.05
        assert max(width / height, height / width) <= 2
    ratios = [width / height for width, height in shapes]
    assert ratios == sorted(ratios)
    assert shapes[nearest_shape(1920, 1280, shapes)] in ((1280, 832), (1216, 832))
    assert shapes[nearest_shape(500, 500, shapes)] == (1024, 1024)
    with pytest.raises(UserError, match=r"data\.size = 1000 must be a multiple of 64"):
        bucket_shapes(1000, 64)


def test_each_picture_goes_to_its_shape(shapes_folder: Path) -> None:
    found = bucketed(from_folder(shapes_folder, 64), 64, 16).pictures
    assert isinstance(found, BucketedFiles)
    own = {file.name: found.shapes[shape] for file, shape in zip(found.files, found.of, strict=True)}
    assert size_of(shapes_folder / "turned.jpg") == (64, 96)
    for name, (width, height) in own.items():
        true = size_of(shapes_folder / name)
        assert abs(np.log(width / height / (true[0] / true[1]))) < 0.25
    assert own["turned.jpg"][0] < own["turned.jpg"][1]
    assert own["5.png"] == (64, 64)
    row = [file.name for file in found.files].index("0.png")
    (picture,) = found.read_shaped([row])
    assert picture.shape[:2] == own["0.png"][::-1]
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
    assert middle[0] > 180 > middle[1], "the disc is still in the middle"


def test_a_shape_that_fills_no_batch_joins_the_closest_that_does() -> None:
    shapes = bucket_shapes(64, 16)
    square, wide = shapes.index((64, 64)), nearest_shape(96, 64, shapes)
    ratios = [(64, 64)] * 5 + [(96, 64)] * 4 + [(64, 100)]
    assert filled(ratios, shapes, 4) == [square] * 5 + [wide] * 4 + [square], "tall ones are nearer to squares"
    assert filled(ratios, shapes, 20) == [square] * 10
    assert len(set(filled(ratios, shapes, 1))) == 3


def test_batches_are_of_one_shape_and_all_are_seen() -> None:
    parts = [torch.full((n, 1, 1, n), float(n)) for n in (5, 3, 9)]
    rows = [[0, 3, 6, 9, 12], [1, 4, 7], [2, 5, 8, 10, 11, 13, 14, 15, 16]]
    held = BucketedLatents(parts, rows)
    items = held.order(3, 4)
    length = (2 + 1 + 3) * 4
    seen = items(0, length)
    for start in range(0, length, 4):
        batch = torch.from_numpy(seen[start : start + 4])
        assert len(set(held.group[batch].tolist())) == 1
        assert held[batch].shape[0] == 4
    counts = Counter(seen.tolist())
    assert set(counts) == set(range(17)), "none is left out"
    assert sum(counts.values()) - 17 == 3 + 1 + 3, "buckets are filled up by as few as can be"
    assert not np.array_equal(items(length, 2 * length), seen), "a fresh pass"
    np.testing.assert_array_equal(items(6, 11), np.concatenate([items(6, 8), items(8, 11)]))
    with pytest.raises(ValueError, match="items of 2 shapes cannot be one batch"):
        held[torch.tensor([0, 1])]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_on_buckets_resumes_and_splits(
    accumulate: int, folders: dict[str, Path], shapes_folder: Path, tmp_path: Path
) -> None:
    """SDXL is conditioned on each shape; micro-batches change rounding alone; cut and resumed it is the same."""
    more = ["data.buckets=true", "data.size=64", f"loop.accumulate={accumulate}"]
    config = resolve("tcd", None, words(folders["sdxl"], shapes_folder, *more))
    student = distillation.distill(config, tmp_path / "whole", quiet=True)
    shorter = resolve("tcd", None, [*words(folders["sdxl"], shapes_folder, *more), "loop.steps=2"])
    distillation.distill(shorter, tmp_path / "cut", quiet=True)
    again = distillation.distill(config, tmp_path / "cut", quiet=True)
    assert digest(load_tensors(again)) == digest(load_tensors(student))
    if accumulate == 2:
        plain = resolve("tcd", None, words(folders["sdxl"], shapes_folder, "data.buckets=true", "data.size=64"))
        other = load_tensors(distillation.distill(plain, tmp_path / "plain", quiet=True))
        for name, value in load_tensors(student).items():
            torch.testing.assert_close(value.float(), other[name].float(), atol=5e-3, rtol=0)


@pytest.mark.slow
def test_networks_see_the_shapes(
    folders: dict[str, Path], shapes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.backbones.sdxl import StableDiffusionXL

    seen: Counter[tuple[int, ...]] = Counter()
    plain = StableDiffusionXL.call

    def watched(self, network, x, t, condition, **more):  # type: ignore[no-untyped-def]
        seen[tuple(x.shape[-2:])] += 1
        return plain(self, network, x, t, condition, **more)

    monkeypatch.setattr(StableDiffusionXL, "call", watched)
    more = ["data.buckets=true", "data.size=64", "loop.steps=8"]
    distillation.distill(
        resolve("tcd", None, words(folders["sdxl"], shapes_folder, *more)), tmp_path / "run", quiet=True
    )
    assert len(seen) >= 3
    assert all(abs(height * width - 64) <= 16 for height, width in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_another_size_is_the_pipelines_own(kind: str, folders: dict[str, Path]) -> None:
    """Latents of a wide picture equal those of plain diffusers; a flow's shift is that of the trained size."""
    folder = folders[kind]
    image_generator = load_image_generator(folder)
    unit = max(32 if kind == "sana" else 8, image_generator.backbone.folder.unit)  # its pipeline needs multiples of 32
    side = image_generator.backbone.picture_size
    size = (2 * side if kind == "sana" else 3 * side // 2 // unit * unit, side)
    sampling = Sampling(steps=2, gamma=0.0, size=size)
    ours = image_generator.latents(image_generator.encode(["a red disc"]), [3], sampling)
    assert ours.shape[-2:] == (
        size[1] // image_generator.backbone.folder.scale,
        size[0] // image_generator.backbone.folder.scale,
    )
    theirs = by_pipeline(folder, ["a red disc"], [3], 2, 3.5 if kind == "flux" else 1.0, size)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_what_is_learned_at_a_size_is_drawn_at_it(
    folders: dict[str, Path], picture_folder: Path, tmp_path: Path
) -> None:
    config = resolve("tcd", None, words(folders["sd"], picture_folder, "data.size=96", "loop.steps=2"))
    assert config.sampling.size == (96, 96)
    student = distillation.distill(config, tmp_path / "run", quiet=True)
    assert call_settings(student)["width"] == call_settings(student)["height"] == 96
    path = fewstep.sample("a red disc", teacher=folders["sd"], lora=student, out=tmp_path / "a.png", scale=1)
    assert Image.open(path).size == (96, 96)
    path = fewstep.sample(
        "a red disc", teacher=folders["sd"], lora=student, out=tmp_path / "b.png", scale=1, settings={"size": [128, 64]}
    )
    assert Image.open(path).size == (128, 64)
    backbone = load_backbone(folders["sd"])
    backbone.resize(96)
    assert backbone.latent_shape == (4, 12, 12)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["data.size=100"], r"data\.size = 100 must be a multiple of 16"),
        (["data.buckets=true", "data.source=PROMPTS"], r"data\.buckets.* several shapes"),
        (["data.buckets=true", "method.start=rollout"], r"data\.buckets.* method\.start"),
        (["sampling.size=[64,70]"], r"sampling\.size = 70 must be a multiple of 16"),
    ],
)
def test_refusals(more: list[str], reason: str, folders: dict[str, Path], shapes_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red disc\n")
    options = [word.replace("PROMPTS", str(prompts)) for word in more]
    with pytest.raises(UserError, match=reason):
        fewstep.distill("tcd", out=tmp_path / "run", overrides=words(folders["sd"], shapes_folder, *options))
    assert not (tmp_path / "run").exists()
