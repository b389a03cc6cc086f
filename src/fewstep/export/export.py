"""`fewstep export`: a student in the form that another tool reads, with a model card, read back and drawn with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.pipeline_folder import PipelineFolder, weight_files
from fewstep.backbones.pipeline_writer import read_record, write_pipeline
from fewstep.backbones.single_file.sd_checkpoint import checkpoint_weights
from fewstep.common.device import DTYPES
from fewstep.common.files import atomic_folder
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.common.tensors import save_tensors
from fewstep.export.adapters import adapter_config, kohya_names, matrices, write_diffusers, write_kohya, write_peft
from fewstep.export.formats import ADAPTERS, ExportForm, Reader
from fewstep.export.model_card import CARD, PICTURES, model_card
from fewstep.export.verify import CLOSE, Checked, Export, decoded, drawn_again, parts_of, provable, tensors_of
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep.inference.image_grid import image_grid, save_image
from fewstep.students.conditioning_file import extra_embedding_weights, save_extra_embeddings
from fewstep.students.inference_settings import travelling
from fewstep.students.lora import read_lora
from fewstep.students.lora_header import LoraHeader, base_shapes, check_lora

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Student:
    """What shall be exported: a LoRA on a base pipeline, or a whole pipeline.

    Attributes:
        folder: the base; the student's own folder, if it is a whole pipeline.
        lora: the LoRA's file or folder; None for a whole pipeline.
    """

    folder: PipelineFolder
    lora: Path | None

    @cached_property
    def header(self) -> LoraHeader | None:
        """What the LoRA's file says of itself."""
        return None if self.lora is None else check_lora(self.lora, self.folder)


def stored_type(folder: PipelineFolder) -> torch.dtype:
    """The type that most of a network's matrices are stored in."""
    kinds: list[str] = []
    for file in weight_files(folder.path / folder.network):
        kinds += [entry.dtype for entry in read_safetensors_header(file)[1].values() if len(entry.shape) > 1]
    return _STORED.get(max(set(kinds), key=kinds.count), torch.float32)


def record_of(student: Student, image_generator: ImageGenerator) -> dict[str, Any]:
    """What the exported file says of itself: what the student said, and what it is sampled with."""
    notes = read_record(student.folder.path) if student.header is None else student.header.notes
    own = {
        "sampling": image_generator.sampling.model_dump(mode="json"),
        **travelling(image_generator.backbone, image_generator.sampling),
    }
    return {**notes, "base": notes.get("base") or student.folder.fingerprint(student.folder.network), **own}


def export(
    student: Student,
    form: ExportForm,
    reader: Reader,
    out: Path,
    *,
    precision: str | None = None,
    prompts: Sequence[str],
    seed: int = 0,
    check: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[Path, Checked | None]:
    """Write a student in a form into the folder `out`, with a model card and pictures; nothing is left if it fails.

    Args:
        reader: who reads the form back, by `forms.check_form`.
        precision: of whole networks, fp32, fp16 or bf16; None for the type of the base's denoiser. `merged` rounds the
            denoiser alone, `single-file` all that it holds. A LoRA is written as it was.
        prompts: of the card's pictures, and of the proof.
        check: read it back as its users will, draw, and compare with what the student draws here.

    Returns:
        the file, or the folder of a whole pipeline; and what reading it back has shown.

    Raises:
        UserError: the place cannot be written to, a number is not finite in what is drawn or in the type that is
            written, or what is read back is not the student.
    """
    image_generator = load_image_generator(student.folder.path, student.lora, device)
    kind = DTYPES[precision] if precision else stored_type(student.folder)
    sampling = provable(image_generator.sampling)
    seeds = range(seed, seed + len(prompts))
    condition = image_generator.encode(prompts)
    shown = image_generator.to_pictures(
        image_generator.latents(condition, seeds, image_generator.sampling, title="drawing"), seeds
    )
    ours = image_generator.latents(condition, seeds, sampling) if check else None
    record = record_of(student, image_generator)
    if form not in ADAPTERS:  # nothing is drawn here any more: the network itself is rounded, not a copy
        plain = torch.contiguous_format  # the only layout that files hold
        # diffusers' own `to` warns of modules that it may not have
        nn.Module.to(image_generator.backbone.network, "cpu", kind, memory_format=plain)  # type: ignore[call-overload]
    with atomic_folder(out) as part:
        file = write(student, form, part, image_generator, record, kind, out.name)
        made = Export(form, reader, part / file, student.folder, sampling, torch.device(device))
        checked = None
        if ours is not None:
            checked = proof(student, made, image_generator, ours, prompts, seeds)
            checked.refuse(out)
        save_image(image_grid(shown, min(len(shown), 8), max(1, 256 // shown.shape[2])), part / PICTURES)
        text = model_card(
            out.name,
            form,
            record,
            reader=reader,
            pipeline=student.folder.pipeline,
            network=student.folder.network,
            file=file,
            prompts=prompts,
            seeds=seeds,
        )
        (part / CARD).write_text(text, encoding="utf-8")
    return (out / file if file else out), checked


def write(
    student: Student,
    form: ExportForm,
    place: Path,
    image_generator: ImageGenerator,
    record: Mapping[str, Any],
    kind: torch.dtype,
    name: str,
) -> str:
    """Write the form into a folder; returns the file's name, or nothing for a whole pipeline."""
    said = json.dumps(dict(record))
    folder, network = student.folder, image_generator.backbone.network
    if form in ADAPTERS:
        assert student.lora is not None
        assert student.header is not None
        lora = read_lora(student.header)
        shapes = base_shapes(folder)
        every = [key.removesuffix(".weight") for key, size in shapes.items() if key.endswith(".weight") and size[1:]]
        config, pairs = adapter_config(lora, every, folder.family.targets), matrices(lora, shapes)
        save_extra_embeddings(place, extra_embedding_weights(student.lora))
        if form == "diffusers":
            return write_diffusers(place, lora, pairs, config, folder.network, said).name
        if form == "peft":
            return write_peft(place, pairs, config, said).name
        names = kohya_names(lora.header.layers, every, folder.family.kind)
        return write_kohya(place / f"{name}.safetensors", lora, pairs, config, names, said).name
    if form == "merged":
        write_pipeline(place, folder.path, network, record)
        save_extra_embeddings(place, extra_embedding_weights(student.lora or folder.path))
        return ""
    backbone = image_generator.backbone
    zero = bool(folder.config("scheduler").get("rescale_betas_zero_snr"))
    weights = checkpoint_weights(
        network.state_dict(),
        backbone.vae.state_dict(),
        backbone.text_encoders,
        prediction=backbone.prediction,
        zero_snr=zero,
    )
    tensors = {key: value.to(kind) for key, value in weights.items()}
    save_tensors(place / f"{name}.safetensors", tensors, {"format": "pt", "fewstep": said})
    return f"{name}.safetensors"


def proof(
    student: Student,
    made: Export,
    image_generator: ImageGenerator,
    ours: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Checked:
    """Read an export back, and compare it with the student's own latents and, of a whole pipeline, with its networks'
    tensors and a decoded corner."""
    whole, kind, wanted = made.form not in ADAPTERS, torch.float32, {}
    if whole:
        kind = next(image_generator.backbone.network.parameters()).dtype
        wanted = tensors_of(parts_of(image_generator.backbone))
        if made.form == "single-file":  # holds all in one type
            wanted = {name: value.to(kind) for name, value in wanted.items()}
    went = len(wanted) if student.header is None or whole else len(student.header.layers)
    theirs, came, corner = drawn_again(made, wanted, ours, prompts, seeds)
    pairs = [(theirs, ours), *([] if corner is None else [(corner, decoded(image_generator.backbone.vae, ours))])]
    apart = torch.stack([(found - own).abs().max() / own.abs().max() for found, own in pairs])
    return Checked(made.reader, went, came, float(apart.max()), CLOSE[kind], whole)
