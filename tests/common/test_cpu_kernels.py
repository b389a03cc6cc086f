"""The CPU kernels compute what the built-in ones compute: outputs, gradients, a whole network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.cpu_kernels import FastGroupNorm, speed_up
from fewstep.distillation.config import resolve
from fewstep.distillation.prepare import prepare
from fewstep_worlds.common.autoencoder import make_vae
from fewstep_worlds.emoji8.config import UnetConfig, VaeConfig
from fewstep_worlds.emoji8.teacher.unet import make_unet

CHANNELS = 24
SHAPES = {"pictures": (3, CHANNELS, 6, 5), "one pixel wide": (2, CHANNELS, 7, 1), "rows": (3, CHANNELS, 14)}
BF16_DIGITS = 7
"""Stored bits of a bfloat16's mantissa."""


@dataclass(frozen=True)
class Passed:
    """An output and the gradients of <output, slope>."""

    out: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor

    def parts(self) -> dict[str, Tensor]:
        return {"output": self.out, "input": self.x, "weight": self.weight, "bias": self.bias}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built_in(groups: int, eps: float = 1e-5) -> nn.GroupNorm:
    """A norm whose weights and biases are all different: ones and zeros would hide much."""
    norm = nn.GroupNorm(groups, CHANNELS, eps=eps)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(CHANNELS, generator=generator(1)))
        norm.bias.copy_(torch.randn(CHANNELS, generator=generator(2)))
    return norm


def fast(norm: nn.GroupNorm) -> FastGroupNorm:
    twin = copy.deepcopy(norm)
    speed_up(twin)
    assert isinstance(twin, FastGroupNorm)
    return twin


def activations(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    """Channels of their own mean and spread: means that a group must take over channels and pixels."""
    draw = generator(seed)
    column = (1, CHANNELS, *[1] * (len(shape) - 2))
    spread, level = torch.rand(column, generator=draw) + 0.5, torch.randn(column, generator=draw)
    return torch.randn(shape, generator=draw) * spread + level


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":  # a part of something larger: neither layout
        wide = torch.cat([x, x], dim=-1).repeat_interleave(2, dim=0)
        return wide[::2, ..., : x.shape[-1]]
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x.contiguous()


def passed(norm: nn.Module, x: Tensor, slope: Tensor) -> Passed:
    norm.zero_grad()
    leaf = x.detach().requires_grad_(True)
    out = norm(leaf)
    out.backward(slope)
    weight, bias = norm.weight.grad, norm.bias.grad  # type: ignore[union-attr]
    assert leaf.grad is not None
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return Passed(out.detach(), leaf.grad, weight.clone(), bias.clone())


def assert_close(found: Passed, expected: Passed, share: float) -> None:
    """Equal to `share` of the largest number of each part."""
    for name, value in expected.parts().items():
        ours = found.parts()[name]
        assert ours.shape == value.shape, name
        error = float((ours.double() - value.double()).abs().max())
        assert error <= share * float(value.abs().max()), f"{name}: {error:.2g}"


@pytest.mark.parametrize("groups", [1, 3, 8, CHANNELS])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("pictures", "contiguous"),
        ("pictures", "channels_last"),
        ("pictures", "strided"),
        ("one pixel wide", "channels_last"),
        ("rows", "contiguous"),
        ("rows", "strided"),
    ],
)
def test_group_norm_equals_the_built_in_one_and_float64(kind: str, layout: str, groups: int) -> None:
    x = activations(SHAPES[kind])
    slope = torch.randn(x.shape, generator=generator(4))
    norm = built_in(groups)
    found = passed(fast(norm), laid_out(x, layout), laid_out(slope, layout))
    assert_close(found, passed(norm, x, slope), 1e-5)
    exact = passed(copy.deepcopy(norm).double(), x.double(), slope.double())
    assert_close(found, exact, 3e-6)


def test_a_gradient_in_another_layout_than_the_input() -> None:
    x, slope = activations(SHAPES["pictures"]), torch.randn(SHAPES["pictures"], generator=generator(5))
    norm = built_in(8)
    found = passed(fast(norm), laid_out(x, "channels_last"), slope)
    assert_close(found, passed(norm, x, slope), 1e-5)
    spread = passed(fast(norm), laid_out(x, "channels_last"), torch.ones(1).expand(x.shape))
    assert_close(spread, passed(norm, x, torch.ones_like(x)), 1e-5)


def test_the_norms_own_epsilon_counts() -> None:
    """Where a group hardly varies, eps decides: 1e-2 and 1e-6 give outputs a hundred times apart."""
    quiet = 1e-3 * torch.randn(SHAPES["pictures"], generator=generator(6))
    slope = torch.randn(quiet.shape, generator=generator(7))
    for eps in (1e-2, 1e-6):
        norm = built_in(8, eps)
        exact = passed(copy.deepcopy(norm).double(), quiet.double(), slope.double())
        assert_close(passed(fast(norm), quiet, slope), exact, 1e-5)


def test_a_group_without_variance_gives_the_bias() -> None:
    norm = built_in(8)
    flat = torch.full(SHAPES["pictures"], 0.7)
    found = fast(norm)(flat).detach() - norm.bias.detach().view(1, -1, 1, 1)
    assert float(found.abs().max()) < 2e-4, "1/sqrt(eps) = 316 times the rounding"
    levels = torch.linspace(1, 300, 64).view(-1, 1, 1, 1).expand(-1, CHANNELS, 6, 5)
    rounded = passed(fast(norm), levels, torch.randn(levels.shape, generator=generator(8)))
    assert all(part.isfinite().all() for part in rounded.parts().values()), "a variance rounded below 0"


def test_a_mean_of_many_spreads_costs_few_digits() -> None:
    """Mean square minus squared mean: at a mean of 10 spreads, two of the seven digits."""
    x = torch.randn((4, CHANNELS, 16, 16), generator=generator(9)) + 10
    slope = torch.randn(x.shape, generator=generator(10))
    norm = built_in(8)
    exact = passed(copy.deepcopy(norm).double(), x.double(), slope.double())
    assert_close(passed(fast(norm), laid_out(x, "channels_last"), slope), exact, 1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_of_bf16_rounds_once(layout: str) -> None:
    """Sums in fp32: what is left is the rounding of the result, half a last place, and fp32's own."""
    x = activations((4, CHANNELS, 16, 16)).bfloat16()
    slope = torch.randn(x.shape, generator=generator(11)).bfloat16()
    norm = built_in(8)
    found = passed(fast(norm), laid_out(x, layout), laid_out(slope, layout))
    expected = passed(norm, x.float(), slope.float())
    assert (found.out.dtype, found.x.dtype, found.weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for ours, value in ((found.out, expected.out), (found.x, expected.x)):
        last_place = torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=1e-30))) - BF16_DIGITS)
        assert bool(((ours.float() - value).abs() <= 0.5 * last_place + 1e-5).all())
    for ours, value in ((found.weight, expected.weight), (found.bias, expected.bias)):
        assert float((ours - value).abs().max()) <= 1e-5 * float(value.abs().max()), "nothing is summed in bf16"


def test_what_the_kernel_does_not_know_goes_to_the_built_in_one() -> None:
    for shape in ((3, CHANNELS), (2, CHANNELS, 3, 4, 2)):
        x = activations(shape)
        norm = built_in(8)
        assert torch.equal(fast(norm)(x), norm(x))


# ----------------------------------------------------------------------------------------- whole networks


def tiny_unet() -> nn.Module:
    torch.manual_seed(12)
    network: nn.Module = make_unet(UnetConfig(channels=(16, 32), heads=2, groups=8, latent_channels=4, text_width=32))
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
    kinds = [type(module) for module in swift.modules() if isinstance(module, nn.GroupNorm)]
    assert set(kinds) == {FastGroupNorm}
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
    """Its attention normalises rows, not pictures."""
    torch.manual_seed(14)
    plain = varied(make_vae(VaeConfig(channels=(8, 8, 8, 8), groups=4, latent_channels=4)))
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


def test_a_norm_without_weights_still_works() -> None:
    norm = nn.GroupNorm(8, CHANNELS, affine=False)
    x = activations(SHAPES["pictures"])
    torch.testing.assert_close(fast(norm)(x), norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "swapped"), [("fp32", False), ("bf16", True)])
def test_a_distillation_takes_them_below_fp32_alone(
    precision: str, swapped: bool, tiny_overrides: list[str], tiny_cache: Path
) -> None:
    config = resolve("tcd", None, [*tiny_overrides, f"loop.precision={precision}"])
    network = prepare(config, tiny_cache, torch.device("cpu")).backbone.network
    norms = {type(module) for module in network.modules() if isinstance(module, nn.GroupNorm)}
    assert norms == {FastGroupNorm if swapped else nn.GroupNorm}
