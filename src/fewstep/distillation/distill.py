"""`fewstep distill`: from a teacher and captioned pictures to a few-step student.

Data flows one way: config -> data -> method -> loop -> checkpoint -> export.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.base import naming_bad_weights
from fewstep.common.accelerator import make_accelerator
from fewstep.common.device import pick_device
from fewstep.common.distributed import any_process, fail_together, is_main
from fewstep.common.errors import UserError
from fewstep.common.files import cache_root, check_writable, hold_folder, sweep, write_json
from fewstep.common.messages import logger
from fewstep.common.tensors import digest
from fewstep.data.buckets import BucketedLatents
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.checks import Inputs, read_inputs
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.estimate import estimate
from fewstep.distillation.estimate_run import estimate_stage
from fewstep.distillation.nfe_counter import in_words
from fewstep.distillation.prepare import Run, prepare
from fewstep.distillation.run_data import CaptionedData, open_data
from fewstep.distillation.save_student import export_student, starting_weights
from fewstep.distillation.synthesis.record import SynthesizedSet
from fewstep.distillation.validation import Validation
from fewstep.methods.update_plan import start_from
from fewstep.training.checkpoint import read_state
from fewstep.training.loop import Trained, check_split, train
from fewstep.training.run_folder import Callback, RunLog, check_same_run, checkpoints, last_step


def distill(
    config: DistillConfig,
    out: Path,
    *,
    inputs: Inputs | None = None,
    cache: Path | None = None,
    shared: Path | None = None,
    quiet: bool = False,
    callback: Callback | None = None,
) -> Path:
    """Distil, resuming what `out` already holds; return the student's file.

    The run folder gets config.yaml, versions.json, log.jsonl, tensorboard/, checkpoints/, evaluations.json, student/,
    and with validation grids/ and best/. Each stage of a list has such a folder of its own below stages/.

    Args:
        inputs: what the config names, if it was read already.
        cache: folder for trajectories and a distance that is trained first; the run's own if left out.
        shared: folder of encodings and the teacher's pictures; `cache` if that is given, else the user's.
        callback: called with step and figures of each log line and validation.

    Raises:
        UserError: anything wrong with the config, the files or the place, before training starts.
    """
    # first: on several GPUs it picks this process's
    accelerator = make_accelerator(config.loop.precision, pick_device(config.device))
    for stage in config.each_stage():
        check_split(stage.loop, accelerator)
        if stage.method.distance == "latent_lpips" and not stage.latent_lpips.folder:
            check_split(stage.latent_lpips.loop, accelerator)
    main = accelerator.is_main_process
    target, place, shared = out / "student", cache or out / "cache", shared or cache or shared_cache(out)
    inputs = inputs or read_inputs(config)
    with ExitStack() as held:
        held.enter_context(naming_bad_weights(inputs.teacher))
        with fail_together():
            if main:
                held.enter_context(hold_folder(out))  # before anything is encoded into it
                for part in ("student", "cache"):
                    sweep(out / part)
                sweep(shared, LEFT_BEHIND)
        parts = config.runs(out)
        (_, folder, stage), *_ = parts
        data = open_checked(stage, inputs, folder, shared)  # refused before anything is written
        if config.stages:
            with fail_together():
                held.enter_context(RunLog(out, config, title=config.recipe, main=main, quiet=True))
        start: Mapping[str, Tensor] | None = None
        done = 0
        for number, (name, folder, stage) in enumerate(parts):
            title = f"distil {config.recipe}" + (f", {number + 1}/{len(parts)}: {name}" if name else "")
            if number:
                data = open_checked(stage, inputs, folder, shared)
            announced = not quiet and announce(stage, inputs, folder, shared, data)
            silent = quiet or number > 0
            run = prepare(stage, place, accelerator.device, inputs=inputs, shared=shared, data=data, quiet=silent)
            fingerprints = run.inputs
            if start is None and stage.student.start and inputs.start:
                start = starting_weights(stage.student, inputs.start)
            if start is not None:
                fingerprints["start"] = digest(start)
                start_from(stage.method, run.student, start)
            with ExitStack() as logged:
                with fail_together():
                    log = logged.enter_context(
                        RunLog(
                            folder,
                            stage,
                            title=title,
                            inputs=fingerprints,
                            main=main,
                            quiet=quiet,
                            callback=callback,
                        )
                    )
                trained = train_run(run, folder, shared, log, accelerator, announced)
            start, done = trained.weights["student"], done + trained.step
            last = number + 1 == len(parts)
            with fail_together():
                for own in dict.fromkeys([folder, out] if last else [folder]) if main else ():
                    notes = {"steps_trained": done}
                    target = export_student(run.config, run.backbone, start, own / "student", notes)
            if not last:  # the next stage loads networks of its own
                del run, trained
                gc.collect()
                torch.cuda.empty_cache()
    return target


LEFT_BEHIND = 86400.0
"""Seconds after which a file that is half-written in the shared cache belongs to a process that was killed."""


def shared_cache(out: Path) -> Path:
    """Return the folder of encodings that runs share: the user's, or the run's own if that is read only."""
    place = cache_root() / "encoded"
    try:
        check_writable(place)
    except UserError:
        return out / "cache"
    return place


def open_checked(config: DistillConfig, inputs: Inputs, folder: Path, cache: Path) -> CaptionedData | None:
    """Open the data of a run, and refuse them if its folder holds a run on others; None for a synthesised set."""
    if isinstance(inputs.source, SynthesizedSet):
        return None
    data = open_data(config, inputs.source, inputs.teacher, cache, last_step(folder / "checkpoints"))
    check_same_run(folder, config, data.inputs, whole=False)
    return data


def announce(config: DistillConfig, inputs: Inputs, folder: Path, cache: Path, data: CaptionedData | None) -> bool:
    """Print what a run will take before its data are encoded. All processes must call it.

    Returns:
        whether it was printed; if nothing is to be encoded, the run itself is timed later.

    Raises:
        UserError: its step would not fit into memory.
    """
    lacking = data.lacking(cache) if data else (0, 0)
    if not data or not any_process(sum(lacking) > 0):
        return False
    place = folder / "cache" / "estimate"  # which all processes of the launch can read
    estimated = estimate_stage(config, inputs, data.captioned, lacking, place)
    estimated = replace(estimated, data="")  # printed when the data are encoded
    gc.collect()
    torch.cuda.empty_cache()
    with fail_together():
        if is_main():
            shutil.rmtree(place, ignore_errors=True)
    if is_main():
        logger.info("\n".join([f"writes to {folder}", *estimated.lines()]))
    estimated.check()
    return True


def train_run(
    run: Run, out: Path, cache: Path, log: RunLog, accelerator: Accelerator, announced: bool = False
) -> Trained:
    """Train a prepared run from the last checkpoint of its folder.

    Args:
        cache: folder of the teacher's pictures, which runs share.
        announced: whether its estimate was printed already.
    """
    config, main = run.config, accelerator.is_main_process
    if main:
        for place in ("best", "grids"):
            sweep(out / place)

    plan = run.update_plan()
    before = last_step(out / "checkpoints")
    loud = main and not log.quiet
    # split networks, and losses that communicate, run in all processes or in none
    joint = config.loop.shard or config.method.balance == "gradient"
    held = run.data.latents
    visits = held.order(config.loop.seed, config.loop.batch) if isinstance(held, BucketedLatents) else None
    if before < config.loop.steps and (loud or joint) and not announced:
        estimated = estimate(run, plan, before, visits)
        estimated.check()
        if loud:
            logger.info("\n".join([f"writes to {out}", *estimated.lines()]))
    if loud and config.method.reward.weight and config.loop.validate_every and not config.validation.scorer:
        logger.info(f"{log.title}: no scorer checks the trained one; name one by validation.scorer")
    validate = Validation(run, out, cache, log.picture) if config.loop.validate_every else None
    if validate:  # the student still has its first weights, as the loop restores a checkpoint
        validate.draw_start(show=not before)
    counted = counted_until(out)
    run.nfe_counter.clear()
    run.nfe_counter.update(counted.evaluations)
    own = config.loop.batch // accelerator.num_processes

    def count(step: int) -> dict[str, Any]:
        new = step - before
        seen = {"steps": counted.steps + new, "samples": counted.samples + new * own}
        return seen | {"evaluations": dict(sorted(run.nfe_counter.items()))}

    trained = train(plan, fetch_of(run), len(run.data), config.loop, log, accelerator, validate, count, visits)
    ended = counted_until(out)
    if ended.steps and main:
        by_role = {role: number / ended.samples for role, number in ended.evaluations.items()}
        write_json(out / "evaluations.json", {"steps": ended.steps, "a_sample_and_step": by_role})
        if loud and before < config.loop.steps:
            calls = in_words(by_role)
            logger.info(f"{log.title}: {calls} network evaluations a sample and step, over {ended.steps} steps")
    return trained


class Counted(NamedTuple):
    """Steps, the main process's samples in them (launches differ in size) and its network evaluations by role."""

    steps: int = 0
    samples: int = 0
    evaluations: Mapping[str, int] = {}


def counted_until(out: Path) -> Counted:
    """Return the counts of a run's last checkpoint."""
    found = checkpoints(out / "checkpoints")
    beside = read_state(found[-1]).get("beside") if found else None
    return Counted(**beside) if beside else Counted()
