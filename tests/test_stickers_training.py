"""Networks trained on sticker scenes: losses in closed form, and runs that are resumed exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.draws import Draws
from fewstep.evaluation.lite0 import make_lite0
from fewstep.evaluation.lite0_weights import load_weights
from fewstep.loop_settings import LoopConfig
from fewstep.training.launch import make_accelerator
from fewstep_worlds.stickers import autoencoder
from fewstep_worlds.stickers.dataset import draw_scenes
from fewstep_worlds.stickers.settings import AutoencoderConfig

CPU = torch.device("cpu")
SOURCES = Path(__file__).resolve().parents[1] / "src" / "fewstep"


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
        loss = losses.of_vae({"pictures": real}, Draws(0, step, (0, 1)))
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
        losses.of_vae(batch, Draws(0, 0, (0,)))
        assert float(losses.of_critic(batch, Draws(0, 0, (0,))).value) == expected


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
    latents = whole.encode(autoencoder.to_tensor(pictures)).latent_dist.mean
    assert abs(latents.mean().item()) < 0.2
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    assert autoencoder.restore(whole, pictures[:3]).shape == (3, 64, 64, 3)
    assert autoencoder.restore(whole, pictures).dtype == np.uint8
