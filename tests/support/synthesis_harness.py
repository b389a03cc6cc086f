"""Runs `fewstep synthesize` in forked children that are killed or fail at chosen places. Not a test by itself.

Usage: python synthesis_harness.py FOLDER WORD...

Imports are paid for once, in the parent, which never computes. Each launch is what `torchrun` makes: one process a
rank. Prints a JSON record: exit codes of each launch by rank, and how many children died on the way to `fire`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep.distillation.synthesis.synthesize as synthesis
from fewstep.common import files
from fewstep.common.errors import UserError
from fewstep.distillation.synthesis import shards
from support.kill_harness import kill, launch, wait_for, wait_for_all
from support.process_harness import enter, free_port

LIMIT = 120.0
MOST = 40
"""Children that may die before the set of `fire` is whole."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_rename(count: int) -> Callable[[], None]:
    """Die after the `count`-th rename."""

    def patch() -> None:
        plain = Path.replace
        left = count

        def replace(self: Path, target: Any) -> Path:
            nonlocal left
            done = plain(self, target)
            left -= 1
            if not left:
                die()
            return done

        Path.replace = replace  # type: ignore[method-assign,assignment]

    return patch


def in_a_write(place: Any, writer: str) -> Callable[[], None]:
    """Die with the next file that `place` writes by its function `writer` half-written."""

    def patch() -> None:
        plain = getattr(place, writer)

        def torn(path: Path, *more: Any) -> None:
            plain(path, *more)
            path.write_bytes(path.read_bytes()[:500])
            die()

        setattr(place, writer, torn)

    return patch


def in_the_removal_of_notes() -> None:
    plain = shutil.rmtree

    def torn(folder: Any, *more: Any, **options: Any) -> None:
        if str(folder).endswith(".gone") and Path(folder).is_dir():
            next(Path(folder).iterdir()).unlink()
            die()
        plain(folder, *more, **options)

    files.shutil.rmtree = torn  # type: ignore[assignment]


def never_removing_notes() -> None:
    """However late this child is killed, a removal is left for the next one."""

    def wait(folder: Path) -> None:
        time.sleep(LIMIT)

    synthesis.remove_folder = wait


def second_process(accident: Callable[[], None]) -> Callable[[int], None]:
    """Let something happen to the second process when it has drawn the second of its shards."""

    def patch(rank: int) -> None:
        plain = synthesis.make_shard
        made = 0

        def make(*args: Any) -> None:
            nonlocal made
            made += 1
            if rank == 1 and made == 2:
                accident()
            plain(*args)

        synthesis.make_shard = make

    return patch


def fail() -> None:
    raise UserError("the disk is full")


def run(folder: Path, words: list[str]) -> dict[str, Any]:
    """Every launch, one after another."""

    def command(out: Path) -> list[str]:
        return ["synthesize", "--out", str(out), *words]

    def exclusive(name: str, patch: Callable[[], None] | None = None) -> int | None:
        pid = launch(command(folder / name), folder / f"{name}.log", patch)
        return wait_for(pid, lambda: False, LIMIT)

    def together(name: str, accident: Callable[[int], None] | None = None) -> list[int | None]:
        port = free_port()

        def patch(rank: int) -> Callable[[], None]:
            def become() -> None:
                enter(rank, 2, port, folder / f"{name}-{rank}.did")
                if accident:
                    accident(rank)

            return become

        out = folder / name.split("-")[0]
        running = [launch(command(out), folder / f"{name}-{rank}.log", patch(rank)) for rank in (0, 1)]
        return wait_for_all(running, LIMIT)

    record: dict[str, Any] = {"peace": [exclusive("peace")], "fire": [], "moments": []}
    for patch in (in_a_write(synthesis, "write_rows"), in_a_write(shards, "save_tensors")):
        record["fire"].append(exclusive("fire", patch))
    for turn in range(MOST):  # after a shard, after its note, between the two, ...
        record["fire"].append(exclusive("fire", after_rename(1 + turn % 3)))
        if record["fire"][-1] != -signal.SIGKILL:
            break
    for number, delay in ((0, 0.01), (1, 0.03), (2, 0.06)):  # moments of no meaning, in a shard or between two
        drawn = folder / "moment" / f"shard-{number:05d}.safetensors"
        pid = launch(command(folder / "moment"), folder / "moment.log", never_removing_notes)
        if wait_for(pid, drawn.exists, LIMIT) is None:
            time.sleep(delay)
            kill(pid)
            record["moments"].append(len(list((folder / "moment").glob("shard-*"))))
    record["moment"] = [exclusive("moment", in_the_removal_of_notes), exclusive("moment")]
    record["two"] = together("two")
    record["cut"] = together("cut", second_process(die))
    record["cut-found"] = sorted(path.name for path in (folder / "cut").glob("shard-*"))
    record["cut-resumed"] = [exclusive("cut")]
    record["failed"] = together("failed", second_process(fail))
    return record


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
