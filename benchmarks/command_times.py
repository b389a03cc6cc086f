"""How long the command takes to help, to refuse and to draw: `python benchmarks/command_times.py`.

Each line is the median of fresh processes; "after imports" is what is left of `sample` once torch, diffusers and
transformers are imported.
"""

from __future__ import annotations

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


def seconds(command: list[str], code: int = 0) -> float:
    """Median wall time of a command that must end with the exit code."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
    return statistics.median(times)


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
            "imports alone": seconds([sys.executable, "-c", IMPORTS]),
        }
        lines["`sample`, after imports"] = lines["`sample`, in all"] - lines["imports alone"]
    print(f"commit {commit()}; {hardware()}; median of {REPEATS}\n\n| command | seconds |\n| --- | --- |")
    for name, value in lines.items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
