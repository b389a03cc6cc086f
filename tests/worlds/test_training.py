"""Training of sticker scenes' networks: losses in closed form, folded statistics, shards, runs resumed exactly."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.backbones.autoencoder import encode_pictures
from fewstep.backbones.base import load_backbone
from fewstep.commands import app
from fewstep.common.accelerator import make_accelerator
from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng, generator
from fewstep.diffusion.schedule import VariancePreserving, scaled_linear
from fewstep.evaluation.lite0 import make_lite0
from fewstep.evaluation.lite0_weights import load_weights
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep_worlds.common import denoiser, pipeline
from fewstep_worlds.common.autoencoder import (
    fold_statistics,
    make_vae,
    psnr,
    reconstruct,
    restore,
    to_tensor,
)
from fewstep_worlds.common.location import root
from fewstep_worlds.common.settings import UnetShape
from fewstep_worlds.stickers import autoencoder, reader, teacher, teacher_report
from fewstep_worlds.stickers.claim import check, facts_of, full_claim
from fewstep_worlds.stickers.dataset import SceneWorkers, draw_scenes, make_scenes
from fewstep_worlds.stickers.scene import Scene
from fewstep_worlds.stickers.settings import AutoencoderConfig, TeacherConfig
from support.sticker_world import TINY_READER, tiny_reader

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = AutoencoderConfig(
    channels=(8, 8, 8),
    critic_channels=(8, 8),
    critic_from=1,
    workers=0,
    loop=LoopConfig(steps=4, batch=2, save_every=2, log_every=1),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pictures(n: int, seed: int = 0) -> np.ndarray:
    """Coarse colours, so that an untrained encoder distinguishes them."""
    cells = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return cells.repeat(16, axis=1).repeat(16, axis=2)


def tiny_vae(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make_vae(TINY).eval()


def tiny_unet() -> Any:
    torch.manual_seed(6)
    return denoiser.make_unet(UnetShape(channels=(16, 32), heads=2, groups=8), 4, 16, 32)


# ------------------------------------------------------------------------------------ the denoiser's loss


class Answering:
    """A network that is off by `error` from the true noise, and records its inputs."""

    def __init__(self, eps: Tensor, error: Tensor) -> None:
        self.answer = (eps + error).requires_grad_(True)
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.given.append((x, t, states))
        return (self.answer,)


def alpha_bars() -> np.ndarray:
    """Stable Diffusion's table, in numpy."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_the_true_noise_has_zero_loss_and_the_network_is_called_at_x_t() -> None:
    x_0, eps = torch.randn(3, 4, 8, 8, generator=seeded(0)), torch.randn(3, 4, 8, 8, generator=seeded(1))
    states, t = torch.randn(3, 5, 32, generator=seeded(2)), torch.tensor([0, 400, 999])
    network = Answering(eps, torch.zeros(3, 1, 1, 1))
    loss = denoiser.eps_loss(network, scaled_linear(), x_0, states, t, eps, 0.5)
    assert loss.value.item() == 0
    ((x_t, given_t, given_states),) = network.given
    abar = torch.from_numpy(alpha_bars())[t].view(3, 1, 1, 1)
    torch.testing.assert_close(x_t.double(), abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, rtol=0, atol=1e-6)
    assert torch.equal(given_t, t)
    assert torch.equal(given_states, states)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_an_error_costs_a_power_of_its_snr(power: float) -> None:
    """Loss = mean of SNR^-power * d^2; t = 120 has SNR 15, t = 400 1.1, t = 999 .005."""
    t, d = torch.tensor([0, 120, 400, 999]), torch.tensor([0.5, -1.0, 2.0, 3.0])
    eps = torch.randn(4, 4, 8, 8, generator=seeded(1))
    network = Answering(eps, d.view(4, 1, 1, 1).expand_as(eps))
    x_0, states = torch.randn(4, 4, 8, 8, generator=seeded(0)), torch.zeros(4, 5, 32)
    loss = denoiser.eps_loss(network, scaled_linear(), x_0, states, t, eps, power)
    abar = alpha_bars()[t.numpy()]
    snr = abar / (1 - abar)
    weight = snr**-power
    assert loss.value.item() == pytest.approx(float(np.mean(weight * d.numpy() ** 2)), rel=1e-5)
    assert loss.per_sample is not None
    assert loss.per_sample.tolist() == pytest.approx((d**2).tolist(), rel=1e-5), "reported without the weight"
    loss.value.backward()
    assert network.answer.grad is not None
    # d/d answer of the mean over 4 samples of 256 numbers
    slope = network.answer.grad.mean((1, 2, 3)) * 4 * 256
    assert slope.tolist() == pytest.approx((2 * weight * d.numpy()).tolist(), rel=1e-4)


def test_times_are_reported_as_shares_above_0_up_to_1() -> None:
    """On another path, too: T is the path's, not 1000."""
    eps = torch.zeros(3, 4, 8, 8)
    for total in (1000, 50):
        path = VariancePreserving.from_betas(torch.full((total,), 0.02))
        t = torch.tensor([0, total // 2 - 1, total - 1])
        loss = denoiser.eps_loss(Answering(eps, eps), path, eps, torch.zeros(3, 5, 32), t, eps, 0.5)
        assert loss.t is not None
        assert loss.t.tolist() == pytest.approx([1 / total, 0.5, 1.0])


# ---------------------------------------------------------------------------------------------------- autoencoder


class Offset:
    """An autoencoder of pictures as latents: what it restores is off by a number."""

    device = CPU

    def __init__(self, off: Callable[[Tensor], Tensor], mean: float = 0.0, logvar: float = 0.0) -> None:
        self.off, self.mean, self.logvar = off, mean, logvar
        self.decoded: list[Tensor] = []

    def encode(self, x: Tensor) -> Any:
        self.seen = x
        mean, logvar = torch.full((len(x), 4, 8, 8), self.mean), torch.full((len(x), 4, 8, 8), self.logvar)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=logvar))

    def decode(self, z: Tensor) -> Any:
        self.decoded.append(z)
        return SimpleNamespace(sample=self.off(self.seen))


def test_pictures_are_restored_from_a_sample_of_their_posterior() -> None:
    pictures = torch.rand(6, 3, 64, 64, generator=seeded(3))
    vae = Offset(lambda x: x - 0.25, mean=1.5, logvar=-2.0)
    restored, kl = reconstruct(vae, pictures, KeyedRng(5, 2, tuple(range(6))))
    torch.testing.assert_close(restored, pictures - 0.25)
    assert kl.item() == pytest.approx(0.5 * (1.5**2 + np.exp(-2.0) - 1 + 2), rel=1e-5)
    (z,) = vae.decoded
    noise = (z - 1.5) / np.exp(-1.0)
    assert abs(float(noise.mean())) < 0.1, "1536 numbers: six standard errors are .15"
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert len({float(row.sum()) for row in noise}) == 6, "every picture has noise of its own"


def test_psnr_is_the_mean_over_pictures_of_8_bit_errors() -> None:
    """Off by k of 255 everywhere: 20 log10(255/k) dB; whites cannot be overshot, and exact ones count 78 dB."""
    levels = {60: 1, 100: 4, 140: 10, 255: 9}
    pictures = np.stack([np.full((64, 64, 3), level, np.uint8) for level in levels])

    def off(x: Tensor) -> Tensor:
        shift = [levels[round(float(picture.mean()) * 127.5 + 127.5)] for picture in x]
        return x + (torch.tensor(shift).view(-1, 1, 1, 1) + 0.3) / 127.5  # a third of a level is rounded away

    found = psnr(restore(Offset(off), pictures), pictures).mean()
    exact = 10 * np.log10(255.0**2 / 1e-3)
    assert found == pytest.approx(np.mean([*(20 * np.log10(255 / k) for k in (1, 4, 10)), exact]), abs=1e-3)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_decoder_learns_and_a_given_encoder_stays(sticker_sheets: Path, tmp_path: Path) -> None:
    given = tiny_vae()
    given.save_pretrained(tmp_path / "given")
    loop, optim = LoopConfig(steps=30, batch=8, save_every=30), OptimConfig(lr=3e-3)
    words = {
        "autoencoder": str(tmp_path / "given"),
        "decoder_only": True,
        "critic_share": 0.0,
        "perceptual": 0.0,
        "loop": loop,
        "optim": optim,
    }
    config = TINY.model_copy(update=words)
    accelerator = make_accelerator("fp32", CPU)
    trained = autoencoder.train_autoencoder(config, tmp_path / "run", accelerator, sticker_sheets)
    for name, tensor in trained.state_dict().items():
        stays = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(tensor, given.state_dict()[name]) == stays, name
    pictures = draw_scenes(9, range(30), folder=sticker_sheets)
    before, after = (psnr(restore(vae, pictures), pictures).mean() for vae in (given, trained))
    assert after > before + 1


# ------------------------------------------------------------------------------------- folded statistics


def lively_vae() -> Any:
    """Latent channels of very different mean and spread, as a trained encoder's are."""
    vae = tiny_vae(4)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor([20.0, 1.0, 100.0, 5.0]).view(4, 1, 1, 1)
        vae.quant_conv.bias[:4] += torch.tensor([3.0, -1.0, 0.0, 10.0])
        vae.quant_conv.bias[4:] -= 3
        vae.post_quant_conv.bias += torch.tensor([0.5, 0.0, -0.5, 0.1])
    return vae


@torch.no_grad()
def test_folding_normalises_latents_and_leaves_reconstructions() -> None:
    pictures = random_pictures(30)
    before = lively_vae()
    after = copy.deepcopy(before)
    fold_statistics(after, pictures, batch=7)  # the last part is a rest of 2
    raw, latents = encode_pictures(before, pictures, CPU).double(), encode_pictures(after, pictures, CPU).double()
    std, mean = torch.std_mean(raw, dim=(0, 2, 3), correction=0)
    assert float(std.max() / std.min()) > 3, "something to fold"
    assert float(mean.abs().max()) > 1
    folded_std, folded_mean = torch.std_mean(latents, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(folded_mean, torch.zeros(4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(folded_std, torch.ones(4).double(), rtol=0, atol=1e-3)
    # the whole map, not only its two moments
    expected = (raw - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-3)

    x, noise = to_tensor(pictures[:6]), torch.randn(6, 4, 16, 16, generator=seeded(5))
    restored = []
    for vae in (before, after):
        posterior = vae.encode(x).latent_dist
        sampled = posterior.mean + posterior.std * noise
        restored.append((vae.decode(posterior.mean).sample, vae.decode(sampled).sample, posterior.std))
    for theirs, ours in zip(restored[0][:2], restored[1][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    moved = float((restored[0][1] - restored[0][0]).abs().max())
    assert moved > 1e-2 * float(restored[0][0].abs().max()), "the posterior's noise is there to be seen"
    torch.testing.assert_close(restored[1][2], restored[0][2] / std.float().view(1, 4, 1, 1), rtol=1e-3, atol=0)


def test_a_saved_pipeline_hands_out_normalised_latents(tiny_pipeline: Path, tmp_path: Path) -> None:
    """What a distillation later reads from the folder, fp16 and scaling factor included."""
    pictures = random_pictures(30)
    vae = lively_vae()
    fold_statistics(vae, pictures)
    pipeline.write_teacher(tmp_path / "teacher", vae, tiny_unet(), tiny_pipeline, 2.0)
    backbone = load_backbone(tmp_path / "teacher")
    std, mean = torch.std_mean(backbone.to_latents(pictures), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("limit", [50_000, 120_000, 14 * 2**20])
def test_diffusers_loads_the_shards_that_are_written(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(pipeline, "SHARD_BYTES", limit)
    unet = tiny_unet()
    pipeline.save_sharded(tmp_path, unet)
    loaded, report = UNet2DConditionModel.from_pretrained(
        tmp_path, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    expected, found = unet.state_dict(), loaded.state_dict()
    assert set(expected) == set(found)
    for name, value in expected.items():
        assert torch.equal(found[name], value.half().float()), name
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    total = sum(2 * value.numel() for value in expected.values())
    assert sum(sizes) == total, "no tensor twice"
    assert max(sizes) <= limit
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    if total <= limit:
        assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
        assert not index.exists()
    else:
        assert len(files) >= total / limit > 1
        assert min(sizes) > 0, "an empty shard"
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_a_tensor_above_the_limit_gets_a_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are not cut; no file is empty, wherever the large one is."""
    unet = tiny_unet()
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 1000)
    assert next(iter(unet.state_dict().values())).numel() * 2 > 1000, "the first tensor is above it"
    pipeline.save_sharded(tmp_path, unet)
    for file in tmp_path.glob("*.safetensors"):
        tensors = list(load_file(file).values())
        assert len(tensors) == 1 or 0 < sum(tensor.nbytes for tensor in tensors) <= 1000


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
    assert spread.sum().item() == pytest.approx(1, abs=5e-4), "1,089 roundings of numbers near -1"
    assert (spread.sum(0) * offsets**2).sum().item() == pytest.approx(1.1**2, rel=0.01)
    noised = reader.damage(torch.zeros(2, 3, 33, 33), none, torch.tensor([0.0, 0.2]), noise)
    assert noised.flatten(1).std(1).tolist() == pytest.approx([0, 0.2], abs=0.01)


@pytest.mark.slow
def test_a_reader_is_resumed_exactly_and_saved(
    sticker_sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = LoopConfig(steps=2, batch=2, save_every=1, log_every=1, validate_every=2)
    config = TINY_READER.model_copy(update={"workers": 0, "loop": loop})
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


@pytest.mark.slow
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
    file = Path("text_encoder") / "model.safetensors"
    texts = [load_file(tmp_path / run / file) for run in ("whole", "resumed", "run/text")]
    for name, tensor in texts[0].items():
        assert torch.equal(texts[1][name], tensor), name
        if not name.startswith("encoder.layer"):
            assert torch.equal(texts[2][name], tensor), name
        elif name.endswith("query.weight"):
            assert not torch.equal(texts[2][name], tensor), name

    frozen = config.model_copy(update={"train_text": False})
    teacher.train_teacher(frozen, tmp_path / "run-frozen", tmp_path / "frozen", accelerator, sticker_sheets)
    for name, tensor in load_file(tmp_path / "frozen" / file).items():
        assert torch.equal(texts[2][name], tensor), name

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    encoders = teacher.Encoders(pipe.vae, tmp_path / "whole", CPU)
    prompts = ["three frogs on yellow", "a rocket"]
    noise = np.stack([generator(5, "stickers sample", i).standard_normal((4, 16, 16)) for i in range(2)])
    wanted = pipe(
        prompts, num_inference_steps=3, guidance_scale=3.0, latents=torch.from_numpy(noise).float(), output_type="np"
    ).images
    found = teacher.draw(pipe.unet, encoders, prompts, steps=3, omega=2.0, seed=5)
    np.testing.assert_allclose(found / 255, wanted, atol=0.01)


@pytest.mark.slow
def test_a_teacher_goes_on_from_another_ones_weights(
    sticker_sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    captioned = SceneWorkers.captioned

    def recorded(self: SceneWorkers, indices: Any) -> Any:
        seen.extend(indices)
        return captioned(self, indices)

    batches: list[list[Any]] = []
    eps_loss = teacher.eps_loss

    def recorded_loss(*args: Any) -> Any:
        batches.append([args[number].detach() for number in (2, 4, 5)])
        return eps_loss(*args)

    monkeypatch.setattr(SceneWorkers, "captioned", recorded)
    monkeypatch.setattr(teacher, "eps_loss", recorded_loss)
    tiny_vae().save_pretrained(tmp_path / "vae")
    words = {"autoencoder": str(tmp_path / "vae"), "workers": 0, "validation_prompts": 0, "first_scene": 70}
    loop, optim = LoopConfig(steps=1, batch=4), OptimConfig(lr=1e-12)
    shape = {"channels": (8, 16), "heads": 2, "groups": 4}
    config = TeacherConfig.model_validate(
        {**words, **shape, "unet": str(tmp_path / "unet"), "loop": loop, "optim": optim}
    )
    torch.manual_seed(9)
    given = denoiser.make_unet(config, 4, 16, 384, plain=1)
    given.save_pretrained(tmp_path / "unet")
    accelerator = make_accelerator("fp32", CPU)
    teacher.train_teacher(config, tmp_path / "run", tmp_path / "new", accelerator, sticker_sheets)
    assert seen == [70, 71]
    ((latents, t, eps),) = batches  # each scene twice, at two noise levels
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])
    assert len(set(t.tolist())) == 4
    assert not torch.equal(eps[0], eps[1])
    for name, tensor in load_file(tmp_path / "new" / "unet" / WEIGHTS).items():
        torch.testing.assert_close(tensor.float(), given.state_dict()[name], rtol=1e-3, atol=1e-6)
    other = config.model_copy(update={"channels": (8, 8)})
    with pytest.raises(UserError, match="another shape"):
        teacher.train_teacher(other, tmp_path / "other", tmp_path / "none", accelerator, sticker_sheets)


@pytest.mark.slow
def test_a_teacher_is_validated_on_unseen_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Judge:
        def __init__(self, *_: object) -> None:
            self.fd = lambda pictures: float(pictures.shape[0])

        def __call__(self, _: object) -> dict[str, float]:
            return {"psnr": 30.0}

    monkeypatch.setattr(teacher, "AutoencoderMetrics", Judge)
    reader.save_reader(tiny_reader(), tmp_path / "reader")
    config = TeacherConfig(
        channels=(8, 16), groups=4, validation_prompts=500, validation_steps=1, reader=str(tmp_path / "reader")
    )
    encoders = teacher.Encoders(make_vae(TINY).eval(), root() / "teacher", CPU)
    metrics = teacher.TeacherMetrics(config, encoders, tmp_path, None, make_accelerator("fp32", CPU))
    figures = metrics(denoiser.make_unet(config, 4, 16, 384, plain=1).eval(), encoders)
    assert figures["fd"] == 500
    assert figures["autoencoder_psnr"] == 30
    assert figures["accuracy all"] == 0  # an untrained reader finds no sticker
    assert figures["accuracy fact concepts"] == 0


@pytest.mark.slow
def test_a_teacher_is_reported_by_steps_and_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of each distribution are compared with those of the first, from other noise."""
    config = TeacherConfig(channels=(8, 16), groups=4)
    vae = make_vae(TINY).eval()
    pipeline.write_teacher(
        tmp_path / "pipeline",
        vae,
        denoiser.make_unet(config, 4, 16, 384, plain=1).eval(),
        root() / "teacher",
        omega=2.0,
    )

    class Judge:
        features = staticmethod(lambda pictures: pictures.astype(float))
        distance = SimpleNamespace(distance=lambda ours, first: float(np.abs(ours - first).mean()))

        def __init__(self, *_: object, **__: object) -> None:
            self.fd = lambda pictures: float(pictures.shape[0])

    monkeypatch.setattr(teacher_report, "AutoencoderMetrics", Judge)
    settings = [teacher_report.SamplingSettings(2, 0.0), teacher_report.SamplingSettings(1, 1.5)]
    rows = teacher_report.teacher_report(tmp_path / "pipeline", tiny_reader(), settings, 3)
    assert list(rows) == ["open, 2 steps, omega 0", "open, 1 steps, omega 1.5"]
    assert all(row.fd_real == 3 and row.shares["all"].n == 3 for row in rows.values())
    assert rows["open, 2 steps, omega 0"].fd_first > 0


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
def test_wrong_settings_are_refused_before_a_training(
    arguments: list[str],
    field: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        app.main(["world", "stickers", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert field in line
    assert not any(tmp_path.iterdir())


def test_settings_of_earlier_runs_are_read_by_their_old_names() -> None:
    config = validate(TeacherConfig, {"watched": 600, "watch_steps": 10})
    assert (config.validation_prompts, config.validation_steps) == (600, 10)
