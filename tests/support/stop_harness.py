"""Runs `fewstep distill` in forked children and stops them by SIGINT and SIGTERM. Not a test by itself.

Usage: python stop_harness.py FOLDER WORD...

Imports are paid for once, as in kill_harness. Prints a JSON record: the exit codes by launch and rank. Beside the run
folders are NAME-RANK.log, what each process printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fewstep.distillation import distill as distillation
from support.kill_harness import launch, logged_step, wait_for, wait_for_all
from support.process_harness import enter, free_port

STAGES = "[{name: one, share: 1, method: {}}, {name: two, share: 1, method: {}}]"
LIMIT = 120.0
ANNOUNCE, ESTIMATE = distillation.announce, distillation.estimate
CHANGES = ["data.trajectories=3", "method.grid=10", "method.k=9", "sampling.grid=10", "loop.steps=2"]
KEPT = [word for change in CHANGES for word in ("-s", change)]
"""Stored trajectories, which the processes of a launch draw together."""


def run(folder: Path, words: list[str]) -> dict[str, list[int | None]]:
    """All launches, one after another."""

    def start(name: str, size: int, *more: str) -> list[int]:
        port, out = free_port(), folder / name.split("-")[0]
        verb = [*words, *more, "--out", str(out)]

        def become(rank: int) -> None:
            if size > 1:
                enter(rank, size, port, folder / f"{name}-{rank}.did")
            if name == "announced":
                distillation.announce, distillation.estimate = ANNOUNCE, ESTIMATE

        return [launch(verb, folder / f"{name}-{r}.log", lambda r=r: become(r)) for r in range(size)]

    def stopped(name: str, size: int, number: int, place: Path, step: int, *more: str) -> list[int | None]:
        """Send the signal to the last process alone once a step is logged; all of a launch stop."""
        running = start(name, size, *more)
        log = folder / place / "log.jsonl"
        wait_for(running[0], lambda: log.is_file() and logged_step(log.parent) >= step, LIMIT)
        os.kill(running[-1], number)
        return wait_for_all(running, LIMIT)

    stages = ["-s", f"stages={STAGES}"]
    codes = {
        "whole": wait_for_all(start("whole", 1, *stages)),
        "cut-1": stopped("cut-1", 1, signal.SIGINT, Path("cut/stages/1-one"), 3, *stages),
        "cut-2": stopped("cut-2", 1, signal.SIGTERM, Path("cut/stages/2-two"), 5, *stages),
        "cut-3": wait_for_all(start("cut-3", 1, *stages)),
    }
    if os.name == "posix":
        codes |= {
            "both": wait_for_all(start("both", 2)),
            "announced": wait_for_all(start("announced", 2, "--recipe", "kd", *KEPT)),
            "halved-1": stopped("halved-1", 2, signal.SIGTERM, Path("halved"), 3),
            "halved-2": wait_for_all(start("halved-2", 2)),
        }
    return codes


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
