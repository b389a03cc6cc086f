"""What was exported, read back by those who will read it, and drawn with: the proof of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.base import UNUSED, Backbone, from_network_scale, loading
from fewstep.backbones.families import CONSISTENCY
from fewstep.backbones.pipeline_folder import PipelineFolder, weight_variant
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.diffusion.config import Sampling
from fewstep.export.formats import ADAPTERS, ExportForm, Reader
from fewstep.inference.generator import load_image_generator
from fewstep.inference.pipeline import call_settings, sampling_of_student, scheduler_for
from fewstep.inference.schedulers.few_step import SSSScheduler
from fewstep.students.lora_header import check_lora

CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far latents may lie from ours, as a share of the largest, by the type that whole networks are written in.

A LoRA is written as it was; a merged network is rounded to its type once."""
MOST_STEPS = 8
"""Jumps of the proof, for pipelines that are drawn with by solvers."""
CORNER = 32
"""Latent points a side of what is decoded for the proof: it tells one autoencoder from another, at little cost."""


@dataclass(frozen=True)
class Checked:
    """What reading back has shown.

    Attributes:
        reader: who read it.
        modules: layers that went out; tensors, for whole pipelines.
        loaded: those that came in: with an adapter, or as the very numbers that were written.
        difference: largest difference of latents, as a share of the largest latent; or, for whole pipelines, of a
            decoded corner, if that is larger.
        allowed: how large it may be.
        whole: whether it is a whole pipeline.
    """

    reader: Reader
    modules: int
    loaded: int
    difference: float
    allowed: float
    whole: bool = False

    @property
    def line(self) -> str:
        """As one line."""
        what = ("tensors", "latents and a decoded corner") if self.whole else ("layers", "latents")
        return (
            f"read back by {self.reader}: {self.loaded} of {self.modules} {what[0]}, {what[1]} within "
            f"{self.difference:.1e} of ours (allowed {self.allowed:g})"
        )

    def refuse(self, place: Path) -> None:
        """Raise UserError where it is not what was exported."""
        if self.loaded != self.modules or not self.difference <= self.allowed:
            raise UserError(f"{place} was not written: {self.line}")


def pipeline_latents(
    pipe: Any, folder: PipelineFolder, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> Tensor:
    """What a diffusers pipeline draws, as latents [N, C, h, w]: one CPU generator a picture, as `fewstep sample`."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if hasattr(pipe.scheduler, "generator"):  # pipelines of flows hand none on
        pipe.scheduler.generator = generators
    asked: dict[str, Any] = {}
    if folder.pipeline.startswith(("PixArt", "Sana")):
        asked = {"use_resolution_binning": False, "clean_caption": False}
    asked |= {"height": folder.picture_size, "width": folder.picture_size, **settings}
    drawn: Tensor = pipe(list(prompts), generator=generators, output_type="latent", **asked).images
    if folder.pipeline.startswith("Flux"):
        drawn = pipe._unpack_latents(drawn, asked["height"], asked["width"], pipe.vae_scale_factor)
    return drawn.float().cpu()


def _without(folder: PipelineFolder, index: Mapping[str, Any]) -> dict[str, None]:
    """Return the arguments that keep diffusers from loading components that pictures are not drawn with."""
    named = {name for name, value in index.items() if isinstance(value, list | tuple) and len(value) == 2 and value[0]}
    checked = {"safety_checker"} if folder.family.kind == "sd" else set()
    return dict.fromkeys(sorted(named - set(folder.family.parts) | checked))


def load_pipeline(place: Path, folder: PipelineFolder, *, whole: bool = False) -> Any:
    """Return a diffusers pipeline from a folder, in fp32.

    Args:
        folder: of the same family.
        whole: load all that it names but a safety checker, as its users do; else what pictures are drawn with.
    """
    import diffusers

    index = read_mapping(place / "model_index.json")
    less = _without(folder, index)
    if whole:
        less = {name: None for name in less if name == "safety_checker"}
    variant = next((found for part in folder.family.weighed if (found := weight_variant(place / part))), None)
    return getattr(diffusers, folder.pipeline).from_pretrained(
        place, local_files_only=True, use_safetensors=True, variant=variant, torch_dtype=torch.float32, **less
    )


def adapted(network: nn.Module) -> int:
    """Layers of a network that carry an adapter."""
    return sum(1 for module in network.modules() if len(getattr(module, "lora_A", ())))


def parts_of(backbone: Backbone) -> dict[str, nn.Module]:
    """The networks that a pipeline draws with, by their components' names."""
    family = backbone.folder.family
    return dict(zip(family.weighed, (backbone.network, backbone.vae, *backbone.text_encoders), strict=True))


def tensors_of(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a pipeline's networks, by component and name; no copies, and none that nothing is drawn with."""
    return {
        f"{part}.{name}": value
        for part, network in parts.items()
        for name, value in network.state_dict().items()
        if not name.startswith(UNUSED)
    }


def equal_tensors(parts: Mapping[str, nn.Module], wanted: Mapping[str, Tensor]) -> int:
    """How many tensors of a pipeline's networks are those that were written."""
    own = tensors_of(parts)
    return sum(1 for name, value in wanted.items() if name in own and torch.equal(own[name], value.to(own[name])))


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """A corner of the first picture [1, 3, H, W], as an autoencoder sees it by its own config."""
    corner = latents[:1, :, :CORNER, :CORNER].to(vae.device)
    picture: Tensor = vae.decode(from_network_scale(vae, corner), return_dict=False)[0]
    return picture.float().cpu()


@dataclass(frozen=True)
class Export:
    """What was written: the file or folder, its form, and the base beside it.

    Attributes:
        place: the file, or a whole pipeline's folder.
        folder: the pipeline whose network it adapts or is.
        sampling: what it is drawn with for the proof.
        device: where.
    """

    form: ExportForm
    reader: Reader
    place: Path
    folder: PipelineFolder
    sampling: Sampling
    device: torch.device


def provable(sampling: Sampling) -> Sampling:
    """A student's own settings, where a scheduler of ours has them; a few plain jumps for one that solvers draw."""
    if sampling.sampler in ("sss", "lcm") or sampling.extra_conditioning:
        return sampling
    steps = min(sampling.steps, MOST_STEPS)
    return Sampling(steps=steps, gamma=0.0, omega=sampling.omega, size=sampling.size)


def drawn_again(
    export: Export, wanted: Mapping[str, Tensor], ours: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Tensor, int, Tensor | None]:
    """Read an export back as its users will: the latents it draws, how many layers came in, and the corner that it
    decodes, if it holds an autoencoder.

    Args:
        wanted: the tensors of the whole pipeline, for forms that hold one.
        ours: the latents that are decoded.
    """
    whole = export.form not in ADAPTERS
    if export.reader == "fewstep":
        base, lora = (export.place, None) if whole else (export.folder.path, export.place)
        image_generator = load_image_generator(base, lora, export.device)
        latents = image_generator.latents(image_generator.encode(prompts), seeds, export.sampling)
        if lora:
            return latents, len(check_lora(lora, export.folder).layers), None
        return (
            latents,
            equal_tensors(parts_of(image_generator.backbone), wanted),
            decoded(image_generator.backbone.vae, ours),
        )
    with loading(str(export.place)):
        pipe = _read(export).to(export.device)
    network = getattr(pipe, export.folder.network)
    if whole:
        came = equal_tensors({part: getattr(pipe, part) for part in export.folder.family.weighed}, wanted)
    else:
        came = adapted(network)
    if export.form == "peft":
        setattr(pipe, export.folder.network, network.merge_and_unload())
    if export.folder.pipeline == CONSISTENCY:  # it knows no other scheduler than its own
        settings = call_settings(export.place)
    elif export.sampling == sampling_of_student(export.place):
        pipe.scheduler, settings = scheduler_for(export.place, pipe.scheduler.config), call_settings(export.place)
    else:
        pipe.scheduler = SSSScheduler.from_config(pipe.scheduler.config, gamma=0.0)
        settings = {**call_settings(export.place), "num_inference_steps": export.sampling.steps}
    latents = pipeline_latents(pipe, export.folder, prompts, seeds, settings)
    return latents, came, decoded(pipe.vae, ours) if whole else None


def _read(export: Export) -> Any:
    """The pipeline that an export makes."""
    place, folder = export.place, export.folder
    if export.form == "merged":
        return load_pipeline(place, folder, whole=True)
    if export.form == "single-file":
        import diffusers

        return getattr(diffusers, folder.pipeline).from_single_file(
            str(place),
            config=str(folder.path),
            local_files_only=True,
            torch_dtype=torch.float32,
            **_without(folder, folder.components),
        )
    pipe = load_pipeline(folder.path, folder)
    if export.form == "peft":
        from peft import PeftModel

        network = PeftModel.from_pretrained(getattr(pipe, folder.network), str(place.parent))
        setattr(pipe, folder.network, network.eval())
    else:
        pipe.load_lora_weights(str(place.parent), weight_name=place.name)
    return pipe
