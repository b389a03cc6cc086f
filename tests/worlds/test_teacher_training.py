"""Training of the bundled teacher: losses in closed form, folded statistics, shards that diffusers reads, resuming."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.backbones.autoencoder import encode_pictures
from fewstep.backbones.base import load_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.accelerator import make_accelerator
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.data.images import Captioned, HeldPictures
from fewstep.diffusion.config import TEACHER_SAMPLING
from fewstep.diffusion.schedule import VariancePreserving, scaled_linear
from fewstep.training.config import LoopConfig, OptimConfig
from fewstep.training.loss import Loss
from fewstep_worlds.common import autoencoder, denoiser, pipeline
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import DecoderConfig, TeacherConfig, UnetConfig, VaeConfig
from fewstep_worlds.emoji8.teacher import decoder as train_decoder
from fewstep_worlds.emoji8.teacher import train as teacher
from fewstep_worlds.emoji8.teacher import unet as train_unet
from fewstep_worlds.emoji8.teacher import vae as train_vae
from support.shapes import COLOURS, SHAPES, draw_shape

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY_VAE = VaeConfig(channels=(8, 8, 8, 8), groups=4, latent_channels=4)
TINY_UNET = UnetConfig(channels=(16, 32), heads=2, groups=8, latent_channels=4, text_width=32, captions=2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pictures(n: int, seed: int = 0) -> np.ndarray:
    """Coarse colours, so that an untrained encoder distinguishes them."""
    cells = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return cells.repeat(16, axis=1).repeat(16, axis=2)


def shapes() -> np.ndarray:
    return np.stack([draw_shape(colour, shape) for colour in COLOURS for shape in SHAPES])


def tiny_vae(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return autoencoder.make_vae(TINY_VAE).eval()


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
    loss = denoiser.eps_loss(network, scaled_linear(), x_0, states, t, eps, 5.0)
    assert loss.value.item() == 0
    ((x_t, given_t, given_states),) = network.given
    abar = torch.from_numpy(alpha_bars())[t].view(3, 1, 1, 1)
    torch.testing.assert_close(x_t.double(), abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, rtol=0, atol=1e-6)
    assert torch.equal(given_t, t)
    assert torch.equal(given_states, states)


@pytest.mark.parametrize("gamma", [0.3, 5.0, 1e9])
def test_an_error_costs_its_min_snr_weight(gamma: float) -> None:
    """Loss = mean of min(SNR, gamma)/SNR * d^2; t = 120 has SNR 15, t = 400 1.1, t = 999 .005."""
    t, d = torch.tensor([0, 120, 400, 999]), torch.tensor([0.5, -1.0, 2.0, 3.0])
    eps = torch.randn(4, 4, 8, 8, generator=seeded(1))
    network = Answering(eps, d.view(4, 1, 1, 1).expand_as(eps))
    x_0, states = torch.randn(4, 4, 8, 8, generator=seeded(0)), torch.zeros(4, 5, 32)
    loss = denoiser.eps_loss(network, scaled_linear(), x_0, states, t, eps, gamma)
    abar = alpha_bars()[t.numpy()]
    snr = abar / (1 - abar)
    weight = np.minimum(snr, gamma) / snr
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
        loss = denoiser.eps_loss(Answering(eps, eps), path, eps, torch.zeros(3, 5, 32), t, eps, 5.0)
        assert loss.t is not None
        assert loss.t.tolist() == pytest.approx([1 / total, 0.5, 1.0])


# ------------------------------------------------------------------------------- the autoencoder's figures


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


def test_vae_loss_is_its_three_terms() -> None:
    pictures = torch.rand(6, 3, 64, 64, generator=seeded(3))
    vae = Offset(lambda x: x - 0.25, mean=1.5, logvar=-2.0)
    config = TINY_VAE.model_copy(update={"beta": 0.01, "l1": 0.3})
    rng = KeyedRng(5, 2, tuple(range(6)))
    loss = train_vae.vae_loss(vae, config, pictures, rng)
    kl = 0.5 * (1.5**2 + np.exp(-2.0) - 1 + 2)
    assert loss.value.item() == pytest.approx(0.25**2 + 0.3 * 0.25 + 0.01 * kl, rel=1e-5)
    assert loss.scalars["mse"].item() == pytest.approx(0.25**2, rel=1e-5)
    assert loss.scalars["kl"].item() == pytest.approx(kl, rel=1e-5)
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

    found = autoencoder.reconstruction_psnr(Offset(off), pictures)
    exact = 10 * np.log10(255.0**2 / 1e-3)
    assert found == pytest.approx(np.mean([*(20 * np.log10(255 / k) for k in (1, 4, 10)), exact]), abs=1e-3)


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
    autoencoder.fold_statistics(after, pictures, batch=7)  # the last part is a rest of 2
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

    x, noise = autoencoder.to_tensor(pictures[:6]), torch.randn(6, 4, 8, 8, generator=seeded(5))
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
    autoencoder.fold_statistics(vae, pictures)
    pipeline.write_teacher(tmp_path / "teacher", vae, train_unet.make_unet(TINY_UNET), tiny_pipeline, 2.0)
    backbone = load_backbone(tmp_path / "teacher")
    std, mean = torch.std_mean(backbone.to_latents(pictures), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------ shards


def tiny_unet(seed: int = 6) -> Any:
    torch.manual_seed(seed)
    return train_unet.make_unet(TINY_UNET)


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


# ---------------------------------------------------------------------------------------- whole trainings


class StopError(Exception):
    """A training that is cut short."""


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def figures(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


class ToyEncoders:
    """Colours of 8x8 cells as latents, letters as text states."""

    calls = 0
    prompts_at_once = 256

    def pictures_at_once(self, pixels: int) -> int:
        return 128

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        self.calls += 1
        cells = torch.from_numpy(np.array(pictures)).float().unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean((2, 4))
        return torch.cat([cells, cells.mean(-1, keepdim=True)], -1).permute(0, 3, 1, 2) / 127.5 - 1

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = [[(ord(letter) % 32) / 16 - 1 for letter in f"{prompt:<160}"[:160]] for prompt in prompts]
        return {"text": torch.tensor(rows).view(-1, 5, 32)}

    def null(self, count: int) -> dict[str, Tensor]:
        return self.encode([""] * count)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 pictures to learn from and 4 held out, instead of Emoji-8's thousands."""
    pictures = shapes()
    captions = [[f"a {colour} {shape}", shape] for colour in COLOURS for shape in SHAPES]
    heldout = SimpleNamespace(pictures=pictures[::4], records=emoji8.load_records("heldout-pair")[:4])
    monkeypatch.setattr(emoji8, "captioned", lambda count, seed: Captioned(HeldPictures(pictures), captions))
    monkeypatch.setattr(emoji8, "load", lambda split: heldout)


@pytest.mark.usefixtures("small_world")
def test_a_resumed_denoiser_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in step 4, after the checkpoint of step 2: every file and figure; what is returned is the average."""
    loop = LoopConfig(steps=5, batch=4, save_every=2, validate_every=3, log_every=1, precision="bf16")
    optim = OptimConfig(lr=1e-2, warmup=2, decay="cooldown", ema=0.8, weight_decay=0.01)
    config = TINY_UNET.model_copy(update={"loop": loop, "optim": optim})
    plain = train_unet.eps_loss

    def run(folder: Path, steps: int | None = None) -> Any:
        done = 0

        def counting(*args: Any) -> Loss:
            nonlocal done
            if torch.is_grad_enabled():  # not the watch
                if done == steps:
                    raise StopError
                done += 1
            return plain(*args)

        monkeypatch.setattr(train_unet, "eps_loss", counting)
        return train_unet.train_unet(config, ToyEncoders(), "toy", folder, make_accelerator("bf16", CPU))

    whole = run(tmp_path / "whole")
    with pytest.raises(StopError):
        run(tmp_path / "cut", 3)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    resumed = run(tmp_path / "cut")
    last = "checkpoints/step-00000005"
    same_files(tmp_path / "whole" / last, tmp_path / "cut" / last)
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")
    watched = [line["eps_mse_heldout_pairs"] for line in figures(tmp_path / "whole") if "eps_mse_heldout_pairs" in line]
    assert len(watched) == 2
    assert watched[1] != watched[0] > 0
    average, trained = (load_file(tmp_path / "whole" / last / f"unet{kind}.safetensors") for kind in (".ema", ""))
    for network in (whole, resumed):
        assert not network.training
        for name, value in network.state_dict().items():
            assert torch.equal(value, average[name]), name
    assert any(not torch.equal(average[name], trained[name]) for name in average)


@pytest.mark.usefixtures("small_world")
def test_latents_are_encoded_once_and_again_for_other_weights(tmp_path: Path) -> None:
    """2 calls of a first training: the training pictures and the held-out ones."""
    loop = LoopConfig(steps=1, batch=2, precision="fp32")
    config = TINY_UNET.model_copy(update={"loop": loop})
    calls = []
    for fingerprint in ("weights", "weights", "other weights"):
        encoders = ToyEncoders()
        folder = tmp_path / fingerprint
        train_unet.train_unet(config, encoders, fingerprint, folder, make_accelerator("fp32", CPU))
        calls.append(encoders.calls)
    assert calls == [2, 1, 2]


def test_a_resumed_autoencoder_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns, its latents are normalised once and not twice, and it comes back from its run folder."""
    pictures = shapes()
    loop = LoopConfig(steps=8, batch=4, save_every=3, validate_every=4, log_every=1, precision="fp32")
    optim = OptimConfig(lr=1e-2, warmup=1, decay="cosine", ema=0.5)
    config = TINY_VAE.model_copy(update={"loop": loop, "optim": optim})
    plain = train_vae.vae_loss

    def stopping(vae: Any, config: VaeConfig, pictures: Tensor, rng: KeyedRng) -> Loss:
        if rng.step == 5:
            raise StopError
        return plain(vae, config, pictures, rng)

    def run(folder: Path) -> Any:
        return train_vae.train_vae(config, pictures, pictures[::4], folder, make_accelerator("fp32", CPU))

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(train_vae, "vae_loss", stopping)
        with pytest.raises(StopError):
            run(tmp_path / "cut")
    resumed, again = run(tmp_path / "cut"), run(tmp_path / "cut")
    same_files(tmp_path / "whole" / "checkpoints/step-00000008", tmp_path / "cut" / "checkpoints/step-00000008")
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), name
    std, mean = torch.std_mean(encode_pictures(whole, pictures, CPU), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-3)
    start = autoencoder.reconstruction_psnr(tiny_vae(loop.seed), pictures)
    assert autoencoder.reconstruction_psnr(whole, pictures) > start + 2, "dB"
    watched = [line["psnr_heldout"] for line in figures(tmp_path / "whole") if "psnr_heldout" in line]
    assert watched[-1] == pytest.approx(autoencoder.reconstruction_psnr(whole, pictures[::4]), abs=0.01)

    assert teacher.finished_vae(tmp_path / "none") is None
    teacher.save_vae(whole, tmp_path / "kept")
    kept = teacher.finished_vae(tmp_path / "kept")
    assert kept is not None
    assert not kept.training
    latents = encode_pictures(whole, pictures, CPU)
    torch.testing.assert_close(encode_pictures(kept, pictures, CPU), latents, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------ the decoder, once more


class Painting:
    """An autoencoder whose decoder paints a given picture, and records its inputs."""

    def __init__(self, picture: Tensor) -> None:
        self.picture = picture.requires_grad_(True)
        self.given: Tensor | None = None

    def decode(self, latents: Tensor) -> Any:
        self.given = latents
        return SimpleNamespace(sample=self.picture)


def test_decoder_loss_compares_pixels_and_slopes_from_noisy_latents() -> None:
    config = DecoderConfig(noise=0.5, slopes=2.0)
    real = torch.zeros(2, 3, 8, 8)
    real[:, :, :, 4:] = 1.0
    latents = torch.randn((2, 4, 1, 1), generator=seeded(0))
    rng = KeyedRng(0, 0, (0, 1))

    def loss(picture: Tensor) -> float:
        return float(train_decoder.decoder_loss(Painting(picture), config, latents, real, rng).value.detach())

    assert loss(real.clone()) == 0
    assert loss(real + 0.25) == pytest.approx(0.25)  # flat colours that are off have no wrong slopes
    # no edge: half of the pixels are off by 1, and 1 of 7 slopes across
    assert loss(torch.zeros_like(real)) == pytest.approx(0.5 + 2.0 / 7)
    vae = Painting(real.clone())
    train_decoder.decoder_loss(vae, config, latents, real, rng)
    assert vae.given is not None
    level = (vae.given - latents).flatten(1) / rng.normal("latent noise", (4, 1, 1)).flatten(1)
    expected = 0.5 * rng.uniform("level")
    assert torch.allclose(level.double(), expected[:, None].expand_as(level), atol=1e-5)
    assert 0 < float(level.min()) < float(level.max()) < 0.5


def test_the_decoder_learns_and_the_encoder_stays(tmp_path: Path) -> None:
    vae = tiny_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    pictures = shapes()
    latents = encode_pictures(vae, pictures, CPU)
    loop = LoopConfig(steps=30, batch=8, save_every=30)
    config = DecoderConfig(loop=loop, optim=OptimConfig(lr=3e-3))
    accelerator = make_accelerator("fp32", CPU)
    psnr = autoencoder.reconstruction_psnr(vae, pictures)
    trained = train_decoder.train_decoder(config, vae, pictures, pictures, tmp_path, accelerator)
    for name, tensor in trained.state_dict().items():
        stays = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(tensor, before[name]) == stays, name
    assert torch.allclose(encode_pictures(trained, pictures, CPU), latents, atol=1e-4)  # rounding of the faster kernels
    assert autoencoder.reconstruction_psnr(trained, pictures) > psnr + 3


def test_a_denoiser_starts_from_another_ones_weights(tiny_pipeline: Path) -> None:
    own = load_backbone(tiny_pipeline).network
    same = train_unet.make_unet(TINY_UNET)
    same.load_state_dict(train_unet.load_start(tiny_pipeline, same))
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), own.parameters(), strict=True))
    other = train_unet.make_unet(TINY_UNET.model_copy(update={"channels": (16, 16)}))
    with pytest.raises(UserError, match="another shape"):
        train_unet.load_start(tiny_pipeline, other)


@pytest.mark.usefixtures("small_world")
def test_a_teacher_from_start_to_end_stopped_between_its_parts(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done is not done again, the folder comes out the same, and diffusers draws with it."""
    from diffusers import StableDiffusionPipeline

    from fewstep.students.resolve import teacher_sampling

    loop = LoopConfig(steps=2, batch=4, save_every=1, precision="fp32")
    config = TeacherConfig(
        text=str(tiny_pipeline),
        omega=3.0,
        vae=TINY_VAE.model_copy(update={"loop": loop}),
        unet=TINY_UNET.model_copy(update={"loop": loop}),
        decoder=DecoderConfig(loop=loop),
    )
    teacher.train_teacher(config, tmp_path / "whole", tmp_path / "whole" / "pipeline")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(teacher, "train_decoder", stop)
        with pytest.raises(KeyboardInterrupt):
            teacher.train_teacher(config, tmp_path / "cut", tmp_path / "cut" / "pipeline")
    assert not (tmp_path / "cut" / "pipeline").exists()
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "train_vae", stop)
        found = teacher.train_teacher(config, tmp_path / "cut", tmp_path / "cut" / "pipeline")
    assert found["vae_psnr_heldout"] > 5
    same_files(tmp_path / "whole" / "pipeline", tmp_path / "cut" / "pipeline")
    folder = tmp_path / "cut" / "pipeline"
    assert teacher_sampling(read_folder(folder)) == TEACHER_SAMPLING.model_copy(update={"omega": 3.0})
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    drawn = pipe("a red disc", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn).all()
