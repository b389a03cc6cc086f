"""What a training step, a picture and a synthesised sample cost, beside what they are made of and what others do.

    python benchmarks/performance.py --network bundled --rank 64 --batch 16

One machine, one run: contenders take turns, so that what slows the machine slows all of them; medians, quartiles, and
ratios taken round by round. Networks: `bundled` (the teacher), `sd100m`, `sd15` and `sdxl` (random weights in the shape
of Stable Diffusion's, of 100 M parameters and of its own size, and of SDXL's), or a pipeline folder.

On a GPU of 80 GB, at SDXL's size (three networks in fp32 are there at once, ours and the script's two):

    python benchmarks/performance.py --network sdxl --device cuda --precision bf16 --rank 64 --batch 2 \\
        --what stored online sampling memory matrix compiled
    python benchmarks/performance.py ... -s loop.compile=true -s student.base=bf16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from fewstep.common.threads import limit_spinning

limit_spinning()  # before torch

import torch
from perf.compiled import apart
from perf.networks import folder_of
from perf.peaks import estimate_of, exclusive, matrix_of, peak_of
from perf.sampling import time_sampling
from perf.steps import time_steps
from perf.synthesis import time_synthesis
from perf.task import Task
from perf.timing import Timed, ratio

from fewstep.common.device import DTYPES
from fewstep.common.provenance import commit, hardware
from fewstep.distillation.synthesis.settings import Kind

CONTENDERS = (("ours", "stored"), ("ours", "online"), ("script", "online"), ("script without encoders", "online"))


def main(words: Sequence[str] | None = None) -> None:
    """Time, and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--what", nargs="+", default=[kind for kind in KINDS if kind != "compiled"], choices=list(KINDS)
    )
    parser.add_argument("--network", default="bundled", help="bundled, sd100m, sd15, sdxl, or a pipeline folder")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/performance"), help="folder for random pipelines")
    parser.add_argument("-s", action="append", default=[], help="a further setting of our run: loop.compile=true, ...")
    args = parser.parse_args(words)
    folder = folder_of(args.network, args.cache)
    what = f"{args.network}, rank {args.rank}, batch {args.batch}, {args.precision}"
    print(f"commit {commit()}; {hardware()}; {torch.get_num_threads()} threads; {what} {' '.join(args.s)}")
    for kind in args.what:
        how = (args.rank, args.batch, args.precision, args.device, args.cache, args.rounds, tuple(args.s))
        KINDS[kind](Task(folder, kind, *how))


def report_steps(task: Task) -> None:
    """A training step, from stored trajectories or with teacher calls."""
    found, phases = time_steps(task)
    unit = found["F"].median
    table(f"a training step, {task.kind}", found, unit, task.batch)
    parts = [found[name] for name in ("student", "target", "teacher") if name in found]
    print_ratio("ours / sum of its bare parts", [found["ours"]], parts)
    print_ratio("the script / ours", [found["script"]], [found["ours"]])
    print_ratio("the script without encoders / ours", [found["script without encoders"]], [found["ours"]])
    table(f"our step by phase, {task.kind}, in a pass of its own", phases, unit, None)


def report_sampling(task: Task) -> None:
    """Pictures."""
    found = time_sampling(task)
    table("pictures at 4 steps", found, None, task.batch)
    print_ratio("ours / (calls + decode)", [found["ours"]], [found["calls + decode"]])
    print_ratio("diffusers / ours", [found["diffusers"]], [found["ours"]])
    print_ratio("LoRA, not merged / merged", [found["LoRA, not merged"]], [found["LoRA, merged"]])


def report_synthesis(task: Task) -> None:
    """Sets of latents, and of whole trajectories."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        found = time_synthesis(task, kind)
        table(f"a synthesised set of {kind}", found, None, None)
        print_ratio("guided calls / ours", [found["guided calls"]], [found["ours"]])


def report_compiled(task: Task) -> None:
    """How far compiled networks are from eager ones."""
    print("\n## compiled beside eager: largest distance over the largest value\n\n| what | |\n| --- | --- |")
    for name, distance in apart(task).items():
        print(f"| {name} | {distance:.1e} |", flush=True)


def report_memory(task: Task) -> None:
    """What a step holds at most."""
    each("GiB that a step holds at most", task, lambda kind, who: exclusive(peak_of, kind, who) / 2**30)


def report_estimate(task: Task) -> None:
    """The memory of a step by the estimate, beside the measured one."""
    counted, measured = exclusive(estimate_of, replace(task, kind="online"), "ours")
    gib = (counted / 2**30, measured / 2**30)
    print(f"\nour step: {gib[0]:.2f} GiB by the estimate, {gib[1]:.2f} measured: {counted / measured:.3f}", flush=True)


def report_matrix(task: Task) -> None:
    """How much of a step is matrix work."""
    of = "operators' time" if task.device == "cpu" else "wall time"
    each(f"matrix work, share of the {of}", task, lambda kind, who: exclusive(matrix_of, kind, who))


KINDS: dict[str, Callable[[Task], None]] = {
    "stored": report_steps,
    "online": report_steps,
    "sampling": report_sampling,
    "synthesis": report_synthesis,
    "memory": report_memory,
    "estimate": report_estimate,
    "matrix": report_matrix,
    "compiled": report_compiled,
}
"""Kinds of timings by name."""


def each(title: str, task: Task, figure: Callable[[Task, str], float]) -> None:
    """One figure for each contender."""
    print(f"\n## {title}\n\n| who | |\n| --- | --- |")
    for who, kind in CONTENDERS:
        named = f"ours, {kind}" if who == "ours" else who
        print(f"| {named} | {figure(replace(task, kind=kind), who):.3f} |", flush=True)


def table(title: str, found: dict[str, Timed], unit: float | None, pictures: int | None) -> None:
    """One table: seconds, quartiles, and in units of F and as a rate where there are such."""
    print(f"\n## {title}\n\n| what | seconds | quartiles | F | a second |\n| --- | --- | --- | --- | --- |")
    for name, timed in found.items():
        low, high = timed.spread
        in_f = f"{timed.median / unit:.2f}" if unit else ""
        rate = f"{pictures / timed.median:.2f}" if pictures else ""
        print(f"| {name} | {timed.median:.4f} | {low:.4f} to {high:.4f} | {in_f} | {rate} |")


def print_ratio(name: str, over: list[Timed], under: list[Timed]) -> None:
    """One ratio as a line."""
    middle, low, high = ratio(over, under)
    print(f"\n{name}: {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
