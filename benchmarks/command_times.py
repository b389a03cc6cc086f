"""How long the command takes to help, to refuse and to draw: `python benchmarks/command_times.py`.

Each line is the median of fresh processes. On a busy machine the processor's seconds say more than the clock's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fewstep.common.provenance import commit, hardware

REPEATS = 5
FEWSTEP = [sys.executable, "-m", "fewstep.commands.app"]
IMPORTS = "import torch, diffusers, transformers; from diffusers import AutoencoderKL, UNet2DConditionModel"
LIGHT = f"from fewstep.common import light_imports as x; x.in_command = True; x.import_libraries(); {IMPORTS}"


def seconds(command: list[str], code: int = 0) -> tuple[float, float]:
    """Median wall and processor time of a command that must end with the exit code."""
    times = []
    for _ in range(REPEATS):
        start, before = time.perf_counter(), os.times()
        done = subprocess.run(command, capture_output=True, check=False)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        times.append((time.perf_counter() - start, used))
        if done.returncode != code:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
    wall, used = (statistics.median(column) for column in zip(*times, strict=True))
    return wall, used


def main() -> None:
    """Print a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "frogs.png")
        sample = [*FEWSTEP, "sample", "three frogs on yellow", "--steps", "4", "--out", out]
        lines = {
            "`--help`": seconds([*FEWSTEP, "--help"]),
            "`distill --help`": seconds([*FEWSTEP, "distill", "--help"]),
            "a refusal (unknown key)": seconds([*FEWSTEP, "distill", "-s", "loop.step=3"], 2),
            "a refusal (steps out of range)": seconds([*FEWSTEP, "sample", "x", "--steps", "0", "--out", out], 2),
            "`sample`, in all": seconds(sample),
            "imports of `sample`": seconds([sys.executable, "-c", LIGHT]),
            "the same with every package that is installed": seconds([sys.executable, "-c", IMPORTS]),
        }
    print(f"commit {commit()}; {hardware()}; median of {REPEATS}\n")
    print("| command | seconds | of the processor |\n| --- | --- | --- |")
    for name, (wall, used) in lines.items():
        print(f"| {name} | {wall:.2f} | {used:.2f} |")


if __name__ == "__main__":
    main()
