"""Roles on one set of weights give the gradients that separate networks give.

The reference holds one plain copy of the network for each role, without PEFT, and adds the LoRA product to the
weights itself: W = W_0 + (alpha/rank) B A. float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.diffusion.denoiser import BASE, Condition
from fewstep.training.config import StudentConfig
from fewstep.training.roles import AdapterRoles, SeparateRoles, add_adapter, copy_role
from fewstep.training.student import Student, make_student, unique_bytes

TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"]
ROLES = ("student", "target", "fake")
RANK, ALPHA = 3, 6.0
INPUTS = 2


def network(seed: int = 0) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=6,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    return made.double().eval().requires_grad_(False)


class Host:
    """The least a backbone must be."""

    outlets = ("conv_out", "up_blocks")

    def __init__(self) -> None:
        self.network: nn.Module = network()
        self.targets = TARGETS

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = network(x, t, condition["text"], return_dict=False)[0]
        return out


def inputs(seed: int) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(INPUTS, *shape, generator=g, dtype=torch.float64) for shape in ((2, 4, 4), (3, 6)))
    return x, torch.tensor([999.0, 259.0], dtype=torch.float64), {"text": text}


def fill(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """B matrices away from zero, unlike for every role."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=g, dtype=torch.float64))


def student(checkpointing: bool = False) -> tuple[Host, Student]:
    host = Host()
    config = StudentConfig(kind="lora", rank=RANK, alpha=ALPHA, checkpointing=checkpointing)
    made = make_student(host, config, ROLES, seed=1)
    for i, role in enumerate(ROLES):
        fill(made.roles.parameters(role), seed=10 + i)
    return host, made


class Reference:
    """Separate copies: call(..., role) runs the role's own network with W_0 + (alpha/rank) B A."""

    def __init__(self, adapters: dict[str, dict[str, Tensor]]) -> None:
        self.plain = {role: network() for role in (BASE, *adapters)}
        self.lora = {
            role: {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
            for role, weights in adapters.items()
        }

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        merged: dict[str, Tensor] = dict(self.plain[role].named_parameters())
        lora = self.lora.get(role, {})
        for name, a in lora.items():
            if "lora_A" not in name:
                continue
            b, weight = lora[name.replace("lora_A", "lora_B")], name.replace("lora_A.", "")
            product = (b.flatten(1) @ a.flatten(1)).reshape(merged[weight].shape)
            merged[weight] = merged[weight] + ALPHA / RANK * product
        out: Tensor = functional_call(self.plain[role], merged, (x, t, condition["text"]), {"return_dict": False})[0]
        return out


Call = Callable[[Tensor, Tensor, Condition, str], Tensor]


def losses(call: Call, between: bool) -> list[Tensor]:
    """A student's and a fake score's loss, in the shape of distillation: every other role is called around each
    forward, and (`between`) again between the forwards and the backwards.
    """
    x, t, text = inputs(0)
    with torch.no_grad():
        teacher = call(x, t, text, BASE)
        wanted = call(x - 0.1 * teacher, t - 20, text, "target")
    first = (call(x, t, text, "student") - wanted).square().mean()
    second = (call(*inputs(1), "fake") - teacher).square().mean()
    if between:
        for seed, role in enumerate((BASE, "target", "fake", "student", "target", BASE)):
            with torch.no_grad():
                call(*inputs(seed + 5), role)
    return [first, second]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_separate_networks(checkpointing: bool) -> None:
    host, ours = student(checkpointing)
    for parameter in ours.roles.parameters("fake").values():
        parameter.requires_grad_()
    reference = Reference({role: dict(ours.roles.parameters(role)) for role in ROLES})
    before = {name: p.requires_grad for name, p in host.network.named_parameters()}

    mine, theirs = losses(ours.call, between=True), losses(reference, between=False)
    # a state left behind by one backward would show in the other: the later forward goes first
    for loss, wanted in zip(reversed(mine), reversed(theirs), strict=True):
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        loss.backward()
        wanted.backward()

    for role in ("student", "fake"):
        found = ours.roles.parameters(role)
        assert set(found) == set(reference.lora[role])
        scale = max(float(value.grad.abs().max()) for value in reference.lora[role].values())  # type: ignore[union-attr]
        for name, value in reference.lora[role].items():
            mine_grad, grad = found[name].grad, value.grad
            assert mine_grad is not None, name
            assert grad is not None
            assert float(grad.abs().max()) > 0, name
            assert float((mine_grad - grad).abs().max()) < 1e-10 * scale, name
    assert all(p.grad is None for p in ours.roles.parameters("target").values())
    assert all(p.grad is None for n, p in host.network.named_parameters() if "lora_" not in n)
    assert before == {name: p.requires_grad for name, p in host.network.named_parameters()}


def test_checkpointing_really_runs_blocks_again() -> None:
    """Otherwise the test above would pass without re-entering a role."""
    runs = {}
    for checkpointing in (False, True):
        host, ours = student(checkpointing)
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        blocks = [m for m in host.network.modules() if type(m).__name__ == "ResnetBlock2D"]
        for block in blocks:
            block.register_forward_pre_hook(counted)  # the second run stops before it ends
        losses(ours.call, between=False)[0].backward()
        runs[checkpointing] = count
    assert runs[True] > runs[False]


def test_roles_differ_and_the_teacher_is_the_bare_base() -> None:
    _, ours = student()
    outputs = {role: ours.call(*inputs(3), role) for role in (BASE, *ROLES)}
    assert torch.equal(outputs[BASE], network()(*inputs(3)[:2], inputs(3)[2]["text"]).sample)
    values = [output.detach() for output in outputs.values()]
    for i, a in enumerate(values):
        for b in values[i + 1 :]:
            assert float((a - b).abs().max()) > 1e-3


def test_a_fresh_student_is_its_teacher_and_its_roles_are_equal() -> None:
    made = make_student(Host(), StudentConfig(kind="lora", rank=RANK), ("student", "target"), seed=1)
    outputs = [made.call(*inputs(3), role) for role in (BASE, "student", "target")]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    first, second = made.roles.parameters("student"), made.roles.parameters("target")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(first[name].any()) for name in first if "lora_A" in name)
    assert all(p.requires_grad for p in first.values())
    assert not any(p.requires_grad for p in second.values())


def test_lora_alpha_scales_the_product() -> None:
    made = make_student(Host(), StudentConfig(kind="lora", rank=RANK), ("student",), seed=1)
    twice = make_student(Host(), StudentConfig(kind="lora", rank=RANK, alpha=2.0 * RANK), ("student",), seed=1)
    for each, factor in ((made, 2.0), (twice, 1.0)):
        fill(each.roles.parameters("student"), seed=4)
        with torch.no_grad():
            for name, value in each.roles.parameters("student").items():
                if "lora_B" in name:
                    value.mul_(factor)
    assert torch.allclose(made.call(*inputs(3), "student"), twice.call(*inputs(3), "student"), rtol=0, atol=1e-12)


def test_base_weights_exist_once() -> None:
    base = unique_bytes(network())
    host, ours = student()
    weights = [p for role in ROLES for p in ours.roles.parameters(role).values()]
    adapters = sum(p.untyped_storage().nbytes() for p in weights)
    assert unique_bytes(host.network) == base + adapters
    assert adapters > 0
    full = make_student(Host(), StudentConfig(kind="full"), ("student", "target"), seed=0)
    assert isinstance(full.roles, SeparateRoles)
    assert unique_bytes(*full.roles.networks.values()) == 3 * base
    shared = network()
    assert unique_bytes(shared, shared) == base


def test_adapter_names_do_not_name_the_role() -> None:
    _, ours = student()
    names = [set(ours.roles.parameters(role)) for role in ROLES]
    assert names[0] == names[1] == names[2]
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in names[0]
    assert all(".student." not in name and name.endswith(("lora_A.weight", "lora_B.weight")) for name in names[0])
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in names[0]} >= {"to_q", "conv1", "time_emb_proj"}
    assert ours.roles.parameters(BASE) == {}


def test_add_adapter_leaves_global_randomness_and_other_gradients_alone() -> None:
    made = network()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    add_adapter(made, "one", RANK, ALPHA, TARGETS, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    add_adapter(made, "two", RANK, ALPHA, TARGETS, seed=5)
    add_adapter(made, "three", RANK, ALPHA, TARGETS, seed=6)
    with pytest.raises(ValueError, match="no_such_layer"):
        add_adapter(network(), "one", RANK, ALPHA, ["no_such_layer"], seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    roles = AdapterRoles(made)
    one, two, three = (roles.parameters(role) for role in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one), "drawn from the seed"
    assert all(not torch.equal(one[name], three[name]) for name in one if "lora_A" in name)
    assert not any(bool(value.any()) for name, value in one.items() if "lora_B" in name)
    for name, parameter in made.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


def test_the_role_is_restored_when_a_block_ends_or_fails() -> None:
    host, ours = student()
    roles = ours.roles
    bare = ours.call(*inputs(3), BASE)
    as_student = ours.call(*inputs(3), "student")

    def now() -> Tensor:
        return host.call(host.network, *inputs(3))

    assert torch.equal(now(), bare), "outside every block the network is the teacher"

    def fail_as(role: str) -> None:
        with roles.use(role):
            assert not torch.equal(now(), as_student)
            raise RuntimeError("inside")

    with roles.use("student"):
        assert torch.equal(now(), as_student)
        with pytest.raises(RuntimeError, match="inside"):
            fail_as("target")
        assert torch.equal(now(), as_student)
    assert torch.equal(now(), bare)


def test_a_new_layout_starts_as_the_teacher() -> None:
    made = network()
    bare = made(*inputs(3)[:2], inputs(3)[2]["text"]).sample
    add_adapter(made, "student", RANK, ALPHA, TARGETS, seed=5)
    fill(AdapterRoles(made).parameters("student"), seed=2)
    made.set_adapter("student")
    AdapterRoles(made)
    assert torch.equal(made(*inputs(3)[:2], inputs(3)[2]["text"]).sample, bare)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_unknown_role_is_an_error_not_the_teacher(kind: str) -> None:
    made = make_student(Host(), StudentConfig(kind=kind, rank=RANK), ("student",), seed=0)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="studnet"):
        made.call(*inputs(0), "studnet")
    made.call(*inputs(0), "student")


def test_copy_role_copies_values_not_tensors() -> None:
    _, ours = student()
    source, target = ours.roles.parameters("student"), ours.roles.parameters("target")
    copy_role(source, target)
    assert torch.equal(ours.call(*inputs(3), "student"), ours.call(*inputs(3), "target"))
    fill(source, seed=99)
    assert not torch.equal(ours.call(*inputs(3), "student"), ours.call(*inputs(3), "target"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_trains_a_copy(checkpointing: bool) -> None:
    host = Host()
    before = copy.deepcopy(host.network.state_dict())
    config = StudentConfig(kind="full", checkpointing=checkpointing)
    made = make_student(host, config, ("student", "target"), seed=0)
    assert torch.equal(made.call(*inputs(3), "student"), made.call(*inputs(3), BASE))
    assert all(p.requires_grad for p in made.roles.parameters("student").values())
    assert not any(p.requires_grad for r in (BASE, "target") for p in made.roles.parameters(r).values())

    x, t, text = inputs(0)
    loss = (made.call(x, t, text, "student") - made.call(*inputs(1), "target").detach()).square().mean()
    made.call(*inputs(2), BASE)
    loss.backward()
    plain = network().requires_grad_()
    wanted = (plain(x, t, text["text"]).sample - network()(*inputs(1)[:2], inputs(1)[2]["text"]).sample).square().mean()
    wanted.backward()
    grads = dict(plain.named_parameters())
    for name, parameter in made.roles.parameters("student").items():
        mine, theirs = parameter.grad, grads[name].grad
        assert mine is not None, name
        assert theirs is not None, name
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12), name
    with torch.no_grad():
        for parameter in made.roles.parameters("student").values():
            parameter.add_(0.1)
    assert all(torch.equal(value, before[name]) for name, value in host.network.state_dict().items())
    assert not torch.equal(made.call(*inputs(3), "student"), made.call(*inputs(3), "target"))
