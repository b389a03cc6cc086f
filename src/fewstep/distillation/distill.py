"""`fewstep distill`: from a teacher and captioned pictures to a few-step student.

Data flows one way: config -> data -> method -> loop -> checkpoint -> export.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.base import blaming_weights
from fewstep.backbones.teachers import teacher_path
from fewstep.common.accelerator import make_accelerator
from fewstep.common.device import pick_device
from fewstep.common.distributed import any_process, fail_together, is_main
from fewstep.common.errors import UserError
from fewstep.common.files import cache_root, check_writable, hold_folder, sweep, write_json
from fewstep.common.tensors import digest
from fewstep.data.buckets import BucketedLatents
from fewstep.data.latents import latent_set
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.estimate import Estimated, estimate, kept_bytes
from fewstep.distillation.nfe_counter import in_words
from fewstep.distillation.precision import asked_outside
from fewstep.distillation.prepare import (
    Run,
    Source,
    encoders_fingerprint,
    lay_out,
    load_teacher,
    on_synthesis,
    on_trajectories,
    open_source,
    prepare,
    read_source,
    with_looks,
)
from fewstep.distillation.save_student import export_student, starting_weights
from fewstep.distillation.stages import parts_of
from fewstep.distillation.synthesis.record import is_synthesis
from fewstep.distillation.validation import REAL, Validation, validation_prompts
from fewstep.inference.generator import ImageGenerator
from fewstep.methods.discriminator import FeatureCritic
from fewstep.methods.update_plan import FrozenNetworks, make_update_plan, start_from
from fewstep.training.checkpoint import read_state
from fewstep.training.loop import Trained, Update, check_split, train
from fewstep.training.run_folder import RunLog, check_same_run, checkpoints, last_step


def update_plan(run: Run) -> list[Update]:
    """What the loop is handed: the family's plan on the samples of `fetch_of`."""
    config = run.config
    return make_update_plan(
        config.method,
        config.optim,
        run.student,
        run.counted,
        lambda batch, rng: batch["sample"],
        frozen_networks_of(run),
    )


def frozen_networks_of(run: Run) -> FrozenNetworks:
    """The frozen networks that the recipe asks for, and its critic."""
    config, device = run.config, run.backbone.device
    critic = None
    if config.method.adversarial.weight:
        critic = FeatureCritic(run.features, run.backbone.feature_channels, seed=config.loop.seed).to(device)
    return FrozenNetworks(run.features, run.latent_lpips, critic, run.reward)


def make_validation(run: Run, out: Path, cache: Path) -> Validation:
    """What judges the student on the way; draws the teacher's pictures if the cache has none yet."""
    config = run.config

    def keep(weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        export_student(config, run.backbone, weights, out / "best", notes)

    # at the size that is learned: its pictures stand beside real ones and the teacher's
    sampling = config.sampling.model_copy(update={"size": None})
    computed, _ = asked_outside(config, run.backbone.device)
    image_generator = ImageGenerator(run.backbone, run.denoiser, sampling, "student", computed)
    seen = run.watched(max(REAL, config.validation.count))
    prompts = validation_prompts(config, [said[0] for said in seen.captions])
    real = None if seen.pictures is None else seen.pictures.read(range(min(REAL, len(seen))))
    return Validation(config, image_generator, run.student.parameters("student"), prompts, real, out, cache, keep)


def distill(
    config: DistillConfig, out: Path, *, cache: Path | None = None, shared: Path | None = None, quiet: bool = False
) -> Path:
    """Distil, resuming what `out` already holds; return the student's file.

    The run folder gets config.yaml, versions.json, log.jsonl, tensorboard/, checkpoints/, evaluations.json, grids/ and
    best/ (where quality is watched) and student/. Each stage of a list has such a folder of its own below stages/.

    Args:
        cache: folder for trajectories and a distance that is trained first; the run's own if left out.
        shared: folder of encodings and the teacher's pictures; `cache` if that is given, else the user's.

    Raises:
        UserError: anything wrong with the config, the files or the place, before training starts.
    """
    # first: on several GPUs it says which one is this process's
    accelerator = make_accelerator(config.loop.precision, pick_device(config.device))
    for stage in config.each_stage():
        check_split(stage.loop, accelerator)
        if stage.method.distance == "latent_lpips" and not stage.latent_lpips.folder:
            check_split(stage.latent_lpips.loop, accelerator)
    main = accelerator.is_main_process
    target, place, shared = out / "student", cache or out / "cache", shared or cache or shared_cache(out)
    with ExitStack() as held:
        held.enter_context(blaming_weights(teacher_path(config.teacher)))
        with fail_together():
            if main:
                held.enter_context(hold_folder(out))  # before anything is encoded into it
                for part in ("student", "cache"):
                    sweep(out / part)
                sweep(shared, LEFT_BEHIND)
        parts = parts_of(config, config.stages, config.loop.steps, out)
        source = open_checked(parts[0].config, parts[0].folder, shared)  # refused before anything is written
        if config.stages:
            with fail_together():
                held.enter_context(RunLog(out, config, title=config.recipe, main=main, quiet=True))
        start: Mapping[str, Tensor] | None = None
        done = 0
        for number, (name, folder, stage) in enumerate(parts):
            title = f"distil {config.recipe}" + (f", {number + 1}/{len(parts)}: {name}" if name else "")
            if number:
                source = open_checked(stage, folder, shared)
            announced = not quiet and announce(stage, folder, shared, source)
            silent = quiet or number > 0
            run = prepare(stage, place, accelerator.device, shared=shared, source=source, quiet=silent)
            inputs = run.inputs
            if start is None and stage.student.start:
                start = starting_weights(stage.student, run.backbone)
            if start is not None:
                inputs["start"] = digest(start)
                start_from(stage.method, run.student, start)
            with ExitStack() as logged:
                with fail_together():
                    log = logged.enter_context(
                        RunLog(folder, stage, title=title, inputs=inputs, main=main, quiet=quiet)
                    )
                trained = train_run(run, folder, shared, log, accelerator, announced)
            start, done = trained.weights["student"], done + trained.step
            with fail_together():
                if main:
                    own = folder / "student"
                    target = export_student(run.config, run.backbone, start, own, {"steps_trained": done})
            if number + 1 < len(parts):  # the next stage loads networks of its own
                del run, trained
                gc.collect()
                torch.cuda.empty_cache()
        if config.stages:
            with fail_together():
                if main:
                    target = export_student(
                        run.config, run.backbone, start or {}, out / "student", {"steps_trained": done}
                    )
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


def open_checked(config: DistillConfig, folder: Path, cache: Path) -> Source | None:
    """Open the data of a run, and refuse them if its folder holds a run on others."""
    source = open_source(config, cache, last_step(folder / "checkpoints"))
    if source is not None:
        check_same_run(folder, config, source.inputs, whole=False)
    return source


def announce(config: DistillConfig, folder: Path, cache: Path, source: Source | None) -> bool:
    """Print what a run will take before its data are encoded. All processes must ask.

    Returns:
        whether it was printed: if nothing is to be encoded, the run itself is timed later.

    Raises:
        UserError: its step would not fit into memory.
    """
    lacking = source.lacking(cache) if source else (0, 0)
    if not any_process(sum(lacking) > 0):
        return False
    place = folder / "cache" / "estimate"  # which all processes of the launch see
    estimated = replace(estimate_stage(config, source, lacking, place), data="")  # which is told when it is read
    gc.collect()
    torch.cuda.empty_cache()
    with fail_together():
        if is_main():
            shutil.rmtree(place, ignore_errors=True)
    if is_main():
        print("\n".join([f"writes to {folder}", *estimated.lines()]), file=sys.stderr)
    estimated.check()
    return True


def train_run(
    run: Run, out: Path, cache: Path, log: RunLog, accelerator: Accelerator, announced: bool = False
) -> Trained:
    """Train what is laid out, from where the run folder stands.

    Args:
        cache: folder that the teacher's pictures are shared in.
        announced: whether its estimate was printed already.
    """
    config, main = run.config, accelerator.is_main_process
    if main:
        for place in ("best", "grids"):
            sweep(out / place)

    plan = update_plan(run)
    before = last_step(out / "checkpoints")
    told = main and not log.quiet
    # split networks, and losses that ask all processes, run in all or in none
    joint = config.loop.shard or config.method.balance == "gradient"
    held = run.data.latents
    visits = held.order(config.loop.seed, config.loop.batch) if isinstance(held, BucketedLatents) else None
    if before < config.loop.steps and (told or joint) and not announced:
        estimated = estimate(plan, fetch_of(run), run.data, config, run.networks, before, visits)
        estimated.check()
        if told:
            print("\n".join([f"writes to {out}", *estimated.lines()]), file=sys.stderr)
    validate, judged = None, dict[str, float]()
    if config.loop.validate_every:
        judge = make_validation(run, out, cache)

        def evaluate_weights(step: int, weights: dict[str, dict[str, Tensor]]) -> Mapping[str, float]:
            judged.update(judge(step, weights))
            return judged

    counted = counted_until(out)
    run.nfe_counter.start(counted.evaluations)
    own = config.loop.batch // accelerator.num_processes

    def count(step: int) -> dict[str, Any]:
        new = step - before
        seen = {"steps": counted.steps + new, "samples": counted.samples + new * own}
        return seen | {"evaluations": run.nfe_counter.counts}

    trained = train(plan, fetch_of(run), len(run.data), config.loop, log, accelerator, validate, count, visits)
    ended = counted_until(out)
    if ended.steps and main:
        by_role = {role: number / ended.samples for role, number in ended.evaluations.items()}
        write_json(out / "evaluations.json", {"steps": ended.steps, "a_sample_and_step": by_role})
        if told and before < config.loop.steps:
            calls = in_words(by_role)
            line = f"{log.title}: {calls} network evaluations a sample and step, counted over {ended.steps} steps"
            quality = [f"{name.removeprefix('validation/')} {value:.4g}" for name, value in judged.items()]
            print("; ".join([line, *quality]), file=sys.stderr)
    return trained


class Counted(NamedTuple):
    """Steps, samples that the main process saw in them (launches differ in size), its network evaluations by role."""

    steps: int = 0
    samples: int = 0
    evaluations: Mapping[str, int] = {}


def counted_until(out: Path) -> Counted:
    """What the last checkpoint of a run has counted."""
    found = checkpoints(out / "checkpoints")
    beside = read_state(found[-1]).get("beside") if found else None
    return Counted(**beside) if beside else Counted()


def with_trajectories(config: DistillConfig, count: int) -> DistillConfig:
    """The config with another number of stored trajectories."""
    return config.model_copy(update={"data": config.data.model_copy(update={"trajectories": count})})


def estimate_run(config: DistillConfig) -> list[Estimated]:
    """What a run will take, stage by stage, from its real networks: one batch encoded, one step timed.

    Nothing is written.

    Raises:
        UserError: the teacher or the data cannot be read.
    """
    names = [stage.name for stage in config.stages] or [""]
    return [replace(estimate_stage(stage), name=name) for name, stage in zip(names, config.each_stage(), strict=True)]


FEW = 64
"""Most samples that are encoded for an estimate."""


def estimate_stage(
    config: DistillConfig,
    source: Source | None = None,
    lacking: tuple[int, int] | None = None,
    place: Path | None = None,
) -> Estimated:
    """The same of one stage. A distance that would be trained first is timed as L2, which takes less.

    Args:
        source: its data, if they are open already.
        lacking: how many pictures and captions are to be encoded; all that its steps can ask for, if left out.
        place: folder for what is encoded for it, of which nothing is kept; a temporary one if left out.
    """
    method = config.method
    if method.distance == "latent_lpips" and not config.latent_lpips.folder:
        config = config.model_copy(update={"method": method.model_copy(update={"distance": "l2"})})
    backbone = load_teacher(config, pick_device(config.device))
    if is_synthesis(config.data.source):
        run = on_synthesis(config, backbone, Path())
        return estimate(update_plan(run), fetch_of(run), run.data, config, run.networks)
    with nullcontext(place) if place else tempfile.TemporaryDirectory() as cache:
        captioned = source.captioned if source else read_source(config, backbone.folder, Path(cache))
        backbone.load_encoders()
        few = captioned.take(range(min(max(2, config.loop.batch), len(captioned), FEW)))
        fingerprint = encoders_fingerprint(backbone.folder)  # before the clock: hashed once for any number of pictures
        started = time.perf_counter()
        data = latent_set(few, backbone, fingerprint, Path(cache), backbone.latent_shape)
        needed = min(len(captioned), config.loop.steps * config.loop.batch) if lacking is None else max(lacking)
        encoding = (time.perf_counter() - started) / len(few) * needed
        share = captions_share = needed / len(few)
        drawn = min(config.data.trajectories, config.loop.batch, FEW)
        run = lay_out(with_trajectories(config, drawn), backbone, few, data)
        named = config.latent_lpips.folder
        run = with_looks(run, Path(named) if named else None)
        if config.method.start == "trajectory":
            started = time.perf_counter()
            run, share = on_trajectories(run, Path(cache)), config.data.trajectories / drawn
            encoding += (time.perf_counter() - started) * share
        estimated = estimate(update_plan(run), fetch_of(run), run.data, config, run.networks)
    said = sum(kept_bytes(rows) for rows in run.data.table.values())
    held = share * kept_bytes(run.data.latents) + captions_share * said
    return replace(estimated, encoding_seconds=encoding, data_bytes=round(held), data=captioned.line())
