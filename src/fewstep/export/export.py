"""`fewstep export`: a student in the form that another tool reads, with a model card, read back and drawn with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.pipeline_writer import read_record, write_pipeline
from fewstep.backbones.single_file.sd_checkpoint import checkpoint_weights
from fewstep.backbones.weight_files import weight_files
from fewstep.common.device import DTYPES
from fewstep.common.files import atomic_folder
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.common.tensors import save_tensors
from fewstep.export.adapters import adapter_config, kohya_layers, matrices, write_diffusers, write_kohya, write_peft
from fewstep.export.formats import ADAPTERS, ExportForm, Reader
from fewstep.export.model_card import CARD, PICTURES, model_card, origin_of
from fewstep.export.verify import Checked, Export, check_export, provable
from fewstep.inference.generator import ImageGenerator, load_image_generator
from fewstep.inference.image_grid import image_grid, save_image
from fewstep.students.conditioning_file import extra_embedding_weights, save_extra_embeddings
from fewstep.students.inference_settings import inference_record
from fewstep.students.lora_header import LoraHeader, base_shapes

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Student(NamedTuple):
    """A student to export.

    Attributes:
        folder: the base pipeline; the student's own folder, if it is a whole pipeline.
        lora: the LoRA's header; None for a whole pipeline.
    """

    folder: PipelineFolder
    lora: LoraHeader | None


def stored_type(folder: PipelineFolder) -> torch.dtype:
    """Return the dtype that most of a network's matrices are stored in."""
    kinds: list[str] = []
    for file in weight_files(folder.path / folder.network):
        kinds += [entry.dtype for entry in read_safetensors_header(file)[1].values() if len(entry.shape) > 1]
    return _DTYPES.get(max(set(kinds), key=kinds.count), torch.float32)


def record_of(student: Student, image_generator: ImageGenerator) -> dict[str, Any]:
    """Return the record of the exported file: the student's own, and its inference settings."""
    record = read_record(student.folder.path) if student.lora is None else student.lora.record
    return {
        **record,
        "base": record.get("base") or student.folder.fingerprint(student.folder.network),
        "sampling": image_generator.sampling.model_dump(mode="json"),
        **inference_record(image_generator.backbone, image_generator.sampling),
    }


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
    base_model: str = "",
    licence: str = "",
    repo: str = "",
) -> tuple[Path, Checked | None]:
    """Write a student in a form into the folder `out`, with a model card and pictures; nothing is left on failure.

    Args:
        reader: the tool that reads the form back, by `formats.check_form`.
        precision: of whole networks, fp32, fp16 or bf16; None for that of the base's denoiser. `merged` rounds the
            denoiser alone, `single-file` all networks. A LoRA keeps its own.
        prompts: of the card's pictures and of the check.
        check: read the export back as its users do, draw, and compare with the student.
        base_model, licence: of the card's front matter, see `model_card.origin_of`.
        repo: owner/name that it is uploaded to, for the card; empty for none.

    Returns:
        the file, or the folder of a whole pipeline; and the result of reading it back.

    Raises:
        UserError: an unwritable place, a number that is not finite in what is drawn or written, or an export that
            differs from the student.
    """
    image_generator = load_image_generator(student.folder, student.lora, device)
    dtype = DTYPES[precision] if precision else stored_type(student.folder)
    sampling = provable(image_generator.sampling)
    seeds = range(seed, seed + len(prompts))
    condition = image_generator.encode(prompts)
    shown = image_generator.to_pictures(
        image_generator.latents(condition, seeds, image_generator.sampling, title="drawing"), seeds
    )
    ours = image_generator.latents(condition, seeds, sampling) if check else None
    record = record_of(student, image_generator)
    if form not in ADAPTERS:  # nothing is drawn by it any more, so the network itself is rounded
        plain = torch.contiguous_format  # the only layout of files
        # diffusers' own `to` warns of modules that it may not have
        nn.Module.to(image_generator.backbone.network, "cpu", dtype, memory_format=plain)  # type: ignore[call-overload]
    with atomic_folder(out) as part:
        file = write(student, form, part, image_generator, record, dtype, out.name)
        checked = None
        if ours is not None:
            written = Export(form, reader, part / file, student.folder, sampling, torch.device(device))
            checked = check_export(written, student.lora, image_generator, ours, prompts, seeds)
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
            origin=origin_of(student.folder, record, base_model, licence),
            repo=repo,
        )
        (part / CARD).write_text(text, encoding="utf-8")
    return (out / file if file else out), checked


def write(
    student: Student,
    form: ExportForm,
    place: Path,
    image_generator: ImageGenerator,
    record: Mapping[str, Any],
    dtype: torch.dtype,
    name: str,
) -> str:
    """Write the form into a folder; return the file's name, "" for a whole pipeline."""
    text, folder, backbone = json.dumps(dict(record)), student.folder, image_generator.backbone
    if form in ("diffusers", "merged"):
        extra = extra_embedding_weights(student.lora.file if student.lora else folder.path)
        save_extra_embeddings(place, extra)
    if form == "merged":
        write_pipeline(place, folder, backbone.network, record)
        return ""
    if form == "single-file":
        weights = checkpoint_weights(
            backbone.network.state_dict(),
            backbone.vae.state_dict(),
            backbone.text_encoders,
            prediction=backbone.prediction,
            zero_snr=bool(folder.config("scheduler").get("rescale_betas_zero_snr")),
        )
        tensors = {key: value.to(dtype) for key, value in weights.items()}
        save_tensors(place / f"{name}.safetensors", tensors, {"format": "pt", "fewstep": text})
        return f"{name}.safetensors"
    assert student.lora is not None
    lora, shapes = student.lora, base_shapes(folder)
    every = [key.removesuffix(".weight") for key, size in shapes.items() if key.endswith(".weight") and size[1:]]
    config, pairs = adapter_config(lora, every, folder.family.targets), matrices(lora, shapes)
    if form == "diffusers":
        return write_diffusers(place, lora, pairs, config, folder.network, text).name
    if form == "peft":
        return write_peft(place, pairs, config, text).name
    own, alphas = kohya_layers(lora, pairs, shapes, folder)
    return write_kohya(place / f"{name}.safetensors", own, alphas, config, text).name
