"""Runs `fewstep distill` again and again in forked children and kills each with signal 9. Not a test by itself.

Usage: python kill_harness.py FOLDER KILLS OVERRIDE...

Imports are paid for once, in the parent, which never computes; each child is a fresh run of the command. Prints a
JSON record: kills at random moments, kills inside a save, and where the two students lie.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.models.unets.unet_2d_condition  # noqa: F401
import peft.tuners.lora  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers  # noqa: F401

from fewstep.commands.app import main
from fewstep.distillation import distill as distillation
from fewstep.distillation import validation as validation
from fewstep.distillation.estimate import Estimated
from fewstep.training import checkpoint
from support.pooled import Pooled

SEED = 20240229


def launch(arguments: list[str], log: Path, patch: Callable[[], None] | None = None) -> int:
    """Fork a child that runs the command; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        validation.Lite0Features = Pooled
        distillation.estimate = lambda *a: Estimated(0, 0, 0, 0, 0, {}, 0, {})  # two steps of work at every start
        distillation.announce = lambda *a: False
        if patch:
            patch()
        main(arguments)
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit code of a child that has ended; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_for(pid: int, seen: Callable[[], bool], limit: float = 300.0) -> int | None:
    """Poll until `seen` or the child's end, whose code is returned."""
    stop = time.monotonic() + limit
    while time.monotonic() < stop:
        code = ended(pid)
        if code is not None:
            return code
        if seen():
            return None
        time.sleep(0.002)
    raise TimeoutError


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def wait_for_all(pids: list[int], limit: float = 300.0) -> list[int | None]:
    """The codes that children end with; none of them is left if one takes too long."""
    running, codes = list(pids), []
    try:
        while running:
            codes.append(wait_for(running[0], lambda: False, limit))
            running.pop(0)
    finally:
        for pid in running:
            kill(pid)
    return codes


def training_started(out: Path) -> Callable[[], bool]:
    """Whether log.jsonl has changed since now: a run writes it anew when it resumes."""

    def stamp() -> tuple[int, int] | None:
        try:
            status = (out / "log.jsonl").stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size

    before = stamp()
    return lambda: stamp() != before


def logged_step(out: Path) -> int:
    """The last complete step in log.jsonl; 0 for none."""
    lines = (out / "log.jsonl").read_text().split("\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def stuck_in_a_save(marker: Path) -> Callable[[], None]:
    """Let the second file of the next checkpoint be half-written for ever."""

    def patch() -> None:
        plain = checkpoint.save_tensors
        count = 0

        def slow(path: Path, *others: Any) -> None:
            nonlocal count
            count += 1
            plain(path, *others)
            if count == 2:
                path.write_bytes(path.read_bytes()[:1000])
                marker.touch()
                time.sleep(600)

        checkpoint.save_tensors = slow

    return patch


def stuck_in_a_removal(marker: Path) -> Callable[[], None]:
    """Let the next removal of an old checkpoint stop half-way."""

    def patch() -> None:
        from fewstep.common import files

        def slow(folder: Path) -> None:
            next(iter(sorted(folder.iterdir()))).unlink()
            marker.touch()
            time.sleep(600)

        plain = files.shutil.rmtree
        files.shutil.rmtree = lambda f, *a, **k: (
            slow(Path(f)) if str(f).endswith(".gone") and Path(f).is_dir() else plain(f, *a, **k)
        )

    return patch


def run(folder: Path, count: int, overrides: list[str]) -> dict[str, Any]:
    """Train once in peace and once under fire: `count` kills, one at a random moment of each part of the run."""
    words = [word for override in overrides for word in ("-s", override)]
    log = folder / "children.log"

    def command(out: Path) -> list[str]:
        return ["distill", "--recipe", "tcd", "--out", str(out), *words]

    peace, fire = folder / "peace", folder / "fire"
    pid = launch(command(peace), log)
    code = wait_for(pid, training_started(peace))
    started = time.monotonic()
    code = wait_for(pid, lambda: False) if code is None else code
    if code != 0:
        raise RuntimeError(log.read_text()[-2000:])
    steps = logged_step(peace)
    pace = (time.monotonic() - started) / steps

    def interrupt(seen: Callable[[], bool], delay: float, patch: Callable[[], None] | None = None) -> bool:
        child = launch(command(fire), log, patch)
        if wait_for(child, seen) is not None:
            return False
        time.sleep(delay)
        if ended(child) is not None:
            return False
        kill(child)
        return True

    def interrupt_at(moment: float) -> int | None:
        """Kill at a moment, in steps since the start of the whole run; the step that was logged by then."""
        started = training_started(fire)
        whole = int(moment)
        if not interrupt(lambda: started() and logged_step(fire) >= whole, (moment - whole) * pace):
            return None
        return logged_step(fire)

    chance = random.Random(SEED)
    moments = [chance.uniform(part, part + 1) * (steps - 2) / count for part in range(count)]
    kills = [interrupt_at(moment) for moment in moments]
    saving, removing = folder / "saving", folder / "removing"
    saved = interrupt(saving.exists, 0.01, stuck_in_a_save(saving))
    removed = interrupt(removing.exists, 0.01, stuck_in_a_removal(removing))
    left = sorted(path.name for path in (fire / "checkpoints").iterdir())
    code = wait_for(launch(command(fire), log), lambda: False)
    if code != 0:
        raise RuntimeError(log.read_text()[-2000:])
    return {"kills": kills, "saving": saved, "removing": removed, "left": left, "steps": steps, "pace": pace}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
