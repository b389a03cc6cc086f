"""From the settings of a distillation to everything that it needs in memory: teacher, data, roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, open_backbone
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.compilation import compile_networks, eagerly
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.device import DTYPES, MOST_FILLED, free_memory, pick_precision
from fewstep.common.errors import UserError
from fewstep.common.rng import order
from fewstep.common.sharding import shard
from fewstep.data.buckets import BucketedLatents
from fewstep.data.images import Captioned
from fewstep.data.latents import LatentSet
from fewstep.data.sources import WorldData, read_captioned
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser, computed_in
from fewstep.distillation.checks import Inputs, Source, read_inputs
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.frozen_networks import latent_lpips_folder, load_frozen_networks
from fewstep.distillation.nfe_counter import NfeCounter
from fewstep.distillation.run_data import CaptionedData, EncodedData, encode_set, open_data, validation_inputs
from fewstep.distillation.synthesis.record import SynthesizedSet
from fewstep.distillation.trajectory import Trajectories, cached_trajectories
from fewstep.methods.adversarial import FeatureCritic
from fewstep.methods.distances import network_distance_of
from fewstep.methods.terms import FrozenNetworks
from fewstep.methods.update_plan import make_update_plan, roles_of
from fewstep.training.offload import OffloadedBlocks
from fewstep.training.roles import networks_of
from fewstep.training.student import Student, make_student
from fewstep.training.update import Update


@dataclass(frozen=True)
class Run:
    """A distillation that is ready to start: everything loaded, nothing trained.

    Attributes:
        source: of the data.
        captioned: pictures and captions, or prompts alone.
        data: their latents and text states.
        trajectories: stored ones of the teacher, if the recipe starts on them.
        student: all roles on the teacher's weights.
        denoiser: evaluates them, uncounted.
        nfe_counter: counts the training's network evaluations.
        frozen: frozen networks of the loss beside the teacher.
        frozen_inputs: their fingerprints, among the run's inputs.
        offloaded: the teacher's blocks in main memory, if they are there.
    """

    config: DistillConfig
    backbone: Backbone
    source: Source
    captioned: Captioned
    data: LatentSet
    trajectories: Trajectories | None
    student: Student
    denoiser: Denoiser
    nfe_counter: NfeCounter
    frozen: FrozenNetworks
    frozen_inputs: Mapping[str, str]
    offloaded: OffloadedBlocks | None = None

    @property
    def counted(self) -> Denoiser:
        """The denoiser of a step: evaluations are counted, the teacher's precision is the one that is named for it."""
        call, precision = self.student.call, self.config.student.teacher_precision
        if precision is not None:
            call = computed_in(call, BASE, DTYPES[precision])
        return replace(self.denoiser, call=self.nfe_counter.counting(call))

    def features(self, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return features of the frozen teacher, with gradient to x."""
        self.nfe_counter["features"] += len(x)
        with eagerly(), self.student.roles.use(BASE) as network:
            return self.backbone.features(network, x, t, condition)

    def update_plan(self) -> list[Update]:
        """Return the updates of a step on the samples of `batches.fetch_of`."""
        method, optim, frozen = self.config.method, self.config.optim, self.frozen
        if method.distance == "features":
            frozen = replace(frozen, distance=network_distance_of(self.features))
        if method.adversarial.weight:
            critic = FeatureCritic(self.features, self.backbone.feature_channels, seed=self.config.loop.seed)
            frozen = replace(frozen, critic=critic.to(self.backbone.device))
        return make_update_plan(method, optim, self.student, self.counted, frozen)

    @property
    def inputs(self) -> dict[str, Any]:
        """Fingerprints of its inputs: a run is resumed on the same ones only."""
        own = {"teacher": self.backbone.folder.denoising, **self.data.inputs, **validation_inputs(self.config)}
        return {**own, **self.frozen_inputs}

    @property
    def networks(self) -> list[nn.Module]:
        """Every network: one in LoRA mode, one a role in full fine-tuning."""
        return networks_of(self.student.roles)

    def validation_data(self, count: int) -> Captioned:
        """Return up to `count` of the pictures with captions, drawn by the validation's seed: alike in all stages."""
        every, seed = self.captioned, self.config.validation.seed
        if isinstance(self.source, WorldData):  # whose captions a stage draws by a seed of its own
            every = read_captioned(self.source, self.source.world.SIZE, self.config.data.captions, seed, Path())
        n = len(every)
        return every.take(order(seed, n, 0, min(n, count)))


def load_teacher(config: DistillConfig, teacher: PipelineFolder, device: torch.device) -> Backbone:
    """Load the teacher for pictures of the data's size, its network still in main memory.

    Weights that all roles share are read in the type that they are kept in.
    """
    shared = config.student.kind == "lora" and config.student.base == "bf16"
    backbone = open_backbone(teacher, device, torch.bfloat16 if shared else torch.float32)
    backbone.text_dtype = DTYPES[config.data.encoder_precision]
    backbone.text_offload = config.student.offload
    backbone.resize(config.data.size)
    return backbone


def prepare(
    config: DistillConfig,
    cache: Path,
    device: torch.device,
    *,
    inputs: Inputs | None = None,
    shared: Path | None = None,
    data: CaptionedData | None = None,
    quiet: bool = True,
) -> Run:
    """Load the teacher, encode what of the data is used, and lay out the roles.

    Args:
        cache: the run's own folder for trajectories and a distance that is trained first.
        inputs: what the config names, if it was read already.
        shared: folder of encodings, which other runs share; `cache` if left out.
        data: the run's captioned data; opened, to be encoded as a whole, if left out.
        quiet: do not print what of the source is used, and how many captions the text encoders cut.

    Raises:
        UserError: the teacher or the data cannot be read, or do not fit into memory.
    """
    place = shared or cache
    teacher, source, _ = inputs or read_inputs(config)
    if isinstance(source, SynthesizedSet):
        backbone = load_teacher(config, teacher, device)
        encoded = encode_set(config, source, backbone)
    else:
        data = data or open_data(config, source, teacher, place, None)
        backbone = load_teacher(config, teacher, device)
        encoded = data.encode(backbone, place, quiet)
    latent_lpips = latent_lpips_folder(config, source, backbone, encoded.latents.prompts, cache)
    return with_trajectories(lay_out(config, backbone, encoded, latent_lpips), cache)


def with_trajectories(run: Run, cache: Path) -> Run:
    """Return the run with stored trajectories of its teacher if its recipe starts on them and its data hold none."""
    if run.config.method.start != "trajectory" or run.trajectories:
        return run
    data, trajectories = cached_trajectories(run.config, run.backbone, run.denoiser, run.data, cache)
    return replace(run, data=data, trajectories=trajectories)


def check_adapters(config: DistillConfig, backbone: Backbone) -> None:
    """Refuse a rank whose adapters alone do not fit into main memory, where they are laid out.

    Raises:
        UserError: naming the largest rank that fits.
    """
    rank, targets = config.student.rank, config.student.targets or backbone.targets
    if config.student.kind != "lora":
        return
    shapes = [
        module.weight.shape
        for name, module in backbone.network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    a_rank = 4 * sum(shape[0] + shape[1:].numel() for shape in shapes if len(shape) > 1)
    free = free_memory(torch.device("cpu")) * MOST_FILLED
    if rank * a_rank > free:
        raise UserError(
            f"student.rank = {rank} makes adapters of {rank * a_rank / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            f"free; must be at most {max(1, int(free / a_rank))}"
        )


def _pick_precision(config: DistillConfig, device: torch.device) -> str:
    """Return the precision of a step on this device.

    Raises:
        UserError: the device does not compute in it beside the weights' types.
    """
    precision = pick_precision(config.loop.precision, device, "loop.precision")
    if config.student.base == "bf16" and precision == "fp32":
        raise UserError(
            f"loop.precision = {config.loop.precision!r} is fp32 on {device.type}, student.base = 'bf16' needs bf16; "
            "use 'bf16'"
        )
    if config.student.teacher_precision == "fp16" and device.type == "cpu":
        raise UserError("student.teacher_precision = 'fp16' needs a GPU; use 'bf16'")
    return precision


def lay_out(config: DistillConfig, backbone: Backbone, encoded: EncodedData, latent_lpips: Path | None = None) -> Run:
    """Release the encoders, lay out the roles, and only then move them to the device, each process its part.

    Args:
        latent_lpips: folder of the distance between latents, if the recipe uses one.
    """
    backbone.release_encoders()
    backbone.network.to(memory_format=backbone.layout)  # type: ignore[call-overload]
    precision = _pick_precision(config, backbone.device)
    if backbone.device.type == "cpu" and precision != "fp32":  # in fp32 the built-in kernels are the faster ones
        speed_up(backbone.network)
    check_adapters(config, backbone)
    compute, method = DTYPES[precision], config.method
    student = make_student(
        backbone,
        config.student,
        roles_of(method),
        config.loop.seed,
        method.extra_conditioning,
        compute,
        backbone.device,
    )
    offloaded = None
    if config.student.offload:
        offloaded = OffloadedBlocks(backbone.network, backbone.device, student.roles.recompute)
    for network in [*networks_of(student.roles), *student.extra_conditioning.values()]:
        if config.loop.shard:
            shard(network, backbone.device, compute)
        elif not (offloaded and network is backbone.network):
            network.to(backbone.device)
    source, captioned, data, trajectories = encoded
    if config.loop.compile:
        shapes = len(data.latents.parts) if isinstance(data.latents, BucketedLatents) else 1
        compile_networks(networks_of(student.roles), shapes=shapes)
    denoiser = Denoiser(student.call, backbone.path, backbone.prediction, backbone.embedded_guidance)
    frozen = load_frozen_networks(config, backbone, data.prompts, latent_lpips)
    counter = NfeCounter()
    return Run(config, backbone, source, captioned, data, trajectories, student, denoiser, counter, *frozen, offloaded)
