"""From the settings of a distillation to everything that it needs in memory: teacher, data, roles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Backbone, open_backbone
from fewstep.backbones.lengths import CutPrompts
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.backbones.teachers import teacher_path
from fewstep.common.compilation import compile_networks, eagerly
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.defaults import check_world_size, world
from fewstep.common.device import DTYPES, MOST_FILLED, free_memory, pick_precision
from fewstep.common.distributed import main_process_first, print_once
from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.common.rng import order
from fewstep.common.run_inputs import PARTS
from fewstep.common.sharding import shard
from fewstep.data import images as pictures
from fewstep.data.buckets import BucketedFiles, BucketedLatents, bucketed, shape_order
from fewstep.data.latents import (
    Known,
    LatentSet,
    Wanted,
    known,
    lacking_captions,
    lacking_pictures,
    latent_set,
)
from fewstep.data.prompts import is_prompt_file, is_shards, read_prompts
from fewstep.data.shards import from_shards
from fewstep.data.visits import used
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser, computed_in
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.nfe_counter import NfeCounter
from fewstep.distillation.reward import make_reward
from fewstep.distillation.synthesis.dataset import open_set
from fewstep.distillation.synthesis.reader import Synthesis
from fewstep.distillation.synthesis.record import is_synthesis
from fewstep.distillation.trajectories import drawn_prompts, stored_trajectories
from fewstep.evaluation.limits import KID_FEWEST
from fewstep.methods.latent_lpips.settings import LatentLpipsTrainConfig
from fewstep.methods.reward_loss import Reward
from fewstep.methods.rewards.reward import PreferenceScorer
from fewstep.methods.update_plan import roles_of
from fewstep.training.roles import networks_of
from fewstep.training.student import Student, make_student


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
        synthesis: a set of the teacher's, where that is what it trains on.
        latent_lpips: a distance between latents.
        reward: scores of pictures with prompts, and of how many prompts.
        fed: fingerprints of what else was loaded.
    """

    config: DistillConfig
    backbone: Backbone
    captioned: pictures.Captioned
    data: LatentSet
    student: Student
    denoiser: Denoiser
    nfe_counter: NfeCounter
    omega: Tensor | None = None
    synthesis: Synthesis | None = None
    latent_lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    reward: tuple[Reward, int] | None = None
    fed: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def base(self) -> str:
        """Which weights the student belongs to."""
        return self.backbone.folder.fingerprint(self.backbone.folder.network)

    @property
    def counted(self) -> Denoiser:
        """The denoiser of a step: its calls are counted, the teacher's in a type of their own where one is named."""
        call, taught = self.student.call, self.config.student.teacher_precision
        if taught is not None:
            call = computed_in(call, BASE, DTYPES[taught])
        return replace(self.denoiser, call=self.nfe_counter.counting(call))

    def features(self, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Features of the frozen teacher, with gradient to x."""
        self.nfe_counter.add("features", len(x))
        with eagerly(), self.student.roles.use(BASE) as network:
            return self.backbone.features(network, x, t, condition)

    @property
    def inputs(self) -> dict[str, Any]:
        """Fingerprints of what it trains on: a run is resumed on the same only."""
        own = {"teacher": self.backbone.folder.denoising, **self.data.inputs, **validation_inputs(self.config)}
        return own | dict(self.fed)

    @property
    def networks(self) -> list[nn.Module]:
        """Every network: one in LoRA mode, one a role in full fine-tuning."""
        return networks_of(self.student.roles)

    def watched(self, count: int) -> pictures.Captioned:
        """Up to `count` of the pictures with their captions, drawn by the watch's seed: all stages see the same."""
        every, seed = self.captioned, self.config.validation.seed
        if self.config.data.source in ("emoji8", "captions"):  # whose captions a stage draws by a seed of its own
            own = world("data.source")
            drawn = own.captioned if every.pictures is not None else own.captions_alone
            every = drawn(self.config.data.captions, seed)
        n = len(every)
        return every.take(order(seed, n, 0, min(n, count)))


def load_teacher(config: DistillConfig, device: torch.device) -> Backbone:
    """The teacher that the config names, set to the pictures' size, its network still in main memory.

    Weights that all roles share are read in the type that they are kept in.
    """
    shared = config.student.kind == "lora" and config.student.base == "bf16"
    folder = read_folder(teacher_path(config.teacher))
    backbone = open_backbone(folder.path, device, torch.bfloat16 if shared else torch.float32)
    backbone.resize(config.data.size)
    return backbone


def validation_inputs(config: DistillConfig) -> dict[str, str]:
    """Fingerprint of the prompts that the quality watch is given in a file, if it is."""
    named = config.validation.prompts
    if not (config.loop.validate_every and named and is_prompt_file(named)):
        return {}
    prompts = json.dumps(read_prompts(named, "validation.prompts"))
    return {"watched prompts": hashlib.sha256(prompts.encode()).hexdigest()}


@dataclass(frozen=True)
class Source:
    """The pictures and captions of a run, and what of them it will ask for; no network is loaded for it.

    Attributes:
        known: identifies them.
        wanted: which of them the steps that are left ask for.
        inputs: fingerprints of what a run on them is fed, as far as they are known without networks.
    """

    captioned: pictures.Captioned
    known: Known
    wanted: Wanted
    inputs: Mapping[str, Any]

    def lacking(self, cache: Path) -> tuple[int, int]:
        """How many pictures and captions are still to be encoded."""
        return (
            lacking_pictures(self.captioned, self.known, cache, self.wanted.pictures),
            lacking_captions(self.known, cache, self.wanted.captions),
        )


def open_source(config: DistillConfig, cache: Path, done: int = 0) -> Source | None:
    """Find the pictures and captions of a run, and which of them are needed; None for a set of `fewstep synthesize`.

    Args:
        cache: folder for lists of what shards hold.
        done: steps that are made already.

    Raises:
        UserError: as `read_source`; or the teacher cannot be read.
    """
    if is_synthesis(config.data.source):
        return None
    folder = read_folder(teacher_path(config.teacher))
    captioned = read_source(config, folder, cache)
    of = known(captioned, encoders_fingerprint(folder))
    inputs: dict[str, Any] = {"teacher": folder.denoising, PARTS: dict(of.parts), **validation_inputs(config)}
    if config.method.start == "trajectory":
        drawn = torch.unique(drawn_prompts(config, len(of.said))[0]).numpy()
        wanted = Wanted(np.zeros(0, dtype=np.int64), drawn[drawn < len(of.said)])
        return Source(captioned, of, wanted, inputs)
    loop, held = config.loop, captioned.pictures
    visits: Callable[[int, int], np.ndarray] = partial(order, loop.seed, len(captioned))
    if isinstance(held, BucketedFiles):
        visits = shape_order(held.groups(), loop.seed, loop.batch)
    wanted = used(of, visits, range(done, loop.steps), loop.batch, loop.seed, config.data.empty_prompts)
    return Source(captioned, of, wanted, inputs | {"data": of.key})


def read_source(config: DistillConfig, folder: PipelineFolder, cache: Path) -> pictures.Captioned:
    """The captioned pictures that the config names, of the teacher's size or in buckets around it, or its prompts.

    Args:
        cache: folder for lists of what shards hold.

    Raises:
        UserError: they cannot be read, are of another size, or are too few to watch the quality by.
    """
    captioned: pictures.Captioned
    source, size = config.data.source, config.data.size or folder.picture_size
    if source == "captions":
        captioned = world("data.source").captions_alone(config.data.captions, config.loop.seed)
        return captioned
    if is_prompt_file(source):
        return pictures.from_prompts(read_prompts(source, "data.source"))
    if source == "emoji8":
        check_world_size(size, "data.source = 'emoji8'")
        captioned = world("data.source").captioned(config.data.captions, config.loop.seed)
    elif is_shards(source):
        captioned = main_process_first(lambda: from_shards(source, size, cache))
    else:
        captioned = pictures.from_folder(Path(source), size)
    if config.loop.validate_every and len(captioned) < KID_FEWEST:
        raise UserError(
            f"loop.validate_every takes KID from at least {KID_FEWEST} pictures, data.source has {len(captioned)}; "
            "give more, or loop.validate_every=null"
        )
    if config.data.buckets:
        captioned = bucketed(captioned, size, folder.unit, config.loop.batch)
    return captioned


def prepare(
    config: DistillConfig,
    cache: Path,
    device: torch.device,
    *,
    shared: Path | None = None,
    source: Source | None = None,
    quiet: bool = True,
) -> Run:
    """Load the teacher, encode what of the data is needed, and lay out the roles.

    Args:
        cache: the run's own folder for trajectories and a distance that is trained first.
        shared: folder of encodings, which other runs share; `cache` if left out.
        source: the run's data, of which what is wanted is encoded; opened, and all encoded, if left out.
        quiet: do not print what of the source is used, and how many captions the text encoders cut.

    Raises:
        UserError: the teacher or the data cannot be read, or do not fit.
    """
    place = shared or cache
    if source is None:
        found = open_source(config, place)
        source = None if found is None else replace(found, wanted=Wanted())
    backbone = load_teacher(config, device)
    if source is None:
        return on_synthesis(config, backbone, cache)
    captioned, of = source.captioned, source.known
    print_once([] if quiet else [captioned.line()])
    backbone.load_encoders()  # a broken text encoder is told of before the pictures are encoded
    cut = CutPrompts(backbone)
    shape, print_of = backbone.latent_shape, of.parts["encoders"]
    data = latent_set(captioned, backbone, print_of, place, shape, of=of, wanted=source.wanted, on_encoded=cut)
    cut.add_up()
    print_once([] if quiet else cut.lines("caption"))
    folder = perceptual_folder(config, backbone, data.said, cache)
    run = lay_out(config, backbone, captioned, data)
    return on_trajectories(with_looks(run, folder), cache)


def on_synthesis(config: DistillConfig, backbone: Backbone, cache: Path) -> Run:
    """A run on a set that `fewstep synthesize` drew."""
    synthesis, data = open_set(Path(config.data.source), config.method, backbone)
    folder = perceptual_folder(config, backbone, data.said, cache)
    run = with_looks(lay_out(config, backbone, pictures.from_prompts(data.said), data), folder)
    omega = synthesis.omega(torch.arange(len(synthesis))) if config.method.start == "trajectory" else None
    return replace(run, synthesis=synthesis, omega=omega)


def perceptual_folder(config: DistillConfig, backbone: Backbone, prompts: Sequence[str], cache: Path) -> Path | None:
    """The folder of the distance between latents that the recipe asks for, trained first if none is named.

    It belongs to the teacher and the source, not to the run: stages and seeds draw captions of their own from Emoji-8,
    and look through one distance, trained on those of the distance's own seed.
    """
    if config.method.distance != "latent_lpips" or not config.method.consistency:
        return None
    if config.latent_lpips.folder:
        return Path(config.latent_lpips.folder)
    from fewstep.methods.latent_lpips.train import make_latent_lpips

    if config.data.source in ("emoji8", "captions"):
        exclusive = world("data.source").captions_alone(config.data.captions, config.latent_lpips.loop.seed)
        (drawn,) = zip(*exclusive.captions, strict=True)
        prompts = sorted(set(drawn))
    own = {name: getattr(config.latent_lpips, name) for name in LatentLpipsTrainConfig.model_fields}
    loop = config.latent_lpips.loop.model_copy(update={"precision": config.loop.precision})  # one precision a process
    asked = LatentLpipsTrainConfig(**own | {"loop": loop})
    known = json.dumps([backbone.folder.identity(), list(prompts), asked.model_dump(mode="json")])
    place = cache / f"perceptual-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    return make_latent_lpips(asked, backbone, prompts, place)


def with_looks(run: Run, perceptual: Path | None) -> Run:
    """The run with the frozen networks that its recipe looks through: a distance between latents, a scorer."""
    backbone, method, fed = run.backbone, run.config.method, dict(run.fed)
    distance, reward = None, None
    if perceptual is not None:
        from fewstep.methods.latent_lpips.record import WEIGHTS, load_latent_lpips

        vae = backbone.folder.identity("vae")
        distance = load_latent_lpips(perceptual, backbone.latent_shape[0], vae, backbone.device).distance
        fed["perceptual distance"] = sha256(perceptual / WEIGHTS)
    if method.reward.weight:
        scorer = load_named_scorer(method.reward.scorer, backbone.device)
        reward = make_reward(backbone, scorer, run.data.said)
        fed["scorer"] = scorer.identity.weights_sha256
    return replace(run, latent_lpips=distance, reward=reward, fed=fed)


def load_named_scorer(named: str, device: torch.device) -> PreferenceScorer:
    """The scorer that `method.reward.scorer` names: `world`, or NAME:FOLDER."""
    if named == "world":
        scorer: PreferenceScorer = world("method.reward.scorer").load_scorer(device)
        return scorer
    from fewstep.methods.rewards.registry import load_scorer

    name, _, folder = named.partition(":")
    return load_scorer(name, Path(folder), device)


def encoders_fingerprint(folder: PipelineFolder) -> str:
    """Fingerprint of what makes latents and text states."""
    return folder.identity("vae", *folder.family.readers)


def check_adapters(config: DistillConfig, backbone: Backbone) -> None:
    """Refuse a rank whose adapters alone would not fit into main memory, where they are laid out.

    Raises:
        UserError: naming the largest rank that does.
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
            f"free; the nearest legal one is {max(1, int(free / a_rank))}"
        )


def lay_out(config: DistillConfig, backbone: Backbone, captioned: pictures.Captioned, data: LatentSet) -> Run:
    """Let the encoders go, lay out the roles, and only then bring them to the device, each process its part."""
    backbone.release_encoders()
    backbone.network.to(memory_format=backbone.layout)  # type: ignore[call-overload]
    precision = pick_precision(config.loop.precision, backbone.device)
    if backbone.device.type == "cpu" and precision != "fp32":  # in fp32 the built-in kernels are the faster ones
        speed_up(backbone.network)
    if config.student.base == "bf16" and precision == "fp32":
        raise UserError(
            f"loop.precision = {config.loop.precision!r} is fp32 on {backbone.device.type}, which cannot compute with "
            "student.base = 'bf16'; the nearest legal one is 'bf16'"
        )
    if config.student.teacher_precision == "fp16" and backbone.device.type == "cpu":
        raise UserError("student.teacher_precision = 'fp16' needs a GPU; the nearest legal one is 'bf16'")
    check_adapters(config, backbone)
    compute = DTYPES[precision]
    roles, method = roles_of(config.method), config.method
    student = make_student(
        backbone, config.student, roles, config.loop.seed, method.extra_conditioning, compute, backbone.device
    )
    for network in [*networks_of(student.roles), *student.extra_conditioning.values()]:
        if config.loop.shard:
            shard(network, backbone.device, compute)
        else:
            network.to(backbone.device)
    if config.loop.compile:
        shapes = len(data.latents.parts) if isinstance(data.latents, BucketedLatents) else 1
        compile_networks(networks_of(student.roles), shapes=shapes)
    denoiser = Denoiser(student.call, backbone.path, backbone.prediction, backbone.embedded_guidance)
    return Run(config, backbone, captioned, data, student, denoiser, NfeCounter())


def on_trajectories(run: Run, cache: Path) -> Run:
    """The run on stored trajectories of its teacher, where its recipe starts on them; itself elsewhere."""
    if run.config.method.start != "trajectory":
        return run
    data, omega = stored_trajectories(run.config, run.backbone, run.denoiser, run.data, cache)
    return replace(run, data=data, omega=omega)
