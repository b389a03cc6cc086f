"""The estimate of a run's time, memory and network evaluations: one step counted, another timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.common import distributed as processes
from fewstep.common.compilation import eagerly
from fewstep.common.device import DTYPES, MOST_FILLED, free_memory, pick_precision
from fewstep.common.errors import UserError
from fewstep.common.mapped_tensors import Rows
from fewstep.common.rng import KeyedRng, order
from fewstep.common.sharding import is_sharded
from fewstep.diffusion.config import Guidance
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.nfe_counter import in_words
from fewstep.distillation.prepare import Run
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.cost import step_calls, step_cost
from fewstep.training.live_bytes import LiveBytes
from fewstep.training.student import unique_bytes
from fewstep.training.update import Update

TIMED = 16
"""Samples of the timed step if a whole micro-batch does not fit: the run is refused, and its time is a hint."""

MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.5, "muon": 1.0}
"""Bytes of an optimiser's moments over those of the weights; scales, and what Muon leaves to AdamW, are not counted."""


@dataclass(frozen=True)
class ValidationCost:
    """The cost of a run's validation.

    Attributes:
        first: network evaluations for the teacher's pictures, once.
        each: those of one validation.
        count: number of validations.
        seconds: of all, by the timed step's evaluations (a backward pass counts as two); pictures are mostly drawn in
            fp32, which may be slower than the step.
    """

    first: int
    each: int
    count: int
    seconds: float

    def line(self) -> str:
        """Return the cost as a line of text."""
        return (
            f"checks   {self.first} network evaluations once for the teacher's pictures, {self.each} at each of "
            f"{self.count} checks: about {self.seconds / 60:.1f} min more"
        )


def as_called(method: ConsistencyConfig, embedded: bool) -> ConsistencyConfig:
    """Return a method as its calls are counted: a network that takes guidance as an input is called once for it."""
    return method.model_copy(update={"guidance": Guidance(convention="none")}) if embedded else method


def validation_cost(config: DistillConfig, seconds_per_step: float, *, embedded: bool = False) -> ValidationCost | None:
    """Return the cost of validation; None if the run has none.

    Args:
        embedded: whether the network takes guidance as an input.
    """
    every = config.loop.validate_every
    if not every:
        return None
    pictures, sampling, method = config.validation.count, config.sampling, as_called(config.method, embedded)
    first = pictures * config.validation.teacher_steps * method.guidance.branches
    each = pictures * sampling.steps * (2 if sampling.omega > 0 and not embedded else 1)
    count = math.ceil(config.loop.steps / every)
    evaluations = config.loop.batch / processes.world_size() * step_cost(method)
    return ValidationCost(first, each, count, (first + count * each) * seconds_per_step / evaluations)


@dataclass(frozen=True)
class Estimated:
    """The estimate of a run or stage.

    Attributes:
        seconds_per_step: one timed step (forward, backward), after one to warm up.
        seconds: the whole run without validation.
        weights_bytes: all roles' weights, shared storage counted once; on the device if blocks are in main memory.
        base_bytes: those of the teacher, which all adapters share; on the device, too.
        trained_bytes: gradients, optimiser states and averages of what is trained.
        trained: bytes of each update's trained weights, by name.
        data_bytes: cached latents and text states, on disk.
        calls: network evaluations a sample and step, by role.
        saved_bytes: the peak of a micro-batch's activations, recomputed ones included, without weights and gradients.
        peak_bytes: the peak of a step on the GPU, activations included; None on the CPU.
        encoding_seconds: of pictures and captions, before the first step; 0 if all are encoded.
        validation: cost of validation; None if there is none.
        too_large: why a step does not fit into this machine's memory, and what fits; empty if it fits.
        name: of the stage; empty for a run without stages.
        data: a line on what is used of the source and what is left out; empty if unknown.
        offloaded_bytes: the teacher's blocks in main memory (`student.offload`).
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
    validation: ValidationCost | None = None
    too_large: str = ""
    name: str = ""
    data: str = ""
    offloaded_bytes: int = 0

    @property
    def step_bytes(self) -> int:
        """Bytes of the device that a step holds at most: weights, what is trained, and activations."""
        return self.weights_bytes + self.trained_bytes + self.saved_bytes

    def check(self) -> None:
        """Refuse a step that does not fit into memory."""
        if self.too_large:
            raise UserError(self.too_large, field="loop.batch")

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        first = f"; {self.encoding_seconds / 60:.1f} min of encoding before" if self.encoding_seconds else ""
        peak = ""
        if self.peak_bytes is not None:
            peak = f"; {self.peak_bytes / 2**20:.0f} measured at a step's peak, before the optimiser's states"
        if self.offloaded_bytes:
            peak += f"; {self.offloaded_bytes / 2**20:.0f} MiB of blocks in main memory"
        adapters = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.trained.items())
        return [
            *([f"stage    {self.name}"] if self.name else []),
            *([self.data] if self.data else []),
            f"time     {self.seconds / 60:.1f} min ({self.seconds_per_step:.2f} s a step, timed here){first}",
            f"memory   {self.weights_bytes / 2**20:.0f} MiB weights (the base {self.base_bytes / 2**20:.0f}, once for "
            f"all roles; trained: {adapters}), {self.trained_bytes / 2**20:.0f} MiB gradients, "
            f"optimiser and averages, {self.saved_bytes / 2**20:.0f} MiB activations: "
            f"{self.step_bytes / 2**20:.0f} MiB{peak}",
            f"disk     {self.data_bytes / 2**20:.0f} MiB latents and text states, read as they are needed",
            f"calls    network evaluations a sample and step: {in_words(self.calls)}",
            *([self.validation.line()] if self.validation else []),
            *([f"too much {self.too_large}"] if self.too_large else []),
        ]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors hold; an expanded number counts once."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def kept_bytes(rows: Rows) -> int:
    """Return the bytes of rows; an expanded number counts once."""
    return bytes_of([rows]) if isinstance(rows, Tensor) else rows.nbytes


@contextmanager
def gradients_dropped(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Drop each parameter's gradient as soon as it is complete, inside the block: gradients are counted elsewhere."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    with ExitStack() as hooks:
        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        yield


def estimate(
    run: Run, plan: Sequence[Update], done: int = 0, visits: Callable[[int, int], np.ndarray] | None = None
) -> Estimated:
    """Count the memory of a step of the run's plan and time another; no optimiser step is taken.

    Steps of one and two samples come first. If a micro-batch would not fit into memory, a few samples are timed and
    the rest is extrapolated.

    Args:
        done: steps that are made already; the next two are run.
        visits: as `training.loop.train`.
    """
    config, loop, data, networks, fetch = run.config, run.config.loop, run.data, run.networks, fetch_of(run)
    own = max(1, loop.batch // processes.world_size())
    micro = max(1, own // loop.accumulate)
    device = run.backbone.device
    on_gpu = device.type == "cuda"
    visited = visits or partial(order, loop.seed, len(data.latents))

    def measured(step: int, samples: int, counting: bool = False) -> tuple[float, int]:
        """Return the seconds of a step of so many samples and its peak bytes."""
        start = min(done + step, loop.steps - 1) * loop.batch + processes.rank() * micro
        rng = KeyedRng(loop.seed, start // loop.batch, tuple(range(start, start + samples)), device)
        batch, spent, held = fetch(visited(start, start + samples), rng), 0.0, 0
        for update in plan:
            started = time.perf_counter()
            precision = pick_precision(loop.precision, device, "loop.precision")
            every = list(update.parameters.values())
            live = LiveBytes()
            with ExitStack() as counted:
                if counting:  # not in the timed step; eagerly, before anything is compiled
                    for context in (eagerly(), gradients_dropped(every), live):
                        counted.enter_context(context)
                with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
                    loss = update.loss(batch, rng)
                torch.autograd.backward(loss.value, inputs=None if is_sharded(every) else every)  # as the loop does
            held = max(held, live.peak)
            del loss
            for parameter in (p for other in plan for p in other.parameters.values()):
                parameter.grad = None
            if on_gpu:
                torch.cuda.synchronize(device)
            spent += (time.perf_counter() - started) * loop.accumulate * (1 - update.start) / update.every
        return spent, held

    samples, free, most = micro, free_memory(device), 0
    one = more = 0
    if micro > 2:
        one = measured(0, 1, counting=True)[1]
        more = max(measured(0, 2, counting=True)[1] - one, 1)
        most = max(1, 1 + int((free * MOST_FILLED - one) / more))
        samples = micro if micro <= most else min(max(1, most // 4), TIMED)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    activations = measured(0, samples, counting=True)[1]
    for step in range(1, 2 + loop.compile):  # the first one compiles
        spent = measured(step, samples)[0] * micro / samples
    too_large = ""
    if samples < micro:
        activations = one + more * (micro - 1)
        least = math.ceil(own / most)
        parts = next((n for n in range(least, min(own, least + 2**16)) if own % n == 0), own)
        too_large = (
            f"loop.batch = {loop.batch} with loop.accumulate = {loop.accumulate} holds about "
            f"{activations / 2**30:.1f} GiB of activations at a time, and {free / 2**30:.1f} GiB are free; use "
            f"loop.accumulate = {parts}, or a smaller batch"
        )
    embedded = run.backbone.embedded_guidance
    trained = {u.name: bytes_of(u.parameters.values()) for u in plan}
    kept = {u.name: 1 + MOMENTS[u.optim.kind] + bool(u.optim.ema) for u in plan}
    held = round(sum(size * kept[name] for name, size in trained.items()))
    adapters = bytes_of(p for name, p in networks[0].named_parameters() if "lora_" in name)
    apart, slots = (run.offloaded.storages, run.offloaded.device_bytes) if run.offloaded else (set(), 0)
    return Estimated(
        spent,
        spent * loop.steps,
        unique_bytes(*networks, apart=apart) + slots,
        unique_bytes(networks[0], apart=apart) + slots - adapters,
        held,
        trained,
        kept_bytes(data.latents) + sum(kept_bytes(rows) for rows in data.table.values()),
        step_calls(as_called(config.method, embedded)),
        activations,
        torch.cuda.max_memory_allocated(device) if on_gpu else None,
        validation=validation_cost(config, spent, embedded=embedded),
        too_large=too_large,
        offloaded_bytes=run.offloaded.host_bytes if run.offloaded else 0,
    )
