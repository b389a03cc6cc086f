"""A teacher or student that is loaded once and draws many times, as pictures of Pillow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.teachers import read_teacher, teacher_name
from fewstep.common.arguments import checked
from fewstep.common.device import pick_compute_dtype, pick_device
from fewstep.common.errors import UserError
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Condition, Denoiser
from fewstep.inference.generator import ImageGenerator, default_batch, load_image_generator
from fewstep.inference.picture_files import picture_settings, student_name
from fewstep.students.lora_header import LoraHeader
from fewstep.students.resolve import AUTO, changed_sampling, check_negative, omega_given, resolve_student

OnCall = Callable[[int, int], object]
"""(network calls done, network calls in all), after each of them; an exception ends the drawing."""


@dataclass(frozen=True)
class TextToImage:
    """A teacher or student in memory, made by `load`. It prints nothing.

    Attributes:
        generator: the networks.
        compiled: whether the denoiser is compiled.
    """

    generator: ImageGenerator
    compiled: bool = False

    @property
    def sampling(self) -> Sampling:
        """The settings that it is sampled with by default: of the student's file, or the teacher's."""
        return self.generator.sampling

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its pictures by default, in pixels."""
        side = self.generator.backbone.picture_size
        return self.sampling.size or (side, side)

    def with_lora(self, lora: Path | str | None) -> TextToImage:
        """Load another student of the same teacher; text encoders and autoencoder are shared.

        Args:
            lora: as of `load`; None for the teacher itself.

        Raises:
            UserError: no such student, or one of another teacher.
        """
        own = self.generator
        folder = own.backbone.folder
        student = resolve_student(folder, lora, {})
        loaded = load_image_generator(
            folder,
            student.lora,
            own.backbone.device,
            precision=own.precision,
            compiled=self.compiled,
            batch=own.batch,
            encoders=own.backbone,
        )
        return replace(self, generator=replace(loaded, adapter=own.adapter))

    def sampling_with(
        self,
        *,
        steps: int | None = None,
        gamma: float | None = None,
        omega: float | None = None,
        sampler: str | None = None,
        size: Sequence[int] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Sampling:
        """Return the sampling settings with changes; arguments as of `draw`.

        Raises:
            UserError: a setting out of range, or one that the network cannot be sampled with.
        """
        named = {"steps": steps, "gamma": gamma, "omega": omega, "sampler": sampler, "size": size}
        return changed_sampling(self.sampling, {**named, **(settings or {})}, self.generator.backbone.folder)

    def png_text(self, prompt: str, seed: int, *, negative_prompt: str = "", **changes: Any) -> dict[str, str]:
        """Return the text entries of a picture's PNG.

        Args:
            changes: of the sampling settings, as of `sampling_with`.
        """
        sampling, lora = self.sampling_with(**changes), self.generator.lora
        names = {"teacher": teacher_name(self.generator.backbone.folder.path)}
        names |= {"student": student_name(lora)} if lora else {}
        return picture_settings(prompt, seed, sampling, sampling.size or self.size, negative=negative_prompt, **names)

    @checked
    def draw(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        *,
        steps: int | None = None,
        gamma: float | None = None,
        omega: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        size: Sequence[int] | None = None,
        settings: Mapping[str, Any] | None = None,
        on_call: OnCall | None = None,
    ) -> list[Image.Image]:
        """Draw pictures, equal to those of `fewstep sample`.

        Example: pictures = fewstep.load().draw(["three frogs on yellow", "an octopus"], seeds=[3, 4], steps=4)

        Args:
            prompts: text to draw, one or several.
            seeds: one for each picture; or the first of them, and each further picture adds 1. One prompt may have
                several seeds.
            steps: network evaluations of a picture.
            gamma: stochasticity of sampler sss, 0 to 1.
            omega: guidance in the papers' convention, diffusers' guidance_scale less 1; 0 for students.
            guidance_scale: the same as diffusers counts it, omega + 1; up to 1 for none.
            negative_prompt: text to lead away from: by guidance, or without it in the network's cross-attention.
            sampler: sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.
            size: (width, height) in pixels.
            settings: other sampling settings by name.
            on_call: called with (network calls done, in all) after each call; an exception in it ends the drawing.

        Returns:
            a picture for each prompt, or for each seed of one prompt, in RGB.

        Raises:
            UserError: no prompt, seeds out of range or not one for each prompt, or as `sampling_with`.
        """
        texts, numbers = _paired([prompts] if isinstance(prompts, str) else list(prompts), seeds)
        scale = omega_given(omega, guidance_scale)
        sampling = self.sampling_with(
            steps=steps, gamma=gamma, omega=scale, sampler=sampler, size=size, settings=settings
        )
        check_negative(negative_prompt, self.generator.backbone.folder, sampling, compiled=self.compiled)
        generator = replace(self.generator, negative=negative_prompt)
        if on_call is not None:
            _, height, width = generator.backbone.shape_of(sampling.size)
            batches = -(-len(texts) // (generator.batch or default_batch(height, width)))
            generator = replace(generator, denoiser=_counting(generator.denoiser, on_call, sampling.steps * batches))
        return [Image.fromarray(each) for each in generator.draw(texts, numbers, sampling, title=None)]


class LoadedModels:
    """Students of one teacher at a time, loaded when they are first wanted; the newest few stay in memory.

    Args:
        most: number of networks in memory.
        options: arguments of `load` beside the teacher and the student.
    """

    def __init__(self, most: int = 3, **options: Any) -> None:
        self.most = most
        self.options = options
        self._loaded: dict[tuple[Path, Path | None, float], TextToImage] = {}

    def get(self, folder: PipelineFolder, student: LoraHeader | None) -> TextToImage:
        """Return a student, None for the teacher itself; a file that has changed since is read again.

        Raises:
            UserError: as `load`.
        """
        changed = student.file.stat().st_mtime if student else 0.0
        key = (folder.path, student.file if student else None, changed)
        model = self._loaded.pop(key, None)
        if model is None:
            alike = next((other for place, other in self._loaded.items() if place[0] == folder.path), None)
            kept = list(self._loaded.items())[1 - self.most :] if alike and self.most > 1 else []
            self._loaded = dict(kept)
            lora = student.path if student else None
            model = alike.with_lora(lora) if alike else load(folder.path, lora, **self.options)
        self._loaded[key] = model  # at the end: the newest
        return model


def _paired(prompts: list[str], seeds: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """Return a prompt and a seed for each picture.

    Raises:
        UserError: no prompt, an empty one, numbers of prompts and seeds that do not fit, or a seed out of range.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("prompts is empty; give at least one text", field="prompts")
    numbers = list(range(seeds, seeds + len(prompts)) if isinstance(seeds, int) else seeds)
    texts = prompts * len(numbers) if len(prompts) == 1 else prompts
    if len(texts) != len(numbers) or not numbers:
        raise UserError(f"seeds has {len(numbers)} numbers for {len(texts)} prompts; give one for each", field="seeds")
    for seed in numbers:
        if not 0 <= seed < 2**63:
            raise UserError(f"seeds has {seed}, which must be at least 0 and below 2**63", field="seeds")
    return texts, numbers


def _counting(denoiser: Denoiser, on_call: OnCall, total: int) -> Denoiser:
    """Return a denoiser that reports its calls."""
    done = 0

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        nonlocal done
        output = denoiser.call(x, t, condition, role)
        done += 1
        on_call(done, total)
        return output

    return replace(denoiser, call=call)


@checked
def load(
    teacher: Path | str = "",
    lora: Path | str | None = AUTO,
    *,
    teacher_config: Path | str = "",
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    batch: int | None = None,
    adapter: Path | str | None = None,
) -> TextToImage:
    """Load a teacher or student once, to draw from it many times.

    Example: picture = fewstep.load("path/to/teacher", "runs/tcd/student").draw("an octopus", steps=4)[0]

    Args:
        teacher: pipeline folder, single-file checkpoint or hub id; the bundled teacher if empty.
        lora: student: a bundled student by name (tcd), a LoRA file or folder, or None for the teacher itself; auto is
            tcd for the bundled teacher and None for any other.
        teacher_config: pipeline folder with the configs of a single-file teacher.
        device: auto, cpu or cuda.
        precision: precision of the denoiser, auto, fp32, bf16 or fp16.
        compile: compile the denoiser; takes minutes, pays for many pictures.
        batch: pictures drawn at once; if omitted, 16 of 512 x 512 pixels, more of smaller ones, at most 64.
        adapter: folder that train-adapter wrote, for prompts in any of its languages.

    Returns:
        the loaded networks with their sampling settings.

    Raises:
        UserError: no such teacher or student, a LoRA or adapter of another base, or a number out of range.
    """
    if batch is not None and batch < 1:
        raise UserError(f"batch = {batch} must be at least 1")
    place = pick_device(device)
    dtype = pick_compute_dtype(precision, place)
    folder = read_teacher(teacher, teacher_config)
    student = resolve_student(folder, lora, {})
    generator = load_image_generator(folder, student.lora, place, adapter, dtype, compiled=compile, batch=batch)
    return TextToImage(generator, compile)
