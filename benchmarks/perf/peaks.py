"""What a step holds at most, and how much of it is matrix work: each contender alone, in a process of its own."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from fewstep.distillation.estimate import estimate
from perf.ours import LossOf, go, make_ours
from perf.task import WARM, Task, script_of
from perf.timing import settled

STEPS = 3
"""Steps that are looked at, after those that warm up."""
MATRIX = re.compile(r"mm\b|addmm|bmm|convolution|attention|linear")
"""Names of the operators whose own time is matrix work."""


def resident(*, reset: bool = False) -> int:
    """Bytes of main memory that the process held at most since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


At = Mapping[int, Callable[[], None]]
"""What is done before a step, by the step's number."""


def run_ours(task: Task, at: At) -> None:
    """Our loop."""
    numbers = iter(range(10**9))

    def around(loss: LossOf) -> LossOf:
        def watched(batch: Any, rng: Any) -> Any:
            at.get(next(numbers), _nothing)()
            return loss(batch, rng)

        return watched

    go(make_ours(replace(task, rounds=max(at) - WARM)), around)


def run_script(task: Task, at: At, *, encoders: bool) -> None:
    """The example's steps."""
    script = script_of(task)
    if not encoders:
        script.let_encoders_go()
    for number in range(max(at) + 1):
        at.get(number, _nothing)()
        (script.step if encoders else script.step_on_kept)()


def _nothing() -> None:
    pass


def run(task: Task, who: str, at: At) -> None:
    """A contender's steps."""
    if who == "ours":
        run_ours(task, at)
    else:
        run_script(task, at, encoders=who == "script")


def peak_of(task: Task, who: str) -> int:
    """Bytes that a step holds at most: of the GPU's memory, or of the whole process on a CPU."""
    found = []
    gpu = task.device.startswith("cuda")

    def begin() -> None:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            resident(reset=True)

    def end() -> None:
        found.append(torch.cuda.max_memory_allocated() if gpu else resident())

    run(task, who, {WARM: begin, WARM + STEPS: end})
    return found[0]


def estimate_of(task: Task, who: str) -> tuple[int, int]:
    """Bytes that a step of ours holds at most by the estimate, and measured beside the imported libraries."""
    import diffusers
    import transformers

    loaded = [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel]  # before the start
    if any(word.endswith("bit") for word in task.more):
        loaded.append(importlib.import_module("bitsandbytes"))
    gpu = task.device.startswith("cuda")
    resident(reset=True)
    before = 0 if gpu else resident()
    ours = make_ours(replace(task, rounds=2 - WARM - 1))  # two steps
    for network in ours.run.networks:
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()  # out of the mapped file, whose pages would count beside converted copies

    def begin() -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats() if gpu else resident(reset=True)

    def around(loss: LossOf) -> LossOf:
        numbers = iter(range(10**9))

        def watched(batch: Any, rng: Any) -> Any:
            if next(numbers) == 1:  # the optimiser's states are there
                begin()
            return loss(batch, rng)

        return watched

    go(ours, around)
    found = torch.cuda.max_memory_allocated() if gpu else resident() - before
    del loaded
    return estimate(ours.run, ours.run.update_plan()).step_bytes, found


def matrix_of(task: Task, who: str) -> float:
    """The share of a step that is matrix work.

    On a GPU, seconds of its matrix kernels over the wall time of as many steps timed without the profiler: a device
    that waits lowers it. On a CPU, the share of the operators' own time.
    """
    device = torch.device(task.device)
    gpu = device.type == "cuda"
    seen = profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else []))
    times = []

    def begin() -> None:
        times.append(settled(device))

    def network_distance() -> None:
        times.append(settled(device))
        seen.start()

    def end() -> None:
        settled(device)
        seen.stop()

    run(task, who, {WARM: begin, WARM + STEPS: network_distance, WARM + 2 * STEPS: end})
    matrix, every = seconds_of(seen.key_averages(), gpu=gpu)
    return matrix / (times[1] - times[0] if gpu else every)


def seconds_of(events: EventList, *, gpu: bool) -> tuple[float, float]:
    """Seconds of matrix work, and of all operators, in a profile."""
    own = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    own = {name: micro / 1e6 for name, micro in own.items() if name.startswith("aten::") or "triton" in name}
    return sum(seconds for name, seconds in own.items() if MATRIX.search(name)), sum(own.values())


def exclusive(what: Callable[[Task, str], Any], task: Task, who: str) -> Any:
    """One figure of one contender, in a process of its own."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(what, (task, who))
