"""A network with CPU kernels computes what the plain one computes: outputs and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from fewstep.common.cpu_kernels import speed_up
from fewstep.distillation.config import resolve
from fewstep.distillation.prepare import prepare
from fewstep_worlds.common.autoencoder import make_vae
from fewstep_worlds.common.denoiser import make_unet
from fewstep_worlds.common.settings import AutoencoderShape, UnetShape


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def processors(network: nn.Module) -> set[type]:
    found = (getattr(module, "processor", None) for module in network.modules())
    return {type(processor) for processor in found if processor is not None}


def tiny_unet() -> nn.Module:
    torch.manual_seed(12)
    network: nn.Module = make_unet(UnetShape(channels=(16, 32), heads=2, groups=8), 4, 8, 32)
    return varied(network)


def varied(network: nn.Module) -> nn.Module:
    """Norms as after training, not ones and zeros."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
    return network


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        error = float((ours[name] - value).abs().max())
        assert error <= 1e-4 * float(value.abs().max()) + 1e-6 * largest, f"{name}: {error:.2g}"


def test_a_faster_unet_is_the_same_unet() -> None:
    plain = tiny_unet()
    swift = copy.deepcopy(plain)
    speed_up(swift)
    assert (processors(plain), processors(swift)) == ({AttnProcessor2_0}, {AttnProcessor})
    before, after = plain.state_dict(), swift.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in swift.named_parameters()]

    draw = generator(13)
    x, states = torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 5, 32, generator=draw)
    t, slope = torch.tensor([7, 420, 999]), torch.randn(3, 4, 8, 8, generator=draw)
    outputs = []
    for network in (swift, plain):
        out = network(x, t, states, return_dict=False)[0]
        out.backward(slope)
        outputs.append(out.detach())
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-5 * float(outputs[1].abs().max())
    assert len(gradients(plain)) == len(before)
    assert_same_gradients(gradients(swift), gradients(plain))


def test_a_faster_autoencoder_is_the_same_autoencoder() -> None:
    torch.manual_seed(14)
    plain = varied(make_vae(AutoencoderShape(channels=(8, 8, 8, 8), groups=4, latent_channels=4)))
    swift = copy.deepcopy(plain)
    speed_up(swift)
    pictures = torch.randn(2, 3, 64, 64, generator=generator(15))
    outputs = []
    for network in (swift, plain):
        latents = network.encode(pictures).latent_dist.mean  # type: ignore[operator]
        restored = network.decode(latents).sample  # type: ignore[operator]
        (latents.square().sum() + restored.square().mean()).backward()
        outputs.append((latents.detach(), restored.detach()))
    for ours, theirs in zip(*outputs, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    assert_same_gradients(gradients(swift), gradients(plain))


@pytest.mark.parametrize(("precision", "swapped"), [("fp32", False), ("bf16", True)])
def test_a_distillation_takes_them_below_fp32_alone(
    precision: str, swapped: bool, tiny_overrides: list[str], tiny_cache: Path
) -> None:
    config = resolve("tcd", None, [*tiny_overrides, f"loop.precision={precision}"])
    network = prepare(config, tiny_cache, torch.device("cpu")).backbone.network
    assert processors(network) == {AttnProcessor if swapped else AttnProcessor2_0}
