"""What a run will take, before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fewstep import processes
from fewstep.compiled import eagerly
from fewstep.data.buckets import BucketedLatents
from fewstep.data.latents import LatentSet
from fewstep.device import DTYPES, pick_precision
from fewstep.draws import Draws
from fewstep.mapped import Rows
from fewstep.role_layout import unique_bytes
from fewstep.settings import DistillConfig
from fewstep.sharding import is_split
from fewstep.tally import in_words
from fewstep.training.live_bytes import LiveBytes
from fewstep.training.loop import Batch, Update


@dataclass(frozen=True)
class Checks:
    """What the quality checks of a run will take.

    Attributes:
        first: network evaluations for the teacher's pictures, once.
        each: those of a check.
        count: checks.
        seconds: all of them, from the timed step's evaluations (a backward pass counts as two); checks are mostly
            drawn in fp32, which may be slower than the step.
    """

    first: int
    each: int
    count: int
    seconds: float

    def line(self) -> str:
        """The checks in words."""
        return (
            f"checks   {self.first} network evaluations once for the teacher's pictures, {self.each} at each of "
            f"{self.count} checks: about {self.seconds / 60:.1f} min more"
        )


def count_checks(config: DistillConfig, seconds_per_step: float) -> Checks | None:
    """What the quality checks will take; None where there are none."""
    every = config.loop.watch_every
    if not every:
        return None
    pictures, sampling = config.watch.count, config.sampling
    first = pictures * config.watch.teacher_steps * (2 if config.method.guidance.mean_omega > 0 else 1)
    each = pictures * sampling.steps * (2 if sampling.omega > 0 else 1)
    count = math.ceil(config.loop.steps / every)
    evaluations = config.loop.batch / processes.count() * config.method.cost
    return Checks(first, each, count, (first + count * each) * seconds_per_step / evaluations)


@dataclass(frozen=True)
class Estimated:
    """The estimate.

    Attributes:
        seconds_per_step: one timed step (forward, backward), after one to warm up.
        seconds: the whole run, quality checks apart.
        weights_bytes: all roles' weights, shared storage counted once.
        base_bytes: of these the teacher's, which all adapters share.
        trained_bytes: gradients, optimiser states and averages of what is trained.
        trained: weights of each trained part, in bytes, by name.
        data_bytes: cached latents and text states, on disk.
        calls: network evaluations a sample and step, by role.
        saved_bytes: the most that one micro-batch holds at once, forwards or backwards, and what checkpointing computes
            again: activations, without weights and their gradients.
        peak_bytes: the most that a step held on the GPU, activations included; None on the CPU.
        encoding_seconds: pictures and captions, once, before the first step; 0 where that is done.
        checks: what the quality checks will take; None where there are none.
        name: of the stage; empty where there is one only.
        data: what is used of the source and what is left out, with the reasons, in a line; empty where it is not told.
    """

    seconds_per_step: float
    seconds: float
    weights_bytes: int
    base_bytes: int
    trained_bytes: int
    trained: dict[str, int]
    data_bytes: int
    calls: dict[str, float]
    saved_bytes: int = 0
    peak_bytes: int | None = None
    encoding_seconds: float = 0.0
    checks: Checks | None = None
    name: str = ""
    data: str = ""

    def lines(self) -> list[str]:
        """The estimate in words."""
        first = f"; {self.encoding_seconds / 60:.1f} min of encoding before" if self.encoding_seconds else ""
        peak = ""
        if self.peak_bytes is not None:
            peak = f"; {self.peak_bytes / 2**20:.0f} MiB in all at a step's peak, before the optimiser's states"
        adapters = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.trained.items())
        return [
            *([f"stage    {self.name}"] if self.name else []),
            *([self.data] if self.data else []),
            f"time     {self.seconds / 60:.1f} min ({self.seconds_per_step:.2f} s a step, timed here){first}",
            f"memory   {self.weights_bytes / 2**20:.0f} MiB weights (the base {self.base_bytes / 2**20:.0f}, once for "
            f"all roles; trained: {adapters}), {self.trained_bytes / 2**20:.0f} MiB gradients, "
            f"optimiser and averages, {self.saved_bytes / 2**20:.0f} MiB activations{peak}",
            f"disk     {self.data_bytes / 2**20:.0f} MiB latents and text states, read as they are needed",
            f"calls    network evaluations a sample and step: {in_words(self.calls)}",
            *([self.checks.line()] if self.checks else []),
        ]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold; a number that is seen many times is one."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def kept_bytes(rows: Rows) -> int:
    """Bytes of rows; one number that is seen many times is one."""
    return bytes_of([rows]) if isinstance(rows, Tensor) else rows.nbytes


@contextmanager
def gradients_dropped(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Drop each parameter's gradient as soon as it is complete, inside the block: they are counted elsewhere."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    with ExitStack() as hooks:
        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        yield


def estimate(
    plan: Sequence[Update],
    fetch: Callable[[np.ndarray, Draws], Batch],
    data: LatentSet,
    config: DistillConfig,
    networks: Sequence[nn.Module],
) -> Estimated:
    """Count the memory of a step of the plan and time another; no optimiser step is taken."""
    latents = data.latents
    rows = torch.arange(max(1, config.loop.batch // (config.loop.accumulate * processes.count()))) % len(latents)
    if isinstance(latents, BucketedLatents):  # the fullest bucket stands for all: their areas are alike
        own = torch.nonzero(latents.group == latents.group.mode().values).flatten()
        rows = own[rows % len(own)]
    device = next(networks[0].parameters()).device
    spent, held_bytes = 0.0, 0
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(2 + config.loop.compile):  # memory is counted eagerly, before anything is compiled
        spent = 0.0
        draws = Draws(config.loop.seed, step, tuple(range(len(rows))), device)
        batch = fetch(rows.numpy(), draws)
        for update in plan:
            started = time.perf_counter()
            precision = pick_precision(config.loop.precision, device)
            enabled = precision != "fp32"
            every = list(update.parameters.values())
            these = None if is_split(every) else every  # as the loop does
            live = LiveBytes()
            with ExitStack() as counting:
                if step == 0:  # alone, so that the timed step does nothing else
                    for context in (eagerly(), gradients_dropped(every), live):
                        counting.enter_context(context)
                with torch.autocast(device.type, dtype=DTYPES[precision], enabled=enabled):
                    loss = update.loss(batch, draws)
                torch.autograd.backward(loss.value, inputs=these)
            held_bytes = max(held_bytes, live.peak)
            del loss
            for parameter in (p for other in plan for p in other.parameters.values()):
                parameter.grad = None
            if on_gpu:
                torch.cuda.synchronize(device)
            spent += (time.perf_counter() - started) * config.loop.accumulate * (1 - update.start) / update.every
    trained = {u.name: bytes_of(u.parameters.values()) for u in plan}
    held = sum(size * (3 + bool(u.optim.ema)) for u, size in zip(plan, trained.values(), strict=True))
    base = [p for name, p in networks[0].named_parameters() if "lora_" not in name]
    return Estimated(
        spent,
        spent * config.loop.steps,
        unique_bytes(*networks),
        bytes_of(base),
        held,
        trained,
        kept_bytes(latents) + sum(kept_bytes(rows) for rows in data.table.values()),
        config.method.calls,
        held_bytes,
        torch.cuda.max_memory_allocated(device) if on_gpu else None,
        checks=count_checks(config, spent),
    )
