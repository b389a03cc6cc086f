"""Networks trained on sticker scenes: losses in closed form, and runs that are resumed exactly."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from fewstep.backbones.sd import encode_text
from fewstep.common.accelerator import make_accelerator
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng, generator
from fewstep.evaluation.lite0 import make_lite0
from fewstep.evaluation.lite0_weights import load_weights
from fewstep.training.config import LoopConfig
from fewstep_worlds.common.autoencoder import make_vae, restore, to_tensor
from fewstep_worlds.common.denoiser import make_unet
from fewstep_worlds.common.pipeline import write_teacher
from fewstep_worlds.common.text import trim_text
from fewstep_worlds.stickers import accuracy, autoencoder, reader, reader_report, teacher, teacher_report
from fewstep_worlds.stickers.claim import Claim, Facts, check, facts_of, full_claim
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, draw_scenes, make_scenes
from fewstep_worlds.stickers.grammar import phrases
from fewstep_worlds.stickers.heldout import KINDS
from fewstep_worlds.stickers.prompts import training_prompt
from fewstep_worlds.stickers.scene import Scene
from fewstep_worlds.stickers.settings import AutoencoderConfig, ReaderConfig, TeacherConfig

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SOURCES = Path(__file__).resolve().parents[2] / "src" / "fewstep"


def test_the_library_does_not_import_its_worlds() -> None:
    assert not [path for path in SOURCES.rglob("*.py") if "fewstep_worlds" in path.read_text(encoding="utf-8")]


# ---------------------------------------------------------------------------------------------------- autoencoder


class Painted(nn.Module):
    """An autoencoder whose decoder always paints the same pictures, and whose posterior is N(0, 1)."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures = nn.Parameter(pictures)

    def encode(self, pictures: Tensor) -> Any:
        zero = torch.zeros(len(pictures), 4, 2, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=zero, logvar=zero))

    def decode(self, _: Tensor) -> Any:
        return SimpleNamespace(sample=self.pictures)


def test_slope_errors_are_those_of_differences() -> None:
    ramp = torch.arange(8.0).repeat(1, 1, 8, 1)
    assert float(autoencoder.slope_error(3 * ramp)) == 9.0
    assert float(autoencoder.slope_error(ramp + 2 * ramp.mT)) == 5.0


def test_the_critic_adds_its_share_to_the_gradient_of_each_picture() -> None:
    torch.manual_seed(0)
    real, painted = 0.3 * torch.randn(2, 3, 32, 32), 0.3 * torch.randn(2, 3, 32, 32)
    critic, network = autoencoder.make_critic((8, 16)), make_lite0(load_weights())
    gradients, values = {}, {}
    for share, step in ((0.0, 5), (0.7, 5), (0.7, 4)):
        vae = Painted(painted.clone())
        config = AutoencoderConfig(critic_share=share, critic_from=5)
        losses = autoencoder.AutoencoderLosses(vae, critic, network, config)
        loss = losses.of_vae({"pictures": real}, KeyedRng(0, step, (0, 1)))
        loss.value.backward()
        gradients[share, step], values[share, step] = vae.pictures.grad, loss.value
    own = gradients[0.0, 5]
    torch.testing.assert_close(gradients[0.7, 4], own)
    assert len({round(value.item(), 5) for value in values.values()}) == 1
    added = gradients[0.7, 5] - own
    torch.testing.assert_close(added.flatten(1).norm(dim=1), 0.7 * own.flatten(1).norm(dim=1), rtol=1e-4, atol=0)
    leaf = painted.clone().requires_grad_()
    (-critic(leaf).mean()).backward()
    torch.testing.assert_close(torch.cosine_similarity(added.flatten(1), leaf.grad.flatten(1)), torch.ones(2))


def test_a_critic_that_is_right_by_a_margin_has_no_loss() -> None:
    vae = Painted(torch.zeros(1, 3, 32, 32))
    network = make_lite0(load_weights())
    for sign, expected in ((1, 0.0), (-1, 6.0)):
        losses = autoencoder.AutoencoderLosses(vae, _Brightness(2 * sign), network, AutoencoderConfig())
        batch = {"pictures": torch.ones(1, 3, 32, 32)}
        losses.of_vae(batch, KeyedRng(0, 0, (0,)))
        assert float(losses.of_critic(batch, KeyedRng(0, 0, (0,))).value) == expected


class _Brightness(nn.Module):
    """Judges a picture of ones as `slope`, and one of zeros as the opposite."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, pictures: Tensor) -> Tensor:
        return self.slope * (2 * pictures - 1)


def test_equal_pictures_are_at_no_perceptual_distance() -> None:
    network = make_lite0(load_weights())
    pictures = 0.5 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert float(autoencoder.perceptual_distance(network, pictures, pictures)) == 0
    distances = [autoencoder.perceptual_distance(network, pictures + shift, pictures) for shift in (0.1, 0.4)]
    assert 0 < distances[0] < distances[1]


TINY = AutoencoderConfig(
    channels=(8, 8, 8),
    critic_channels=(8, 8),
    critic_from=1,
    workers=0,
    loop=LoopConfig(steps=4, batch=2, save_every=2, log_every=1),
)


def test_an_autoencoder_run_is_resumed_exactly(sticker_sheets: Path, tmp_path: Path) -> None:
    accelerator = make_accelerator("fp32", CPU)
    whole = autoencoder.train_autoencoder(TINY, tmp_path / "whole", accelerator, sticker_sheets)
    half = TINY.model_copy(update={"loop": TINY.loop.model_copy(update={"steps": 2})})
    autoencoder.train_autoencoder(half, tmp_path / "halves", accelerator, sticker_sheets)
    resumed = autoencoder.train_autoencoder(TINY, tmp_path / "halves", accelerator, sticker_sheets)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    pictures = draw_scenes(9, range(200), folder=sticker_sheets)
    latents = whole.encode(to_tensor(pictures)).latent_dist.mean
    assert abs(latents.mean().item()) < 0.2
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    assert restore(whole, pictures[:3]).shape == (3, 64, 64, 3)
    assert restore(whole, pictures).dtype == np.uint8


# --------------------------------------------------------------------------------------------------------- reader


def perfect(scenes: list[Scene], sure: float = 30.0) -> dict[str, Tensor]:
    """Outputs of a reader that makes no mistake."""
    targets = reader.make_targets(scenes)
    sizes = {name: len(of) for name, of in reader.CLASSES.items()}
    classes = {name: sure * torch.nn.functional.one_hot(targets[name], n).float() for name, n in sizes.items()}
    heat = targets["heat"].logit(1e-6).where(targets["heat"] < 1, torch.tensor(sure))
    return {"heat": heat, "offset": targets["offset"].nan_to_num(), **classes}


def test_a_perfect_reader_finds_the_facts_of_every_scene() -> None:
    scenes = make_scenes(0, range(400)) + make_scenes(0, range(50), "style")
    for scene, found in zip(scenes, reader.decode(perfect(scenes))):
        assert all(check(full_claim(scene), found).values())
        wanted = facts_of(scene)
        spots = [sorted(facts.places) for facts in (wanted, found)]
        assert np.allclose([spot[1:] for spot in spots[0]], [spot[1:] for spot in spots[1]], atol=1e-3)


def test_a_reader_is_trained_towards_the_facts() -> None:
    scenes = make_scenes(0, range(8))
    found = {name: value.requires_grad_() for name, value in perfect(scenes).items()}
    targets = reader.make_targets(scenes)
    best = reader.reader_loss(found, targets)
    assert {name: round(value.item(), 4) for name, value in best.scalars.items() if name != "centres"} == {
        "offsets": 0, "colour": 0, "pattern": 0, "style": 0
    }  # fmt: skip
    worse = {**found, "heat": found["heat"].where(targets["heat"] < 1, torch.tensor(-3.0))}
    centres = int((targets["heat"] == 1).sum())
    lost = reader.reader_loss(worse, targets).scalars["centres"] - best.scalars["centres"]
    chance = 1 / (1 + math.exp(3))
    assert lost.item() == pytest.approx(-((1 - chance) ** 2) * math.log(chance), rel=1e-4)
    assert centres == sum(len(scene.stickers) for scene in scenes)


def test_damage_blurs_and_noises_by_so_much() -> None:
    point = torch.full((2, 3, 33, 33), -1.0)
    point[:, :, 16, 16] = 1.0
    none, noise = torch.zeros(2), torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    blurred = reader.damage(point, torch.tensor([0.0, 1.1]), none, noise)
    torch.testing.assert_close(blurred[0], point[0])
    spread = (blurred[1, 0] + 1) / 2
    offsets = torch.arange(33.0) - 16
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    assert (spread.sum(0) * offsets**2).sum().item() == pytest.approx(1.1**2, rel=0.01)
    noised = reader.damage(torch.zeros(2, 3, 33, 33), none, torch.tensor([0.0, 0.2]), noise)
    assert noised.flatten(1).std(1).tolist() == pytest.approx([0, 0.2], abs=0.01)


def test_a_reader_is_resumed_exactly_and_saved(
    sticker_sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = LoopConfig(steps=2, batch=2, save_every=1, log_every=1, validate_every=2)
    config = ReaderConfig(channels=(8, 8, 8), blocks=(1, 1, 1), workers=0, loop=loop)
    accelerator = make_accelerator("fp32", CPU)
    monkeypatch.setattr(reader, "VALIDATION_SCENES", 20)
    whole = reader.train_reader(config, tmp_path / "whole", accelerator, sticker_sheets)
    half = config.model_copy(update={"loop": loop.model_copy(update={"steps": 1})})
    reader.train_reader(half, tmp_path / "halves", accelerator, sticker_sheets)
    resumed = reader.train_reader(config, tmp_path / "halves", accelerator, sticker_sheets)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    reader.save_reader(whole, tmp_path / "saved")
    again = reader.load_reader(tmp_path / "saved")
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(pictures)["heat"], whole(pictures)["heat"], rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------------------- teacher

BUNDLED = Path(__file__).resolve().parents[2] / "world" / "teacher"


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "trimmed"
    trim_text(BUNDLED, folder, phrases(), teacher.TOKENS)
    return folder


def test_a_trimmed_text_encoder_has_the_same_states(trimmed: Path) -> None:
    prompts = [training_prompt(scene, 0, index) for index, scene in enumerate(make_scenes(0, range(60)))]
    texts = ["", *(prompt.text for prompt in prompts if prompt)]
    states, pieces = [], []
    for folder in (BUNDLED, trimmed):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        tokenizer.model_max_length = teacher.TOKENS
        encoder = BertModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32)
        states.append(encode_text(tokenizer, encoder.eval(), texts, CPU))
        pieces.append(len(tokenizer))
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-3)
    assert pieces[1] < pieces[0] / 10
    assert tokenizer.unk_token not in tokenizer.tokenize("a unicorn")


def test_few_prompts_are_longer_than_the_text_encoder_reads(trimmed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trimmed / "tokenizer", local_files_only=True)
    prompts = [training_prompt(scene, 0, index) for index, scene in enumerate(make_scenes(0, range(1000)))]
    assert sum(len(tokenizer(p.text).input_ids) > teacher.TOKENS for p in prompts if p) <= 5


def test_a_teacher_is_resumed_exactly_and_is_a_pipeline(sticker_sheets: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make_vae(TINY).save_pretrained(tmp_path / "vae")
    loop = LoopConfig(steps=2, batch=2, save_every=1, log_every=1)
    config = TeacherConfig(
        autoencoder=str(tmp_path / "vae"),
        channels=(8, 16, 16),
        groups=4,
        heads=2,
        workers=0,
        validation_prompts=0,
        loop=loop,
    )
    accelerator = make_accelerator("fp32", CPU)
    teacher.train_teacher(config, tmp_path / "run", tmp_path / "whole", accelerator, sticker_sheets)
    half = config.model_copy(update={"loop": loop.model_copy(update={"steps": 1})})
    teacher.train_teacher(half, tmp_path / "halves", tmp_path / "half", accelerator, sticker_sheets)
    teacher.train_teacher(config, tmp_path / "halves", tmp_path / "resumed", accelerator, sticker_sheets)
    weights = [load_file(tmp_path / run / "unet" / WEIGHTS) for run in ("whole", "resumed", "half")]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name
    assert any(not torch.equal(weights[2][name], tensor) for name, tensor in weights[0].items())

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    encoders = teacher.Encoders(pipeline.vae, tmp_path / "run" / "text", CPU)
    prompts = ["three frogs on yellow", "a rocket"]
    noise = np.stack([generator(5, "stickers sample", i).standard_normal((4, 16, 16)) for i in range(2)])
    wanted = pipeline(
        prompts, num_inference_steps=3, guidance_scale=3.0, latents=torch.from_numpy(noise).float(), output_type="np"
    ).images
    found = teacher.draw(pipeline.unet, encoders, prompts, steps=3, omega=2.0, seed=5)
    np.testing.assert_allclose(found / 255, wanted, atol=0.01)


def test_scene_accuracy_counts_pictures_whose_every_stated_fact_is_found() -> None:
    facts = Facts((("frog", 10.0, 10.0), ("star", 50.0, 12.0)), "blue", "dots", "noto")
    frog_and_star = (("frog", 1), ("star", 1))
    claims = [
        Claim(frog_and_star, "left"),
        Claim(frog_and_star, "right"),
        Claim(frog_and_star, colour="blue", style="fluent"),
        Claim((("frog", 1),), colour="blue"),
    ]
    shares = accuracy.scene_accuracy([facts] * 4, claims)
    assert {name: (share.right, share.n) for name, share in shares.items()} == {
        "all": (1, 4), "relation": (1, 2), "two": (0, 1), "single": (0, 1), "fact concepts": (3, 4),
        "fact count": (4, 4), "fact relation": (1, 2), "fact colour": (2, 2), "fact style": (0, 1),
    }  # fmt: skip


def test_intervals_are_wilsons() -> None:
    for right, n in ((0, 20), (19, 20), (20, 20), (970, 1000)):
        found = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
        assert accuracy.Share(right, n).interval == pytest.approx((found.low, found.high), abs=1e-6)


def test_a_reader_is_reported_under_every_condition(sticker_sheets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is right on undamaged scenes and finds another scene in all others."""
    scenes = {name: make_scenes(REFERENCE_SEED, range(6), name) for name in ("train", *KINDS)}
    known = {draw_scenes(REFERENCE_SEED, range(6), name, sticker_sheets).tobytes(): of for name, of in scenes.items()}

    def read(_: object, pictures: np.ndarray) -> list[Facts]:
        return [facts_of(scene) for scene in known.get(pictures.tobytes(), scenes["pair"])]

    monkeypatch.setattr(reader_report, "read_pictures", read)
    vae = make_vae(TINY).eval()
    rows = reader_report.reader_report(reader.Reader(ReaderConfig()), 6, vae, sticker_sheets)
    right = {name: shares["all"].right for name, shares in rows.items()}
    assert [right.pop(name) for name in ("blurred", "noised", "autoencoded")] == [0, 0, 0]
    assert list(right.values()) == [6] * (1 + len(KINDS))
    assert len(accuracy.as_table(rows).splitlines()) == 2 + len(rows)


def test_a_teacher_is_validated_on_unseen_prompts(
    trimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Judge:
        def __init__(self, *_: object) -> None:
            self.fd = lambda pictures: float(pictures.shape[0])

        def __call__(self, _: object) -> dict[str, float]:
            return {"psnr": 30.0}

    monkeypatch.setattr(teacher, "AutoencoderMetrics", Judge)
    reader.save_reader(reader.Reader(ReaderConfig(channels=(8, 8, 8))), tmp_path / "reader")
    config = TeacherConfig(
        channels=(8, 16), groups=4, validation_prompts=500, validation_steps=1, reader=str(tmp_path / "reader")
    )
    encoders = teacher.Encoders(make_vae(TINY).eval(), trimmed, CPU)
    metrics = teacher.TeacherMetrics(config, encoders, tmp_path, None, make_accelerator("fp32", CPU))
    figures = metrics(make_unet(config, 4, 16, 384, plain=1).eval())
    assert figures["fd"] == 500
    assert figures["autoencoder_psnr"] == 30
    assert figures["accuracy all"] == 0  # an untrained reader finds no sticker
    assert figures["accuracy fact concepts"] == 0


def test_a_teacher_is_reported_by_steps_and_guidance(
    trimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of each distribution are compared with those of the first, from other noise."""
    config = TeacherConfig(channels=(8, 16), groups=4)
    vae = make_vae(TINY).eval()
    write_teacher(tmp_path / "pipeline", vae, make_unet(config, 4, 16, 384, plain=1).eval(), trimmed, omega=2.0)

    class Judge:
        features = staticmethod(lambda pictures: pictures.astype(float))
        distance = SimpleNamespace(distance=lambda ours, first: float(np.abs(ours - first).mean()))

        def __init__(self, *_: object, **__: object) -> None:
            self.fd = lambda pictures: float(pictures.shape[0])

    monkeypatch.setattr(teacher_report, "AutoencoderMetrics", Judge)
    settings = [teacher_report.SamplingSettings(2, 0.0), teacher_report.SamplingSettings(1, 1.5)]
    rows = teacher_report.teacher_report(tmp_path / "pipeline", reader.Reader(ReaderConfig()).eval(), settings, 3)
    assert list(rows) == ["open, 2 steps, omega 0", "open, 1 steps, omega 1.5"]
    assert all(row.fd_real == 3 and row.shares["all"].n == 3 for row in rows.values())
    assert rows["open, 2 steps, omega 0"].fd_first > 0


def test_a_teacher_without_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text"):
        trim_text(tmp_path, tmp_path / "trimmed", [], 28)
    config = TeacherConfig(autoencoder=str(tmp_path))
    with pytest.raises(UserError, match="autoencoder"):
        teacher.train_teacher(config, tmp_path / "run", tmp_path / "new", make_accelerator("fp32", CPU))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["autoencoder", "-s", "chanels=[8]"], "chanels"),
        (["reader", "-s", "noise=-1"], "noise"),
        (["reward", "-s", "width=10"], "width"),
        (["autoencoder", "-s", "groups=7"], "groups"),
        (["teacher", "--target", "new", "-s", "validation_prompts=20"], "validation_prompts"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], field: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewstep_worlds.stickers", *arguments]
    source = str(SOURCES.parent)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert done.returncode == 2
    assert field in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_settings_of_earlier_runs_are_read_by_their_old_names() -> None:
    config = validate(TeacherConfig, {"watched": 600, "watch_steps": 10})
    assert (config.validation_prompts, config.validation_steps) == (600, 10)
