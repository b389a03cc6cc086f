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
from fewstep.cost import Estimated, estimate
from fewstep.data import pictures
from fewstep.data.latents import LatentSet, latent_set
from fewstep.denoiser import Denoiser
from fewstep.device import pick_device
from fewstep.drawing import Artist
from fewstep.draws import Draws, order
from fewstep.errors import UserError
from fewstep.evaluation.settings import KID_FEWEST
from fewstep.export.lora import save_lora
from fewstep.export.pipeline import save_pipeline
from fewstep.files import sweep, taken
from fewstep.folder import read_folder
from fewstep.loss import Loss
from fewstep.objectives.consistency import consistency_loss
from fewstep.processes import together
from fewstep.role_layout import Student, make_student
from fewstep.roles import SeparateRoles
from fewstep.settings import DistillConfig, teacher_path
from fewstep.training.cpu import speed_up
from fewstep.training.launch import make_accelerator
from fewstep.training.loop import Batch, Follower, Update, check_split, train
from fewstep.training.run import RunLog, last_step
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

    @cached_property
    def base(self) -> str:
        """Which weights the student belongs to."""
        return self.backbone.folder.fingerprint("unet")

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
    return lay_out(config, backbone, captioned, data)


def encoders_fingerprint(backbone: StableDiffusion) -> str:
    """Fingerprint of what makes latents and text states."""
    return backbone.folder.identity("vae", "text_encoder", "tokenizer")


def lay_out(config: DistillConfig, backbone: StableDiffusion, captioned: pictures.Captioned, data: LatentSet) -> Run:
    """Let the encoders go, and lay out the roles."""
    backbone.release_encoders()
    if backbone.device.type == "cpu":
        speed_up(backbone.network)
    roles = ("student", "target") if config.method.target == "ema" else ("student",)
    student = make_student(backbone, config.student, roles, config.loop.seed)
    denoiser = Denoiser(student.call, backbone.path, backbone.prediction)
    return Run(config, backbone, captioned, data, student, denoiser)


def update_plan(run: Run) -> list[Update]:
    """The consistency family's plan: one line, the student."""
    config, device = run.config, run.backbone.device

    def loss(batch: Batch, draws: Draws) -> Loss:
        items = batch["items"]
        condition = run.data.condition(items, draws, config.data.empty_prompts, device)
        null = run.data.null(len(items), device)
        return consistency_loss(config.method, run.denoiser, batch["latents"], condition, null, draws)

    follower = None
    if config.method.target == "ema":
        follower = Follower(run.student.roles.parameters("target"), config.method.target_decay)
    return [Update("student", run.student.roles.parameters("student"), loss, config.optim, follower=follower)]


def export_student(run: Run, weights: Mapping[str, Tensor], target: Path, notes: Mapping[str, Any]) -> Path:
    """Write a student for use: a LoRA file, or a whole pipeline folder for a full one.

    Returns:
        the file or folder.
    """
    config = run.config
    notes = {"method": config.recipe, "guidance_seen": config.method.guidance.model_dump(), **notes}
    if config.student.kind == "lora":
        return save_lora(
            target,
            weights,
            rank=config.student.rank,
            alpha=config.student.lora_alpha,
            targets=list(config.student.targets or run.backbone.targets),
            base=run.base,
            sampling=config.sampling,
            notes=notes,
        )
    network = run.backbone.fresh_network()
    network.load_state_dict(dict(weights))
    record = {"base": run.base, "sampling": config.sampling.model_dump(mode="json"), **notes}
    return save_pipeline(target, run.backbone.folder.path, network, record)


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
    return Watch(config, artist, run.student.roles.parameters("student"), prompts, real, out, keep)


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
    with ExitStack() as held:
        with together():
            if main:
                held.enter_context(taken(out))  # before anything is encoded into it
        run = prepare(config, cache or out / "cache", accelerator.device)
        with together():
            title = f"distil {config.recipe}"
            log = held.enter_context(RunLog(out, config, title=title, inputs=run.inputs, main=main, quiet=quiet))
        return train_and_export(run, out, log, accelerator)


def train_and_export(run: Run, out: Path, log: RunLog, accelerator: Accelerator) -> Path:
    """Train what is laid out, from where the run folder stands; return the student's file."""
    config, device, main = run.config, accelerator.device, accelerator.is_main_process
    if main:
        for place in ("student", "best", "grids", "cache"):
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
    trained = train(plan, fetch, len(run.data), config.loop, log, accelerator, watch)
    target = out / "student"
    with together():
        if main:
            target = export_student(run, trained.weights["student"], target, {"steps_trained": trained.step})
    return target


def estimate_run(config: DistillConfig) -> Estimated:
    """What a run will take, from its real networks: one batch encoded, one step timed. Nothing is written.

    Raises:
        UserError: the teacher or the data cannot be read.
    """
    backbone = load_backbone(read_folder(teacher_path(config.teacher)).path, pick_device(config.device))
    captioned = read_pictures(config, backbone.picture_size)
    backbone.load_encoders()
    few = captioned.take(range(min(config.loop.batch, len(captioned))))
    fingerprint = encoders_fingerprint(
        backbone
    )  # before the clock starts: hashed once, whatever the number of pictures
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        data = latent_set(few, backbone, fingerprint, Path(cache))
        encoding = (time.perf_counter() - started) / len(few) * len(captioned)
        run = lay_out(config, backbone, few, data)
    estimated = estimate(update_plan(run), run.data, config, networks(run))
    share = len(captioned) / len(few)
    return replace(estimated, encoding_seconds=encoding, data_bytes=round(estimated.data_bytes * share))
