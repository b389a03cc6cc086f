"""No host waits for its device in a training step: nothing is read back, nothing is handed over by a blocking copy.

Networks are on torch's `meta` device in place of a GPU: copies to it are visible on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.backbones.base import Backbone, load_backbone
from fewstep.common.config import validate
from fewstep.common.device import copy_async
from fewstep.common.mapped_tensors import Rows
from fewstep.common.rng import KeyedRng
from fewstep.data.latents import LatentSet
from fewstep.diffusion.denoiser import Denoiser
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.pair import MicroBatch
from fewstep.methods.start_points import STARTS, noise_purposes
from fewstep.methods.update_plan import make_update_plan, roles_of
from fewstep.training.config import OptimConfig, StudentConfig
from fewstep.training.student import make_student
from fewstep.training.update import Batch, Update, UpdateState
from support import tiny_pipelines

META = torch.device("meta")
MADE = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
"""What makes tensors of the CPU's numbers; on a GPU they are copied there, and waited for."""
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
COPIES = {"aten::_to_copy", "aten::copy_"}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd": {}, "sdxl": {}, "pixart": {"kind": "PixArtAlphaPipeline", "sizes": True}, "sd3": {}, "flux": {}, "sana": {},
    "flux2": {}, "krea2": {}, "anima": {},
}  # fmt: skip
"""Z-Image and Qwen-Image read the lengths of texts, and Chroma's network in diffusers makes a tensor of the CPU's."""


class Unwaiting(TorchDispatchMode):
    """Fails where a host would wait for the device; counts what crosses without waiting."""

    crossed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in READS and any(tensor.is_meta for tensor in tensors):
            raise AssertionError(f"{name} reads what the device holds")
        result = func(*args, **kwargs)
        places = {tensor.is_meta for tensor in [*tensors, result]} if name in COPIES else {}
        if len(places) > 1:
            if not kwargs.get("non_blocking", name == "aten::copy_" and len(args) > 2 and args[2]):
                raise AssertionError(f"{name} of {tuple(tensors[-1].shape)} waits for the device")
            self.crossed += 1
        return result


class Unmade(TorchFunctionMode):
    """Fails where a tensor on the device is made of the CPU's numbers, by copies that dispatch does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MADE and result.is_meta:
            raise AssertionError(f"{func.__name__} of {tuple(result.shape)} waits for the device")
        return result


@contextmanager
def unwaiting() -> Iterator[Unwaiting]:
    """Nothing waits in this block; what crosses is counted."""
    with Unwaiting() as seen, Unmade():
        yield seen


@pytest.fixture(scope="session")
def backbone_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    @cache
    def load(name: str) -> Backbone:
        folder = tmp_path_factory.mktemp(name) / "tiny"
        return load_backbone(tiny_pipelines.FAMILIES[name](folder, **FAMILIES[name]))

    return load


def method_of(**changes: Any) -> ConsistencyConfig:
    base = {"grid": 8, "k": 1, "s": "edge", "end": "clean", "jump": "first_order"}
    return validate(ConsistencyConfig, base | changes)


METHODS = {
    "on data": {"extra_conditioning": ["s"], "target": "ema"},
    "rollouts": {"start": "rollout", "rollout": 2},
    "polish": {"start": "student", "student_steps": 2, "matching": {"weight": 1.0, "normaliser": "score"}},
}


PAIRS = [*((family, "on data") for family in FAMILIES), *product(("sd", "flux"), list(METHODS)[1:])]


class Meta:
    """The part of an Accelerator that the loop uses, for one process."""

    scaler = None

    def autocast(self) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, **options: Any) -> None:
        torch.autograd.backward(loss, **options)


def drive(
    plan: Sequence[Update], fetch: Callable[[KeyedRng], Batch] = lambda _: {}
) -> tuple[Unwaiting, list[UpdateState]]:
    """One step of a plan in the loop's own hands, in two micro-batches, with an average: nothing waits in it."""
    exclusive: Any = Meta()
    running = [UpdateState(update, META) for update in plan]
    with unwaiting() as seen:
        for part in range(2):
            rng = KeyedRng(0, 0, (2 * part, 2 * part + 1), META)
            batch = fetch(rng)
            for r in running:
                others = [p for other in running if other is not r for p in other.parameters]
                r.backward(batch, rng, exclusive, 2, others)
            assert not rng._ahead, "what a start draws is what is drawn ahead for it"
        learning = [any(p.grad is not None for p in r.parameters) for r in running]
        for r in running:
            r.step(exclusive, 0, 1)
    assert all(learning)
    return seen, running


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_nothing_waits_in_a_step(family: str, method: str, backbone_of: Callable[[str], Backbone]) -> None:
    """Forward and backward of every update, teacher and target included, under the real network's own code; and what
    the loop does with them: notes and bins, clipping, the optimiser, averages and followers."""
    backbone = backbone_of(family)
    config = method_of(**METHODS[method])
    condition = {name: value.to(META) for name, value in backbone.encode(["a red disc", "blue"]).items()}
    null = {name: value.to(META) for name, value in backbone.null(2).items()}
    backbone.network = backbone.fresh_network()
    student = make_student(backbone, StudentConfig(rank=2), roles_of(config), 0, config.extra_conditioning)
    for module in [backbone.network, *student.extra_conditioning.values()]:
        module.to(META)
    denoiser = Denoiser(student.call, backbone.path, backbone.prediction, backbone.embedded_guidance)
    sample = MicroBatch(torch.zeros(2, *backbone.latent_shape, device=META), condition, null)

    def fetch(rng: KeyedRng) -> Batch:
        for purpose in noise_purposes(config):
            rng.draw_ahead(purpose, backbone.latent_shape)
        return {"sample": sample}

    plan = make_update_plan(config, OptimConfig(ema=0.9, clip=1.0), student, denoiser)
    seen, running = drive(plan, fetch)
    assert seen.crossed > 0, "noise, times and coefficients do"
    assert set(running[0].averages) == ({"ema", "follower"} if config.target == "ema" else {"ema"})
    assert all(average.updates == 1 for r in running for average in r.averages.values())
    assert all({"loss", "grad_norm"} <= set(r.means.sums) and r.optimizer.state for r in running)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.as_tensor(torch.ones(2), device=x.device),
        lambda x: torch.ones(2).to(x),
        lambda x: x.copy_(torch.ones(2)),
    ],
)
def test_a_blocking_copy_is_seen(waits: Callable[[Tensor], Tensor]) -> None:
    """What the test above rests on."""
    with unwaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.zeros(2, device=META))


def test_other_copies_are_counted() -> None:
    with unwaiting() as seen:
        copy_async(torch.ones(2), META)
        torch.tensor([1.0, 2.0])
    assert seen.crossed == 1


@pytest.mark.parametrize("start", STARTS)
def test_noise_is_drawn_by_who_reads_ahead(start: str) -> None:
    """All draws of a start, and the numbers that it would have drawn itself."""
    config = method_of(start=start, rollout=2, student_steps=3, guidance={"convention": "none"})
    shape, ahead = (1, 2, 2), KeyedRng(3, 5, (7, 8))
    for purpose in noise_purposes(config):
        ahead.draw_ahead(purpose, shape)
    held = dict(ahead._ahead)
    for (purpose, _), noise in held.items():
        assert torch.equal(noise, KeyedRng(3, 5, (7, 8)).normal(purpose, shape))
        assert torch.equal(noise, ahead.normal(purpose, shape))
    assert not ahead._ahead
    assert (start == "trajectory") == (not held)


def test_one_unconditional_row_is_read_for_any_batch() -> None:
    """And text goes over as it is kept: it is widened there."""
    calls: list[int] = []

    class Counted:
        nbytes = 0

        def __len__(self) -> int:
            return 3

        def __getitem__(self, rows: Tensor) -> Tensor:
            calls.append(len(rows))
            return torch.arange(3, dtype=torch.float16)[rows][:, None].expand(-1, 4)

    rows: Rows = Counted()
    data = LatentSet(torch.zeros(2, 1), {"text": rows}, torch.zeros(2, 1, dtype=torch.int64), "key")
    null = data.null(5, torch.device("cpu"))["text"]
    assert calls == [1]
    assert null.tolist() == [[2.0] * 4] * 5

    class Narrow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._schema.name == "aten::_to_copy" and result.is_meta and not args[0].is_meta:
                assert result.dtype == torch.float16
            return result

    with Narrow():
        assert data.states(torch.tensor([0, 1]), META)["text"].dtype == torch.float32
