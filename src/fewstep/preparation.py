"""From the settings of a distillation to everything that it needs in memory: teacher, data, roles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.backbones.sd import StableDiffusion, load_backbone
from fewstep.data import pictures
from fewstep.data.latents import LatentSet, latent_set
from fewstep.data.prompts import is_prompt_file, read_prompts
from fewstep.denoiser import Condition, Denoiser
from fewstep.draws import order
from fewstep.errors import UserError
from fewstep.evaluation.settings import KID_FEWEST
from fewstep.folder import read_folder
from fewstep.plan import roles_of
from fewstep.role_layout import Student, make_student
from fewstep.roles import BASE, SeparateRoles
from fewstep.settings import DistillConfig, teacher_path
from fewstep.tally import Tally
from fewstep.training.cpu import speed_up
from fewstep.trajectories import stored_trajectories
from fewstep.world import emoji8


@dataclass(frozen=True)
class Run:
    """A distillation that is ready to start: everything loaded, nothing trained.

    Attributes:
        captioned: pictures and captions, or prompts alone.
        data: what of them the training sees.
        student: all roles on the teacher's weights.
        denoiser: calls them, uncounted.
        tally: counts the calls of the training.
        omega: guidance of stored trajectories.
    """

    config: DistillConfig
    backbone: StableDiffusion
    captioned: pictures.Captioned
    data: LatentSet
    student: Student
    denoiser: Denoiser
    tally: Tally
    omega: Tensor | None = None

    @cached_property
    def base(self) -> str:
        """Which weights the student belongs to."""
        return self.backbone.folder.fingerprint("unet")

    @property
    def counted(self) -> Denoiser:
        """The denoiser whose calls are counted."""
        return replace(self.denoiser, call=self.tally.counting(self.student.call))

    def features(self, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Features of the frozen teacher, with gradient to x."""
        self.tally.add("features", len(x))
        with self.student.roles.use(BASE) as network:
            return self.backbone.features(network, x, t, condition)

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it trains on: a run is resumed on the same only."""
        return {"teacher": self.backbone.folder.identity("unet", "scheduler"), "data": self.data.key}

    @property
    def networks(self) -> list[nn.Module]:
        """Every network: one in LoRA mode, one a role in full fine-tuning."""
        roles = self.student.roles
        return list(roles.networks.values()) if isinstance(roles, SeparateRoles) else [roles.network]

    def some(self, count: int) -> pictures.Captioned:
        """Up to `count` of the pictures with their captions, drawn at random, the same for each run."""
        n = len(self.captioned)
        return self.captioned.take(order(self.config.loop.seed, n, 0, min(n, count)))


def read_source(config: DistillConfig, size: int) -> pictures.Captioned:
    """The captioned pictures that the config names, `size` pixels a side, or its prompts.

    Raises:
        UserError: they cannot be read, are of another size, or are too few to watch the quality by.
    """
    source = config.data.source
    if source == "captions":
        return emoji8.captions_alone(config.data.captions, config.loop.seed)
    if is_prompt_file(source):
        return pictures.from_prompts(read_prompts(source, "data.source"))
    if source == "emoji8":
        emoji8.check_size(size, "data.source = 'emoji8'")
        captioned = emoji8.captioned(config.data.captions, config.loop.seed)
    else:
        captioned = pictures.from_folder(Path(source), size)
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
    captioned = read_source(config, backbone.picture_size)
    backbone.load_encoders()  # a broken text encoder is told of before the pictures are encoded
    data = latent_set(captioned, backbone, encoders_fingerprint(backbone), cache, backbone.latent_shape)
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
    return Run(config, backbone, captioned, data, student, denoiser, Tally())


def on_trajectories(run: Run, cache: Path) -> Run:
    """The run on stored trajectories of its teacher, where its recipe starts on them; itself elsewhere."""
    if run.config.method.start != "trajectory":
        return run
    data, omega = stored_trajectories(run.config, run.backbone, run.denoiser, run.data, cache)
    return replace(run, data=data, omega=omega)
