"""What a step holds at most, and how much of it is matrix work: each contender alone, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from fewstep.distillation import update_plan
from fewstep.preparation import prepare
from fewstep.samples import fetch_of
from fewstep.settings import resolve
from fewstep.training.launch import make_accelerator
from fewstep.training.loop import Batch, train
from fewstep.training.run import RunLog
from perf.steps import WARM, Task, script_of, words

STEPS = 3
"""Steps that are looked at, after those that warm up."""
MATRIX = re.compile(r"mm\b|addmm|bmm|convolution|attention|linear")
"""Names of the operators whose own time is matrix work."""


def resident(*, reset: bool = False) -> int:
    """Bytes of main memory that the process held at most since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    told = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", told)[1]) * 1024  # type: ignore[index]


def run_ours(task: Task, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Our loop: `begin` is called before the first step that counts, `end` after the last."""
    device = torch.device(task.device)
    task = replace(task, rounds=STEPS)
    accelerator = make_accelerator(task.precision, device)  # type: ignore[arg-type]
    config = resolve("tcd", None, words(task))
    run = prepare(config, task.cache / "encoded", device)
    plan = update_plan(run)
    bare, seen = plan[0].loss, iter(range(10**9))

    def loss(batch: Batch, draws: Any) -> Any:
        number = next(seen)
        if number == WARM:
            begin()
        if number == WARM + STEPS:
            end()
        return bare(batch, draws)

    plan[0] = replace(plan[0], loss=loss)
    with (
        tempfile.TemporaryDirectory() as out,
        RunLog(Path(out), config, title="peaks", inputs=run.inputs, main=True, quiet=True) as log,
    ):
        train(plan, fetch_of(run), len(run.data), config.loop, log, accelerator)


def run_script(task: Task, encoders: bool, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """The example's steps, likewise."""
    step = script_of(task, encoders=encoders).step
    for _ in range(WARM):
        step()
    begin()
    for _ in range(STEPS):
        step()
    end()


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

    if who == "ours":
        run_ours(task, begin, end)
    else:
        run_script(task, who == "script", begin, end)
    return found[0]


def matrix_of(task: Task, who: str) -> float:
    """The share of the operators' own time, on the device that computes, that is matrix work."""
    gpu = task.device.startswith("cuda")
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    seen = profile(activities=kinds)

    def end() -> None:
        if gpu:
            torch.cuda.synchronize()
        seen.stop()

    if who == "ours":
        run_ours(task, seen.start, end)
    else:
        run_script(task, who == "script", seen.start, end)
    return share_of(seen.key_averages(), gpu=gpu)


def share_of(events: EventList, *, gpu: bool) -> float:
    """The share of matrix work in a profile."""
    own = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    own = {name: seconds for name, seconds in own.items() if name.startswith("aten::") or "triton" in name}
    return sum(seconds for name, seconds in own.items() if MATRIX.search(name)) / sum(own.values())


def alone(what: Callable[[Task, str], Any], task: Task, who: str) -> Any:
    """One figure of one contender, in a process of its own."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(what, (task, who))
