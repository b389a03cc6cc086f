"""Check an export: read it back by the tool that its users read it by, draw, and compare with the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.backbones.autoencoder import decode
from fewstep.backbones.base import Backbone
from fewstep.backbones.families import CONSISTENCY
from fewstep.backbones.loading import UNUSED, load_part, loading, text_class
from fewstep.backbones.modular import modular_latents, modular_pipeline
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.weight_files import weight_variant
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.diffusion.config import Sampling
from fewstep.export.formats import ADAPTERS, ExportForm, Reader
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep.inference.pipeline import call_settings, read_student, scheduler_for
from fewstep.inference.schedulers.few_step import SSSScheduler
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import LoraHeader

CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of latents from ours, as a share of the largest latent, by the dtype of whole networks.

A LoRA keeps its dtype; a merged network is rounded once."""
MOST_STEPS = 8
"""Jumps of the check, for pipelines that solvers draw with."""
CORNER = 32
"""Latent points a side that are decoded in the check: enough to distinguish autoencoders, at little cost."""


@dataclass(frozen=True)
class Checked:
    """Result of reading an export back.

    Attributes:
        reader: the tool that read it.
        modules: number of layers that were written; of tensors, for whole pipelines.
        loaded: number of them that were read: layers with an adapter, or tensors equal to those written.
        difference: largest difference of latents, as a share of the largest latent; for whole pipelines also of a
            decoded corner.
        allowed: its limit.
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
        """The result as one line."""
        what = ("tensors", "latents and a decoded corner") if self.whole else ("layers", "latents")
        return (
            f"read back by {self.reader}: {self.loaded} of {self.modules} {what[0]}, {what[1]} within "
            f"{self.difference:.1e} of ours (allowed {self.allowed:g})"
        )

    def refuse(self, place: Path) -> None:
        """Raise `UserError` for an export that differs from the student."""
        if self.loaded != self.modules or not self.difference <= self.allowed:
            raise UserError(f"{place} was not written: {self.line}")


class Export(NamedTuple):
    """An export as it was written.

    Attributes:
        place: the file, or a whole pipeline's folder.
        folder: the student's base pipeline, or its own.
        sampling: settings of the check.
        device: of the check.
    """

    form: ExportForm
    reader: Reader
    place: Path
    folder: PipelineFolder
    sampling: Sampling
    device: torch.device


def provable(sampling: Sampling) -> Sampling:
    """Return a student's own settings if a scheduler of ours has them, else a few plain jumps under its guidance."""
    if sampling.sampler in ("sss", "lcm") or sampling.extra_conditioning:
        return sampling
    steps = min(sampling.steps, MOST_STEPS)
    return Sampling(steps=steps, gamma=0.0, omega=sampling.omega, size=sampling.size)


def check_export(
    export: Export,
    lora: LoraHeader | None,
    student: ImageGenerator,
    ours: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Checked:
    """Read an export back and compare it with the student.

    Args:
        lora: the student's header; None for a whole pipeline.
        ours: the student's latents of the prompts and seeds, under `export.sampling`.
    """
    theirs, layers, parts = drawn_again(export, student.backbone, prompts, seeds)
    if lora is not None and export.form in ADAPTERS:
        return Checked(export.reader, len(lora.layers), layers, float(_apart(theirs, ours)), CLOSE[torch.float32])
    dtype = next(student.backbone.network.parameters()).dtype
    wanted, own = tensors_of(parts_of(student.backbone)), tensors_of(parts)
    if export.form == "single-file":  # has one dtype for all
        wanted = {name: value.to(dtype) for name, value in wanted.items()}
    equal = sum(name in own and torch.equal(own[name], value.to(own[name])) for name, value in wanted.items())
    corner = _apart(decoded(parts["vae"], ours), decoded(student.backbone.vae, ours))
    apart = float(torch.maximum(_apart(theirs, ours), corner))
    return Checked(export.reader, len(wanted), equal, apart, CLOSE[dtype], whole=True)


def _apart(found: Tensor, own: Tensor) -> Tensor:
    """Return the largest difference as a share of the largest number."""
    return (found - own).abs().max() / own.abs().max()


def drawn_again(
    export: Export, own: Backbone, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Tensor, int, Mapping[str, nn.Module]]:
    """Draw with an export as its users do.

    Args:
        own: the student's backbone.

    Returns:
        latents, number of layers with an adapter, and the networks by their components' names.
    """
    if export.reader == "fewstep":
        whole = export.form not in ADAPTERS
        header = None if whole else check_lora(export.place, export.folder)
        generator = load_image_generator(export.place if whole else export.folder, header, export.device)
        latents = generator.latents(generator.encode(prompts), seeds, export.sampling)
        return latents, len(header.layers) if header else 0, parts_of(generator.backbone)
    with loading(str(export.place)):
        pipe = _read(export).to(export.device)
    network = getattr(pipe, export.folder.network)
    layers = sum(1 for module in network.modules() if len(getattr(module, "lora_A", ())))
    if export.form == "peft":
        setattr(pipe, export.folder.network, network.merge_and_unload())
    if export.folder.pipeline == CONSISTENCY:  # it takes its own scheduler alone
        settings = call_settings(export.place)
    elif export.sampling == read_student(export.place)[1]:
        pipe.scheduler, settings = scheduler_for(export.place, pipe.scheduler.config), call_settings(export.place)
    else:
        pipe.scheduler = SSSScheduler.from_config(export.folder.noise, gamma=0.0)
        settings = {**call_settings(export.place), "num_inference_steps": export.sampling.steps}
    parts = {part: getattr(pipe, part) for part in export.folder.family.weighed}
    return pipeline_latents(pipe, own, prompts, seeds, settings), layers, parts


def _read(export: Export) -> Any:
    """Return the diffusers pipeline of an export, fp32."""
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


def _without(folder: PipelineFolder, index: Mapping[str, Any]) -> dict[str, None]:
    """Return the arguments that keep diffusers from loading components that pictures are not drawn with."""
    named = {
        name
        for name, value in index.items()
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    checkers = {"safety_checker"} if folder.family.kind == "sd" else set()
    return dict.fromkeys(sorted(named - set(folder.family.parts) | checkers))


def load_pipeline(place: Path, folder: PipelineFolder, *, whole: bool = False) -> Any:
    """Load a diffusers pipeline from a folder, in fp32.

    Args:
        folder: of the same family.
        whole: load all components but a safety checker, as users do; else only those that pictures are drawn with.
    """
    import diffusers

    if folder.family.modular:
        own = PipelineFolder(place, folder.pipeline, folder.family, folder.components)
        words = {name: text_class(own, name, ()).from_pretrained(place / name) for name in own.family.tokenizers}
        networks = {name: load_part(own, name) for name in own.family.weighed}
        kind, config = own.components["scheduler"][1], own.config("scheduler")
        scheduler = getattr(diffusers, kind).from_config(config)
        return modular_pipeline(own, {**words, **networks, "scheduler": scheduler})
    less = _without(folder, read_mapping(place / "model_index.json"))
    if whole:
        less = {name: None for name in less if name == "safety_checker"}
    variant = next((found for part in folder.family.weighed if (found := weight_variant(place / part))), None)
    return getattr(diffusers, folder.pipeline).from_pretrained(
        place, local_files_only=True, use_safetensors=True, variant=variant, torch_dtype=torch.float32, **less
    )


def pipeline_latents(
    pipe: Any, backbone: Backbone, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> Tensor:
    """Draw with a diffusers pipeline: latents [N, C, h, w], one CPU generator a picture, as `fewstep sample`."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if hasattr(pipe.scheduler, "generator"):  # pipelines of flows pass none to their scheduler
        pipe.scheduler.generator = generators
    size = backbone.folder.picture_size
    given: dict[str, Any] = {"height": size, "width": size, **settings, **backbone.folder.family.call}
    if backbone.folder.family.modular:
        drawn = modular_latents(pipe, list(prompts), generators, given)
    else:
        drawn = pipe(prompt=list(prompts), generator=generators, output_type="latent", **given).images
    return backbone.from_pipeline(drawn, given["height"], given["width"]).float().cpu()


def parts_of(backbone: Backbone) -> dict[str, nn.Module]:
    """Return the networks of a pipeline, by their components' names."""
    family = backbone.folder.family
    return dict(zip(family.weighed, (backbone.network, backbone.vae, *backbone.text_encoders), strict=True))


def tensors_of(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of a pipeline's networks that affect pictures, by component and name; no copies."""
    return {
        f"{part}.{name}": value
        for part, network in parts.items()
        for name, value in network.state_dict().items()
        if not name.startswith(UNUSED)
    }


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Decode a corner of the first picture, [1, 3, H, W], at the scale of the autoencoder's own config."""
    corner = latents[:1, :, :CORNER, :CORNER].to(vae.device)
    return decode(vae, corner).float().cpu()
