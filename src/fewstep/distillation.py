"""`fewstep distill`: from a teacher and captioned pictures to a few-step student.

Data flows one way: config -> data -> method -> loop -> checkpoint -> export.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.backbones.sd import StableDiffusion, load_backbone
from fewstep.cost import Estimated, bytes_of, estimate
from fewstep.data import pictures
from fewstep.data.latents import LatentSet, latent_set
from fewstep.denoiser import Condition, Denoiser
from fewstep.device import pick_device
from fewstep.drawing import Artist
from fewstep.draws import Draws, order
from fewstep.errors import UserError
from fewstep.evaluation.settings import KID_FEWEST
from fewstep.export.conditioning import save_told, split_weights
from fewstep.export.lora import save_lora
from fewstep.export.pipeline import save_pipeline
from fewstep.files import atomic_folder, sweep, taken
from fewstep.folder import read_folder
from fewstep.objectives.heads import FeatureCritic
from fewstep.objectives.points import Sample
from fewstep.plan import family_plan, roles_of, start_from
from fewstep.processes import together
from fewstep.role_layout import Student, make_student
from fewstep.roles import BASE, SeparateRoles
from fewstep.settings import DistillConfig, teacher_path
from fewstep.stages import parts_of
from fewstep.tensors import digest
from fewstep.training.cpu import speed_up
from fewstep.training.launch import make_accelerator
from fewstep.training.loop import Batch, Trained, Update, check_split, train
from fewstep.training.run import RunLog, last_step
from fewstep.trajectories import stored_trajectories
from fewstep.watch import REAL, Watch, watched_prompts
from fewstep.world import emoji8


@dataclass(frozen=True)
class Run:
    """A distillation that is ready to start: everything loaded, nothing trained."""

    config: DistillConfig
    backbone: StableDiffusion
    captioned: pictures.Captioned
    data: LatentSet
    student: Student
    denoiser: Denoiser
    omega: Tensor | None = None

    @cached_property
    def base(self) -> str:
        """Which weights the student belongs to."""
        return self.backbone.folder.fingerprint("unet")

    def features(self, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Features of the frozen teacher, with gradient to x."""
        with self.student.roles.use(BASE) as network:
            return self.backbone.features(network, x, t, condition)

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it trains on: a run is resumed on the same only."""
        return {"teacher": self.backbone.folder.identity("unet", "scheduler"), "data": self.data.key}


def read_pictures(config: DistillConfig, size: int) -> pictures.Captioned:
    """The captioned pictures that the config names, `size` pixels a side.

    Raises:
        UserError: they cannot be read, are of another size, or are too few to watch the quality by.
    """
    if config.data.source == "emoji8":
        emoji8.check_size(size, "data.source = 'emoji8'")
        captioned = emoji8.captioned(config.data.captions, config.loop.seed)
    else:
        captioned = pictures.from_folder(Path(config.data.source), size)
    if config.loop.watch_every and len(captioned) < KID_FEWEST:
        raise UserError(
            f"loop.watch_every takes KID from at least {KID_FEWEST} pictures, data.source has {len(captioned)}; "
            "give more, or loop.watch_every=null"
        )
    return captioned


def prepare(config: DistillConfig, cache: Path, device: torch.device) -> Run:
    """Load the teacher, encode the data, and lay out the roles.

    Raises:
        UserError: the teacher or the data cannot be read, or do not fit.
    """
    backbone = load_backbone(read_folder(teacher_path(config.teacher)).path, device)
    captioned = read_pictures(config, backbone.picture_size)
    backbone.load_encoders()  # a broken text encoder is told of before the pictures are encoded
    data = latent_set(captioned, backbone, encoders_fingerprint(backbone), cache)
    return on_trajectories(lay_out(config, backbone, captioned, data), cache)


def encoders_fingerprint(backbone: StableDiffusion) -> str:
    """Fingerprint of what makes latents and text states."""
    return backbone.folder.identity("vae", "text_encoder", "tokenizer")


def lay_out(config: DistillConfig, backbone: StableDiffusion, captioned: pictures.Captioned, data: LatentSet) -> Run:
    """Let the encoders go, and lay out the roles."""
    backbone.release_encoders()
    if backbone.device.type == "cpu":
        speed_up(backbone.network)
    student = make_student(backbone, config.student, roles_of(config.method), config.loop.seed, config.method.told)
    denoiser = Denoiser(student.call, backbone.path, backbone.prediction)
    return Run(config, backbone, captioned, data, student, denoiser)


def on_trajectories(run: Run, cache: Path) -> Run:
    """The run on stored trajectories of its teacher, where its recipe starts on them; itself elsewhere."""
    if run.config.method.start != "trajectory":
        return run
    data, omega = stored_trajectories(run.config, run.backbone, run.denoiser, run.data, cache)
    return replace(run, data=data, omega=omega)


def update_plan(run: Run) -> list[Update]:
    """What the loop is handed: the family's plan on the run's data."""
    config, device = run.config, run.backbone.device
    # a stored trajectory was drawn with its prompt, or without: another one would be told of a path that it is not on
    empty = config.data.empty_prompts if run.omega is None else 0.0

    def sample(batch: Batch, draws: Draws) -> Sample:
        items = batch["items"]
        condition = run.data.condition(items, draws, empty, device)
        omega = None if run.omega is None else run.omega[items]
        return Sample(batch["latents"].float(), condition, run.data.null(len(items), device), omega)

    method = config.method
    critic = None
    if method.adversarial.weight:
        critic = FeatureCritic(run.features, run.backbone.feature_channels, seed=config.loop.seed).to(device)
    return family_plan(method, config.optim, run.student, run.denoiser, sample, run.features, critic)


def export_student(run: Run, weights: Mapping[str, Tensor], target: Path, notes: Mapping[str, Any]) -> Path:
    """Write a student for use: a LoRA file, or a whole pipeline folder for a full one.

    Returns:
        the file or folder.
    """
    config = run.config
    notes = {"method": config.recipe, "guidance_seen": config.method.guidance.model_dump(), **notes}
    own, told = split_weights(weights)
    if config.student.kind == "lora":
        with atomic_folder(target) as part:  # both files, or the ones before: half a student draws nonsense
            save_told(part, told)
            file = save_lora(
                part,
                own,
                rank=config.student.rank,
                alpha=config.student.lora_alpha,
                targets=list(config.student.targets or run.backbone.targets),
                base=run.base,
                sampling=config.sampling,
                notes=notes,
            )
        return target / file.name
    network = run.backbone.fresh_network()
    network.load_state_dict(own)
    record = {"base": run.base, "sampling": config.sampling.model_dump(mode="json"), **notes}
    return save_pipeline(target, run.backbone.folder.path, network, record, told)


def networks(run: Run) -> list[nn.Module]:
    """Every network of the run: one in LoRA mode, one a role in full fine-tuning."""
    roles = run.student.roles
    return list(roles.networks.values()) if isinstance(roles, SeparateRoles) else [roles.network]


def some(run: Run, count: int) -> pictures.Captioned:
    """Up to `count` of the training pictures with their captions, drawn at random, the same for each run."""
    n = len(run.captioned)
    return run.captioned.take(order(run.config.loop.seed, n, 0, min(n, count)))


def make_watch(run: Run, out: Path) -> Watch:
    """What judges the student on the way; draws the teacher's pictures if the run folder has none yet."""
    config = run.config

    def keep(weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        export_student(run, weights, out / "best", notes)

    artist = Artist(run.backbone, run.denoiser, config.sampling, "student")
    seen = some(run, max(REAL, config.watch.count))
    prompts = watched_prompts(config, [said[0] for said in seen.captions])
    real = seen.pictures.read(range(min(REAL, len(seen))))
    return Watch(config, artist, run.student.parameters("student"), prompts, real, out, keep)


def distill(config: DistillConfig, out: Path, *, cache: Path | None = None, quiet: bool = False) -> Path:
    """Distil, resuming what `out` already holds; return the student's file.

    The run folder gets config.yaml, versions.json, log.jsonl, tensorboard/, checkpoints/, grids/, best/ (where
    quality is watched) and student/.

    Raises:
        UserError: anything wrong with the config, the files or the place, before training starts.
    """
    # first: on several GPUs it says which one is this process's
    accelerator = make_accelerator(config.loop.precision, pick_device(config.device))
    check_split(config.loop, accelerator)
    main = accelerator.is_main_process
    target, place = out / "student", cache or out / "cache"
    with ExitStack() as held:
        with together():
            if main:
                held.enter_context(taken(out))  # before anything is encoded into it
                for part in ("student", "cache"):
                    sweep(out / part)
        parts = parts_of(config, config.stages, config.loop.steps, out)
        if config.stages:
            with together():
                held.enter_context(RunLog(out, config, title=config.recipe, main=main, quiet=True))
        start: Mapping[str, Tensor] | None = None
        done = 0
        for number, (name, folder, stage) in enumerate(parts):
            title = f"distil {config.recipe}" + (f", {number + 1}/{len(parts)}: {name}" if name else "")
            run = prepare(stage, place, accelerator.device)
            inputs = run.inputs
            if start is not None:
                inputs["start"] = digest(start)
                start_from(stage.method, run.student, start)
            with ExitStack() as logged:
                with together():
                    log = logged.enter_context(
                        RunLog(folder, stage, title=title, inputs=inputs, main=main, quiet=quiet)
                    )
                trained = train_run(run, folder, log, accelerator)
            start, done = trained.weights["student"], done + trained.step
        with together():
            if main:
                target = export_student(run, start or {}, target, {"steps_trained": done})
    return target


def train_run(run: Run, out: Path, log: RunLog, accelerator: Accelerator) -> Trained:
    """Train what is laid out, from where the run folder stands."""
    config, device, main = run.config, accelerator.device, accelerator.is_main_process
    if main:
        for place in ("best", "grids"):
            sweep(out / place)

    def fetch(items: np.ndarray) -> Batch:
        rows = torch.from_numpy(items)
        return {"items": rows, "latents": run.data.latents[rows].to(device, non_blocking=True)}

    plan = update_plan(run)
    unfinished = last_step(out / "checkpoints") < config.loop.steps
    if unfinished and main and not log.quiet:
        estimated = estimate(plan, run.data, config, networks(run))
        print("\n".join([f"writes to {out}", *estimated.lines()]), file=sys.stderr)
    watch = None
    with together():
        if main and config.loop.watch_every:
            watch = make_watch(run, out)
    return train(plan, fetch, len(run.data), config.loop, log, accelerator, watch)


def with_trajectories(config: DistillConfig, count: int) -> DistillConfig:
    """The config with another number of stored trajectories."""
    return config.model_copy(update={"data": config.data.model_copy(update={"trajectories": count})})


def estimate_run(config: DistillConfig) -> Estimated:
    """What a run will take, from its real networks: one batch encoded, one step timed. Nothing is written.

    Raises:
        UserError: the teacher or the data cannot be read.
    """
    backbone = load_backbone(read_folder(teacher_path(config.teacher)).path, pick_device(config.device))
    captioned = read_pictures(config, backbone.picture_size)
    backbone.load_encoders()
    few = captioned.take(range(min(config.loop.batch, len(captioned))))
    fingerprint = encoders_fingerprint(backbone)  # before the clock starts: hashed once for any number of pictures
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        data = latent_set(few, backbone, fingerprint, Path(cache))
        encoding = (time.perf_counter() - started) / len(few) * len(captioned)
        share = captions_share = len(captioned) / len(few)
        drawn = min(config.data.trajectories, config.loop.batch)
        run = lay_out(with_trajectories(config, drawn), backbone, few, data)
        if config.method.start == "trajectory":
            started = time.perf_counter()
            run, share = on_trajectories(run, Path(cache)), config.data.trajectories / drawn
            encoding += (time.perf_counter() - started) * share
    estimated = estimate(update_plan(run), run.data, config, networks(run))
    held = share * bytes_of([run.data.latents]) + captions_share * bytes_of(run.data.table.values())
    return replace(estimated, encoding_seconds=encoding, data_bytes=round(held))
