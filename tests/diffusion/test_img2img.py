"""Drawing from a picture: the given number of network calls at every strength, and closer to it at a low one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.backbones.sd import StableDiffusion
from fewstep.common.errors import UserError
from fewstep.data.images import read_picture
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.draw_latents import Source
from fewstep.diffusion.samplers import picture_noise
from fewstep.diffusion.schedule import add_noise
from fewstep.inference.generator import load_image_generator
from fewstep_worlds.stickers.dataset import TRAINING_SEED, draw_scenes
from support.random_lora import random_lora

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def network_times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of all network calls."""
    times: list[float] = []
    plain = StableDiffusion.call

    def counted(self: Any, network: Any, x: Any, t: torch.Tensor, condition: Any, **more: Any) -> torch.Tensor:
        times.append(float(t[0]))
        return plain(self, network, x, t, condition, **more)

    monkeypatch.setattr(StableDiffusion, "call", counted)
    return times


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "source.png"
    Image.fromarray(draw_scenes(TRAINING_SEED, [3])[0]).save(file)
    return file


@pytest.mark.slow
def test_four_steps_are_four_calls_at_any_strength(source: Path, network_times: list[float], tmp_path: Path) -> None:
    read = read_picture(source, 64).astype(float)
    errors = []
    for strength in STRENGTHS:
        network_times.clear()
        path = fewstep.sample(
            "an octopus, noto style", image=source, strength=strength, out=tmp_path / "drawn.png", scale=1, count=8,
            settings={"steps": 4},
        )  # fmt: skip
        assert len(network_times) == 4
        assert network_times == sorted(network_times, reverse=True)
        assert 1000 * strength - 41 < network_times[0] < 1000 * strength
        row = np.asarray(Image.open(path).convert("RGB"))
        drawn = [row[4:68, 4 + 68 * i : 68 + 68 * i] for i in range(8)]
        errors.append(float(np.mean([(tile - read) ** 2 for tile in drawn])))
    assert errors == sorted(errors)
    assert errors[0] < 0.5 * errors[-1]


def test_it_begins_at_the_noised_picture(source: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The first call sees alpha x_0 + sigma z of the picture's own latent and the seed's noise."""
    image_generator = load_image_generator(tiny_pipeline, random_lora(tiny_pipeline, tmp_path / "student"))
    latent = image_generator.backbone.to_latents(read_picture(source, 64)[None])
    seen: list[torch.Tensor] = []
    plain = image_generator.backbone.call

    def watched(network: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        seen.append(x.clone())
        return plain(network, x, *more, **named)

    image_generator.backbone.call = watched  # type: ignore[method-assign]
    sampling = Sampling(steps=2, gamma=0.0)
    condition = image_generator.encode(["a red disc"] * 3)
    drawn = image_generator.latents(condition, [5, 6, 7], sampling, source=Source(latent, 0.5))
    z, _ = picture_noise([5, 6, 7], image_generator.backbone.latent_shape)
    wanted = add_noise(image_generator.backbone.path, latent.expand_as(z), z, torch.tensor([499.0]))
    torch.testing.assert_close(seen[0], wanted)
    one = {name: value[1:2] for name, value in condition.items()}
    apart = image_generator.latents(one, [6], sampling, source=Source(latent, 0.5))
    torch.testing.assert_close(drawn[1:2], apart, rtol=1e-4, atol=1e-4)
    each = image_generator.latents(condition, [5, 6, 7], sampling, source=Source(latent.expand(3, -1, -1, -1), 0.5))
    torch.testing.assert_close(each, drawn)


def test_what_cannot_be_begun_from_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    with pytest.raises(UserError) as error:
        fewstep.sample("a cat", strength=0.5, out=out)
    assert error.value.field == "strength"
    with pytest.raises(UserError, match=r"strength = 1\.2 must be"):
        fewstep.sample("a cat", image=source, strength=1.2, out=out)
    with pytest.raises(UserError, match=r"steps = 4 must be within .* strength = 0\.05"):
        fewstep.sample("a cat", image=source, strength=0.05, out=out, settings={"steps": 4})
    text = tmp_path / "not.png"
    text.write_text("no picture")
    with pytest.raises(UserError, match="picture"):
        fewstep.sample("a cat", image=text, out=out)
    assert not out.exists()
