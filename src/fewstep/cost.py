"""What a run will take, before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fewstep import processes
from fewstep.data.buckets import BucketedLatents
from fewstep.data.latents import LatentSet
from fewstep.device import DTYPES, pick_precision
from fewstep.draws import Draws
from fewstep.mapped import Rows
from fewstep.role_layout import unique_bytes
from fewstep.settings import DistillConfig
from fewstep.sharding import is_split
from fewstep.tally import in_words
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
        saved_bytes: what one micro-batch keeps for its backward pass: activations, without weights.
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


def estimate(
    plan: Sequence[Update],
    fetch: Callable[[np.ndarray, Draws], Batch],
    data: LatentSet,
    config: DistillConfig,
    networks: Sequence[nn.Module],
) -> Estimated:
    """Time two steps of the plan (no optimiser step is taken) and add up its memory."""
    latents = data.latents
    rows = torch.arange(max(1, config.loop.batch // (config.loop.accumulate * processes.count()))) % len(latents)
    if isinstance(latents, BucketedLatents):  # the fullest bucket stands for all: their areas are alike
        own = torch.nonzero(latents.group == latents.group.mode().values).flatten()
        rows = own[rows % len(own)]
    device = next(networks[0].parameters()).device
    spent = 0.0
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not isinstance(whole, nn.Parameter):  # weights of any network, a scorer's or an autoencoder's too
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(2):
        spent = 0.0
        draws = Draws(config.loop.seed, step, tuple(range(len(rows))), device)
        batch = fetch(rows.numpy(), draws)
        for update in plan:
            started = time.perf_counter()
            precision = pick_precision(config.loop.precision, device)
            enabled = precision != "fp32"
            # activations are counted in the step that warms up, so that the timed one does nothing else
            noting = saved_tensors_hooks(note, lambda tensor: tensor) if step == 0 else nullcontext()
            with noting, torch.autocast(device.type, dtype=DTYPES[precision], enabled=enabled):
                loss = update.loss(batch, draws)
            every = list(update.parameters.values())
            these = None if is_split(every) else every  # as the loop does
            torch.autograd.backward(loss.value, inputs=these)
            for parameter in (p for other in plan for p in other.parameters.values()):
                parameter.grad = None
            if on_gpu:
                torch.cuda.synchronize(device)
            spent += (time.perf_counter() - started) * config.loop.accumulate / update.every
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
        sum(saved.values()),
        torch.cuda.max_memory_allocated(device) if on_gpu else None,
        checks=count_checks(config, spent),
    )
