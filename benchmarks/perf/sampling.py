"""Pictures: ours, the network calls and the decoding that they are made of, and the diffusers pipeline, in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.backbones.base import load_backbone
from fewstep.common.compilation import compile_networks
from fewstep.common.device import DTYPES
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.inference.generator import ImageGenerator, default_batch, load_image_generator
from fewstep.students.lora import save_lora
from fewstep.training.config import StudentConfig
from fewstep.training.student import make_student
from perf.task import Task
from perf.timing import Timed, rounds

STEPS = 4
SSS = Sampling(sampler="sss", steps=STEPS, gamma=0.3)
ROLE = "student"


def time_sampling(task: Task) -> dict[str, Timed]:
    """`ours`, `calls + decode` and `diffusers`, and a student's LoRA merged and not, from text states that are there.

    SSS (TCD) at gamma .3 for us and for diffusers' own scheduler: the same network calls, of the same batches. In half
    precision the denoiser's weights are kept in that type on both sides, and in diffusers the autoencoder's too, as
    people load them; ours decodes in fp32. With `loop.compile=true` the denoiser is compiled on both sides.
    """
    place, precision = torch.device(task.device), DTYPES[task.precision]
    image_generator = load_image_generator(task.folder, None, place, precision=precision, compiled=task.compiled)
    _, height, width = image_generator.backbone.latent_shape
    condition = image_generator.encode([f"picture {i}" for i in range(task.batch)])
    seeds = list(range(task.batch))
    at = default_batch(height, width)
    parts = [slice(start, start + at) for start in range(0, task.batch, at)]
    contenders = {
        "ours": drawing(image_generator, condition, seeds),
        "calls + decode": bare(image_generator, condition, parts),
        "diffusers": diffusers_drawing(task, place, precision, condition, parts),
    }
    with tempfile.TemporaryDirectory() as held:
        apart, file = unmerged(task, place, precision, Path(held))
        merged = load_image_generator(task.folder, file, place, precision=precision, compiled=task.compiled)
    contenders |= {
        "LoRA, merged": drawing(merged, condition, seeds),
        "LoRA, not merged": drawing(apart, condition, seeds),
    }
    return rounds(contenders, place, task.rounds)


def drawing(image_generator: ImageGenerator, condition: Condition, seeds: list[int]) -> Callable[[], None]:
    """Our sampler on a batch."""

    def draw() -> None:
        image_generator.backbone.to_pictures(image_generator.latents(condition, seeds, SSS))

    return draw


def bare(image_generator: ImageGenerator, condition: Condition, parts: list[slice]) -> Callable[[], None]:
    """The network calls of `drawing`, and its decoding, alone."""
    place, precision, backbone = image_generator.backbone.device, image_generator.precision, image_generator.backbone
    there = [{name: value[part].to(place) for name, value in condition.items()} for part in parts]
    count = len(next(iter(condition.values())))
    x = torch.randn(count, *backbone.latent_shape, device=place)
    t = torch.full((count,), 499.0, dtype=torch.float64)

    @torch.no_grad()
    def call() -> None:
        with torch.autocast(place.type, precision, enabled=precision != torch.float32):
            for part, states in zip(parts, there, strict=True):
                for _ in range(STEPS):
                    backbone.call(backbone.network, x[part], t[part], states)
        backbone.to_pictures(x)

    return call


def unmerged(task: Task, place: torch.device, precision: torch.dtype, held: Path) -> tuple[ImageGenerator, Path]:
    """An image generator whose random LoRA is beside its layers, and a file of that LoRA."""
    backbone = load_backbone(task.folder)
    student = make_student(backbone, StudentConfig(rank=task.rank), (ROLE,), 0)
    weights = student.parameters(ROLE)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(0, 1e-3)
    file = save_lora(
        held, weights, rank=task.rank, alpha=task.rank, targets=list(backbone.targets),
        base=backbone.folder.fingerprint(backbone.folder.network), sampling=SSS, notes={},
        component=backbone.folder.network,
    )  # fmt: skip
    backbone.device = place
    backbone.network.to(place, precision)
    if task.compiled:
        compile_networks([backbone.network])
    denoiser = Denoiser(student.call, backbone.path, backbone.prediction, backbone.embedded_guidance)
    return ImageGenerator(backbone, denoiser, SSS, ROLE, precision), file


def diffusers_drawing(
    task: Task, place: torch.device, precision: torch.dtype, condition: Condition, parts: list[slice]
) -> Callable[[], None]:
    """The folder's pipeline with diffusers' TCD scheduler, on a batch."""
    import diffusers

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        task.folder, local_files_only=True, use_safetensors=True, torch_dtype=precision
    ).to(place)
    if task.compiled:
        pipe.unet.compile(dynamic=False)
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    there = {names[name]: value.to(place, precision) for name, value in condition.items()}
    count = len(condition["text"])

    @torch.no_grad()
    def draw() -> None:
        for part in parts:
            pipe(
                **{name: value[part] for name, value in there.items()},
                num_inference_steps=STEPS, guidance_scale=0, eta=SSS.gamma, output_type="np",
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)[part]],
            )  # fmt: skip

    return draw
