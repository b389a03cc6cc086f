"""What a training step, a picture and a synthesised sample cost, beside what they are made of and what others do.

    python benchmarks/performance.py --network bundled --rank 64 --batch 16

One machine, one run: contenders take turns, so that what slows the machine slows all of them; medians, quartiles, and
ratios taken round by round. Networks: `bundled` (the teacher), `sd100m`, `sd15` and `sdxl` (random weights in the shape
of Stable Diffusion's, of 100 M parameters and of its own size, and of SDXL's), or a pipeline folder.

On a GPU, at SDXL's size:

    python benchmarks/performance.py --network sdxl --device cuda --precision bf16 --rank 64 --batch 8 \\
        --what stored online sampling memory matrix
    python benchmarks/performance.py ... -s loop.compile=true -s student.base=bf16
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve each other

import torch
from perf.networks import folder_of
from perf.peaks import alone, matrix_of, peak_of
from perf.sampling import time_sampling
from perf.steps import Task, time_steps
from perf.synthesis import time_synthesis
from perf.timing import Timed, ratio

from fewstep.device import DTYPES
from fewstep.provenance import commit, hardware

SCRIPTS = ("script", "script without encoders")


def main(words: Sequence[str] | None = None) -> None:
    """Time, and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = ["stored", "online", "sampling", "synthesis", "memory", "matrix"]
    parser.add_argument("--what", nargs="+", default=every, choices=every)
    parser.add_argument("--network", default="bundled", help="bundled, sd100m, sd15, sdxl, or a pipeline folder")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/performance"), help="folder for random pipelines")
    parser.add_argument("-s", action="append", default=[], help="a further setting of our run: loop.compile=true, ...")
    asked = parser.parse_args(words)
    folder = folder_of(asked.network, asked.cache)
    what = f"{asked.network}, rank {asked.rank}, batch {asked.batch}, {asked.precision}"
    print(f"commit {commit()}; {hardware()}; {torch.get_num_threads()} threads; {what} {' '.join(asked.s)}")
    for kind in asked.what:
        how = (asked.rank, asked.batch, asked.precision, asked.device, asked.cache, asked.rounds, tuple(asked.s))
        if kind in ("stored", "online"):
            task = Task(folder, kind, *how)
            with tempfile.TemporaryDirectory() as out:
                found = time_steps(task, Path(out))
            table(f"a training step, {kind}", found, found["F"].median, asked.batch)
            parts = [found[name] for name in ("student", "target", "teacher") if name in found]
            say("ours / sum of its bare parts", [found["ours"]], parts)
            say("the script / ours", [found["script"]], [found["ours"]])
            say("the script without encoders / ours", [found["script without encoders"]], [found["ours"]])
        elif kind == "sampling":
            found = time_sampling(folder, asked.batch, DTYPES[asked.precision], asked.device, asked.rounds)
            table("pictures at 4 steps", found, None, asked.batch)
            say("ours / (calls + decode)", [found["ours"]], [found["calls + decode"]])
            say("diffusers / ours", [found["diffusers"]], [found["ours"]])
        elif kind in ("memory", "matrix"):
            contenders = [("ours", "stored"), ("ours", "online"), *((name, "online") for name in SCRIPTS)]
            title = "GiB that a step holds at most" if kind == "memory" else "matrix work, share of the operators' time"
            print(f"\n## {title}\n\n| who | |\n| --- | --- |")
            for who, teacher in contenders:
                named = f"ours, {teacher}" if who == "ours" else who
                figure = alone(peak_of if kind == "memory" else matrix_of, Task(folder, teacher, *how), who)
                print(f"| {named} | {figure / 2**30 if kind == 'memory' else figure:.3f} |", flush=True)
        else:
            found = time_synthesis(folder, asked.batch, asked.precision, asked.device, max(3, asked.rounds // 5))
            table("a synthesised set", found, None, None)
            say("guided calls / ours", [found["guided calls"]], [found["ours"]])


def table(title: str, found: dict[str, Timed], unit: float | None, pictures: int | None) -> None:
    """One table: seconds, quartiles, and in units of F and as a rate where there are such."""
    print(f"\n## {title}\n\n| what | seconds | quartiles | F | a second |\n| --- | --- | --- | --- | --- |")
    for name, timed in found.items():
        low, high = timed.spread
        in_f = f"{timed.median / unit:.2f}" if unit else ""
        rate = f"{pictures / timed.median:.2f}" if pictures else ""
        print(f"| {name} | {timed.median:.4f} | {low:.4f} to {high:.4f} | {in_f} | {rate} |")


def say(name: str, over: list[Timed], under: list[Timed]) -> None:
    """One ratio as a line."""
    middle, low, high = ratio(over, under)
    print(f"\n{name}: {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
