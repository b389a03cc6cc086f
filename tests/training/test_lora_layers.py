"""Fused LoRA layers have the outputs and gradients of PEFT's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.training import lora_layers
from fewstep.training.lora_layers import FusedConv2d, FusedLinear, fuse_lora_layers
from fewstep.training.roles import AdapterRoles, add_adapter

WIDTH = 12


class Layers(nn.Module):
    """One of each kind of layer that LoRA goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)
        self.apart = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4)
        self.rows = nn.Linear(WIDTH, 2 * WIDTH)
        self.flat = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.apart(self.point(self.down(self.wide(x)).tanh()).tanh())
        rows = self.rows(x.flatten(2).mT).tanh()
        out: Tensor = self.flat(rows.mean(1))
        return out


def pair(layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> tuple[AdapterRoles, AdapterRoles, Tensor]:
    """The same network twice, with PEFT's layers and with joined ones, and a batch."""
    torch.manual_seed(0)
    network = Layers().to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    for role in ("student", "target"):
        add_adapter(network, role, 4, 6.0, [name for name, _ in network.named_children()], seed=1)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    own = copy.deepcopy(network)
    peft = AdapterRoles(network)
    for module in network.modules():  # as PEFT made them
        if isinstance(module, FusedConv2d | FusedLinear):
            module.__class__ = module.__class__.__mro__[1]
    x = torch.randn(5, 4, 6, 6, dtype=dtype).contiguous(memory_format=layout)
    return peft, AdapterRoles(own), x


def output(roles: AdapterRoles, x: Tensor, role: str) -> Tensor:
    with roles.use(role) as network:
        out: Tensor = network(x)
        return out


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("role", ["teacher", "student", "target"])
def test_outputs_and_gradients_are_those_of_pefts_own(layout: torch.memory_format, role: str) -> None:
    peft, own, x = pair(layout, torch.float64)
    x.requires_grad_()
    found: list[list[Tensor]] = []
    for roles in (peft, own):
        out = output(roles, x, role)
        weights = list(roles.parameters(role).values()) if role != "teacher" else []
        with torch.no_grad():
            torch.testing.assert_close(output(roles, x, role), out.detach(), rtol=1e-12, atol=1e-13)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights])])
    assert len(found[0]) == (14 if role != "teacher" else 2)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("role", "joined"), [("teacher", 0), ("student", 5)])
def test_one_operation_adds_in_channels_last(monkeypatch: pytest.MonkeyPatch, role: str, joined: int) -> None:
    _, own, x = pair(torch.channels_last)
    seen = []
    add = lora_layers._add
    monkeypatch.setattr(lora_layers, "_add", lambda *args: seen.append(add(*args)) or seen[-1])
    output(own, x, role)
    assert len(seen) == joined


def test_pefts_merging_finds_them() -> None:
    _, own, x = pair(torch.channels_last, torch.float64)
    with own.use("student") as network, torch.no_grad():
        wanted = network(x)
        layers: list[Any] = [m for m in network.modules() if isinstance(m, FusedConv2d | FusedLinear)]
        for layer in layers:
            layer.merge(adapter_names=["student"])
        torch.testing.assert_close(network(x), wanted, rtol=1e-12, atol=1e-13)
        for layer in layers:
            layer.unmerge()
        torch.testing.assert_close(network(x), wanted, rtol=1e-12, atol=1e-13)
    assert len(layers) == 5


def test_roles_differ_and_nothing_is_overwritten() -> None:
    _, own, x = pair(torch.channels_last)
    given = x.clone()
    before = {name: weight.clone() for name, weight in own.network.named_parameters()}
    with torch.no_grad():  # where sums are made in place
        first = [output(own, x, role) for role in ("teacher", "student", "target")]
        again = [output(own, x, role) for role in ("teacher", "student", "target")]
    assert (first[1] - first[0]).abs().max() > 0.1
    assert (first[2] - first[1]).abs().max() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(x, given)
    assert all(torch.equal(weight, before[name]) for name, weight in own.network.named_parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_they_are_as_near_to_fp32_as_pefts_own(grad: bool) -> None:
    peft, own, x = pair(torch.channels_last)
    exact = output(peft, x, "student").detach()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = output(own, x, "student"), output(peft, x, "student")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert 0 < (ours.float() - exact).norm() <= 2 * (theirs.float() - exact).norm()


def test_a_base_in_half_precision_keeps_pefts_casts() -> None:
    peft, own, x = pair(torch.channels_last)
    for roles in (peft, own):
        for name, weight in roles.network.named_parameters():
            if "lora_" not in name:
                weight.data = weight.data.bfloat16()
    assert torch.equal(output(own, x.bfloat16(), "student"), output(peft, x.bfloat16(), "student"))


def kinds(network: nn.Module) -> dict[str, str]:
    layers = {name: type(module) for name, module in network.named_children()}
    return {name: kind.__name__ for name, kind in layers.items()}


def test_only_plain_layers_are_joined() -> None:
    _, own, _ = pair(torch.channels_last)
    joined = {"wide": "FusedConv2d", "down": "FusedConv2d", "point": "FusedConv2d"}
    assert kinds(own.network) == joined | {"apart": "Conv2d", "rows": "FusedLinear", "flat": "FusedLinear"}


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_layers_that_do_more_are_pefts_own(more: dict[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    network = inject_adapter_in_model(LoraConfig(r=2, target_modules=["rows", "wide"], **more), Layers())
    fuse_lora_layers(network)
    assert {kinds(network)[name] for name in ("rows", "wide")} == {"Linear", "Conv2d"}
