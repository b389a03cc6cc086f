"""Runs `fewstep distill` in launches of one and of two processes, forked. Not a test by itself.

Usage: python process_harness.py FOLDER OVERRIDE...

Each launch is what `torchrun` makes: one process a rank, which gets its place from environment variables. Prints a JSON
record: the exit codes of each launch, by rank. Beside the run folders are, for each launch, NAME-RANK.log (what
the rank printed) and NAME-RANK.did (what it did that costs time or writes).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from fewstep.backbones.sd import StableDiffusion
from fewstep.common.errors import UserError
from fewstep.distillation import distill as distillation
from fewstep.distillation import prepare as preparation
from fewstep.distillation import trajectory
from fewstep.distillation import validation as validation
from fewstep.evaluation import run as measuring
from fewstep.inference.generator import ImageGenerator
from fewstep.methods import update_plan as plan
from fewstep.training import checkpoint
from support.kill_harness import launch, wait_for_all
from support.pooled import Pooled

LIMIT = 180.0
ESTIMATE = distillation.estimate
KILLED_IN, SPOILT_IN = 4, 1
"""Steps (0-based) in which the second process is killed, or alone sees a number that is not finite."""
SHORT = ["-s", "loop.validate_every=null", "-s", "loop.log_every=6", "-s", "loop.save_every=1"]
"""For launches that end early."""
POLISH = (
    "[{name: polish, share: 1, method: {grid: 8, k: 1, substeps: 3, segments: 1, start: student, student_steps: 2, "
    "weight: none, distance: l2, matching: {weight: 1.0, every: 2, lr: 1.0e-2}, "
    "adversarial: {weight: 0.1, kind: nonsaturating, real: data, noise: 1.0}}}]"
)
"""TLCM's last stage, alone: three updates of different rhythm, on points that the student draws itself."""

ROLLOUT = "[{name: segments, share: 1, method: {grid: 40, k: 2, rollout: 8, distance: l2, weight: none}}]"
"""TLCM's first stage, alone: roll-outs of different lengths, whose calls have different rows."""


def noting(place: Any, name: str, file: Path) -> None:
    """Let calls of `place.name` leave a line in `file`."""
    plain = getattr(place, name)

    def noted(*args: Any, **options: Any) -> Any:
        with file.open("a") as stream:
            stream.write(f"{name}\n")
        return plain(*args, **options)

    setattr(place, name, noted)


def second_process_killed(rank: int) -> None:
    plain = plan.consistency_loss

    def loss(*args: Any) -> Any:
        if rank == 1 and args[1].step == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args)

    plan.consistency_loss = loss


def second_process_spoilt(rank: int) -> None:
    """A scalar of the second process is not finite; gradients and weights are."""
    plain = plan.consistency_loss

    def loss(*args: Any) -> Any:
        result = plain(*args)
        bad = rank == 1 and args[1].step == SPOILT_IN
        result.scalars["extra"] = torch.tensor(float("nan") if bad else 1.0)  # type: ignore[index]
        return result

    plan.consistency_loss = loss


def main_process_fails(rank: int) -> None:
    def refuse(*args: Any) -> Any:
        raise UserError("the disk is full")

    checkpoint.save = refuse


def enter(rank: int, size: int, port: int, did: Path) -> None:
    """Become one process of a launch."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if size > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if "lo" in [name for _, name in socket.if_nameindex()]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["FEWSTEP_CACHE"] = str(did.parent / did.stem.split("-")[0] / "cache")
    validation.Lite0Features = measuring.Lite0Features = Pooled  # type: ignore[assignment,misc]
    trajectory.SHARD, trajectory.MOST_LATENT_POINTS = 4, 2 * 8 * 8  # several files, of several parts
    if did.name.startswith("wide"):  # whose loss is a collective
        distillation.estimate = ESTIMATE
    lay_out = preparation.lay_out

    def noted_lay_out(*args: Any) -> Any:
        """Note whether weights are split: an engine can fall back to whole ones without a word."""
        run = lay_out(*args)
        every = [p for network in run.networks for p in network.parameters()]
        split = [isinstance(p, DTensor) and p.device_mesh.size() == size for p in every]
        with did.open("a") as stream:
            stream.write("split\n" if every and all(split) else "mixed\n" if any(split) else "whole\n")
        return run

    preparation.lay_out = noted_lay_out
    encode = StableDiffusion.encode

    def noted_encode(self: StableDiffusion, prompts: Sequence[str], *more: Any) -> Any:
        """Note how many prompts are read at once."""
        with did.with_suffix(".read").open("a") as stream:
            stream.write(f"{len(prompts)}\n")
        return encode(self, prompts, *more)

    StableDiffusion.encode = noted_encode  # type: ignore[method-assign]
    for place, name in [
        (StableDiffusion, "to_latents"),
        (StableDiffusion, "encode"),
        (validation, "image_generator_of"),
        (validation.Validation, "_evaluate"),
        (ImageGenerator, "latents"),
        (distillation, "export_student"),
    ]:
        noting(place, name, did)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run(folder: Path, overrides: list[str]) -> dict[str, list[int | None]]:
    """All launches, one after another; exit codes by rank (negative: killed by that signal)."""
    words = [word for override in overrides for word in ("-s", override)]

    def start(
        name: str,
        size: int,
        accident: Callable[[int], None] | None = None,
        *more: str,
        recipe: str = "tcd",
        command: Sequence[str] = (),
    ) -> list[int | None]:
        """Launch into the folder NAME, or the part of it before a dash."""
        port = free_port()
        out = folder / name.split("-")[0]
        if accident:  # nothing new to be seen in encoding everything again
            shutil.copytree(folder / "two" / "cache", out / "cache")
        verb = [*(command or ["distill", "--recipe", recipe, *words, *more]), "--out", str(out)]

        def patch(rank: int) -> Callable[[], None]:
            def become() -> None:
                enter(rank, size, port, folder / f"{name}-{rank}.did")
                if accident:
                    accident(rank)

            return become

        running = [launch(verb, folder / f"{name}-{rank}.log", patch(rank)) for rank in range(size)]
        return wait_for_all(running, LIMIT)

    exclusive = folder / "alone.txt"
    exclusive.write_text(
        "".join(f"a {colour} {shape}\n" for colour in ("red", "blue") for shape in ("disc", "ring", "bar"))
    )
    shapes = folder / "shapes"
    shapes.mkdir()
    for i, size in enumerate([(96, 64), (90, 60), (64, 96), (60, 90), (64, 64), (80, 80)] * 2):
        picture = Image.new("RGB", size, "white")
        picture.paste("red" if i % 2 else "blue", (16, 16, 30 + 2 * i, 48))
        picture.save(shapes / f"{i}.png")
        (shapes / f"{i}.txt").write_text(f"a {'red' if i % 2 else 'blue'} bar\n")
    wide = ["loop.validate_every=null", f"data.source={shapes}", "data.buckets=true", "data.size=64"]
    buckets = [word for change in wide for word in ("-s", change)]
    changed = ["loop.validate_every=null", f"data.source={exclusive}", f"stages={POLISH}"]
    polish = [word for change in changed for word in ("-s", change)]
    rollout = [*polish[:-1], f"stages={ROLLOUT}"]
    split = ["-s", "loop.shard=true"]
    long = ["-s", "loop.steps=20", "-s", "loop.validate_every=null", "-s", "optim.lr=1e-4"]
    full = ["-s", "student.kind=full", "-s", "student.rank=64", "-s", "loop.validate_every=null", "-s", "optim.lr=1e-5"]
    kept = ["-s", "loop.validate_every=null", "-s", "data.trajectories=9", "-s", "method.grid=10", "-s", "method.k=9"]
    kept += ["-s", "sampling.grid=10"]
    named = dict(override.split("=", 1) for override in overrides)
    many = folder / "many.txt"
    many.write_text(
        "".join(f"a {c} {s}\n" for c in ("red", "green", "blue") for s in ("disc", "ring", "bar", "square", "dot"))
    )
    judge = ["evaluate", "--prompt-file", str(many), "--teacher", named["teacher"], "--lora", "none"]
    judge += ["--real", named["data.source"], "--steps", "2", "--omega", "1", "--device", "cpu"]
    return {
        "judged1": start("judged1", 1, command=judge),
        "judged2": start("judged2", 2, command=judge),
        "tlcm1": start("tlcm1", 1, None, *polish, recipe="tlcm"),
        "tlcm2": start("tlcm2", 2, None, *polish, recipe="tlcm"),
        "wide1": start("wide1", 1, None, *buckets, recipe="ctm"),
        "wide2": start("wide2", 2, None, *buckets, recipe="ctm"),
        "one": start("one", 1),
        "two": start("two", 2),
        "cut": start("cut", 2, second_process_killed),
        "cut-resumed": start("cut-resumed", 2),
        "spoilt": start("spoilt", 2, second_process_spoilt, *SHORT),
        "failed": start("failed", 2, main_process_fails, *SHORT),
        "long1": start("long1", 1, None, *long),
        "long2": start("long2", 2, None, *long),
        "split": start("split", 2, None, *split),
        "halved": start("halved", 2, second_process_killed, *split),
        "halved-resumed": start("halved-resumed", 1),
        "joined": start("joined", 2, second_process_killed),
        "joined-resumed": start("joined-resumed", 2, None, *split, "-s", "loop.accumulate=2"),
        "tlcm3": start("tlcm3", 2, None, *split, *polish, recipe="tlcm"),
        "rollout1": start("rollout1", 1, None, *rollout, recipe="tlcm"),
        "rollout2": start("rollout2", 2, None, *split, *rollout, recipe="tlcm"),
        # the halves that two processes take: another split would round otherwise, and Adam's first steps show it
        "kd1": start("kd1", 1, None, *kept, "-s", "loop.accumulate=2", recipe="kd"),
        "kd2": start("kd2", 2, None, *kept, recipe="kd"),
        "kd3": start("kd3", 2, None, *kept, *split, recipe="kd"),
        "bf16": start("bf16", 2, None, *kept[2:], *split, "-s", "loop.precision=bf16", recipe="kd"),
        "full1": start("full1", 1, None, *full),
        "full2": start("full2", 2, None, *full, *split),
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
