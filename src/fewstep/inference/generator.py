"""Prompts to pictures with a teacher or a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.autoencoder import to_bytes
from fewstep.backbones.base import Backbone, bad_weights, open_backbone
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.common.compilation import compile_networks
from fewstep.common.distributed import fail_together, gather_to_main, is_main, local_rows, world_size
from fewstep.common.errors import UserError
from fewstep.common.messages import Bar
from fewstep.common.tensors import finite
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.draw_latents import Source, draw_latents
from fewstep.diffusion.time_conditioning import ExtraEmbedding, ExtraEmbeddingHook, split_extra
from fewstep.inference.multilingual.adapter import Adapter, load_adapter
from fewstep.inference.negative_guidance import leading_away
from fewstep.students.conditioning_file import read_extra_embeddings
from fewstep.students.lora import merge_lora
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import LoraHeader
from fewstep.students.resolve import teacher_sampling

MOST_LATENT_POINTS = 2**16
"""Latent points (height x width) of a batch by default: 16 pictures of Stable Diffusion at 512 x 512, or 4 of SDXL."""
MOST_DRAWN = 64
"""Largest default batch, in pictures."""


def default_batch(height: int, width: int) -> int:
    """Return the default batch for latents of a size."""
    return min(MOST_DRAWN, max(1, MOST_LATENT_POINTS // (height * width)))


@dataclass(frozen=True)
class ImageGenerator:
    """A loaded teacher, or a student with its own inference settings.

    Attributes:
        precision: dtype of the network's calls; conversions, steps and the autoencoder are fp32.
        adapter: encodes prompts of other languages in place of the text encoder; the null prompt stays the teacher's.
        batch: pictures drawn at once; None for what a small GPU has room for.
        lora: file of the merged LoRA, if any.
        negative: prompt that pictures are led away from: by guidance, of the unconditional branch, else by attention
            (`negative_guidance`); empty for the pipeline's own null prompt.
        filled: pad the last batch by repeating its last picture, as a compiled network has one graph.
    """

    backbone: Backbone
    denoiser: Denoiser
    sampling: Sampling
    role: str = BASE
    precision: torch.dtype = torch.float32
    adapter: Adapter | None = None
    batch: int | None = None
    lora: Path | None = None
    filled: bool = False
    negative: str = ""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, on the CPU."""
        return self.backbone.encode(prompts) if self.adapter is None else self.adapter.encode(prompts)

    def latents(
        self,
        condition: Condition,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        title: str | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """Draw one latent per seed, float32 on the CPU.

        Args:
            condition: one row per seed.
            title: of a progress bar; None for no bar.
            source: one latent or one per seed to start from.

        Raises:
            UserError: a latent is not finite.
        """
        device = self.backbone.device
        null: Condition = {}
        if sampling.omega > 0:
            null = self.encode([self.negative]) if self.negative else self.backbone.null(1)
        null = {name: value.to(device) for name, value in null.items()}
        shape = self.backbone.shape_of(sampling.size)
        _, height, width = shape
        batch = self.batch or default_batch(height, width)
        parts = []
        silent = title is None or len(seeds) <= batch or not is_main()
        bar = Bar(total=len(seeds), desc=title, unit="picture", leave=False, disable=silent)
        with bar, self._led_away(sampling, shape):
            for start in range(0, len(seeds), batch):
                count = min(batch, len(seeds) - start)
                padded = batch if self.filled and start else count
                rows = [start + min(row, count - 1) for row in range(padded)]
                part = {name: value[rows].to(device) for name, value in condition.items()}
                with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                    drawn = draw_latents(
                        self.denoiser,
                        part,
                        null,
                        sampling,
                        [seeds[row] for row in rows],
                        shape,
                        self.role,
                        device,
                        _rows_of(source, rows),
                        self.backbone.arranged,
                    )[:count]
                parts.append(drawn.cpu())
                if world_size() == 1:  # with several processes `_draw_rows` checks in all of them
                    self._check_finite(parts[-1], seeds[start : start + count], "latent")
                bar.update(len(drawn))
        return torch.cat(parts)

    def _led_away(self, sampling: Sampling, shape: tuple[int, ...]) -> AbstractContextManager[None]:
        """Return the context in which the network is led away from the negative prompt without guidance."""
        if not self.negative or sampling.omega:
            return nullcontext()
        device, network = self.backbone.device, self.backbone.network
        x, t = torch.zeros((1, *shape), device=device), torch.tensor([self.backbone.path.noisiest]).double()

        def run() -> Tensor:
            away = {name: value.to(device) for name, value in self.encode([self.negative]).items()}
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                return self.backbone.call(network, x, t, away)

        return leading_away(network, run)

    def to_pictures(self, latents: Tensor, seeds: Sequence[int]) -> np.ndarray:
        """Decode latents, one per seed, to uint8 [N, H, W, 3].

        Raises:
            UserError: a decoded picture is not finite.
        """
        parts = []
        for start, decoded in self.backbone.decoded(latents):
            self._check_finite(decoded, seeds[start : start + len(decoded)], "decoded picture")
            parts.append(to_bytes(decoded))
        return np.concatenate(parts)

    def _check_finite(self, values: Tensor, seeds: Sequence[int], what: str) -> None:
        """Refuse rows, one per seed, with numbers that are not finite, naming the seed and the likely reason."""
        if finite(values):
            return
        row = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
        folder = self.backbone.folder
        student = f" with {self.lora}" if self.lora else ""
        why = bad_weights(folder)
        if not why and self.precision != torch.float32:
            kind = str(self.precision).removeprefix("torch.")
            why = f"the weights of {folder.path}{student} are finite, so {kind} has overflowed; use precision fp32"
        elif not why:
            why = f"the weights of {folder.path}{student} are finite, so a product of them has overflowed"
        raise UserError(f"seed = {seeds[row]}: the {what} is not finite, and no picture was drawn: {why}")

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        source: Source | None = None,
        *,
        title: str | None = "drawing",
    ) -> np.ndarray:
        """Draw one picture per (prompt, seed), see `pictures`; each process encodes its own prompts."""

        def encode(rows: Sequence[int]) -> Condition:
            return self.encode([prompts[row] for row in rows])

        return self._draw(encode, seeds, sampling or self.sampling, title, source)

    def pictures(
        self, condition: Condition, seeds: Sequence[int], sampling: Sampling, *, title: str | None = None
    ) -> np.ndarray:
        """Draw and decode one picture per seed, uint8 [N, H, W, 3]; arguments as of `latents`.

        The processes of a launch share the pictures out (a collective). The main process returns all, the others
        [0, H, W, 3].
        """
        return self._draw(lambda rows: {k: v[rows] for k, v in condition.items()}, seeds, sampling, title, None)

    def _draw(
        self,
        encode: Callable[[list[int]], Condition],
        seeds: Sequence[int],
        sampling: Sampling,
        title: str | None,
        source: Source | None,
    ) -> np.ndarray:
        """Draw the rows of this process, whose condition `encode` returns, and gather the pictures of all."""
        rows = local_rows(len(seeds))
        own = [seeds[row] for row in rows]
        latents = self.latents(encode(rows), own, sampling, title=title, source=_rows_of(source, rows))
        with fail_together():
            self._check_finite(latents, own, "latent")
            drawn = self.to_pictures(latents, own)
        return gather_to_main(torch.from_numpy(drawn), len(seeds)).numpy()


def _rows_of(source: Source | None, rows: Sequence[int]) -> Source | None:
    """Return a source with the latents of some rows; one latent serves all rows."""
    return source if source is None or len(source.latents) == 1 else replace(source, latents=source.latents[rows])


def image_generator_of(
    backbone: Backbone, sampling: Sampling = TEACHER_SAMPLING, embedding: ExtraEmbedding | None = None
) -> ImageGenerator:
    """Return a generator for a backbone; `embedding` adds the extra conditioning of its sampling."""
    hook = ExtraEmbeddingHook(backbone.time_embedding(backbone.network)) if embedding else None

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        if hook is None or embedding is None:
            return backbone.call(backbone.network, x, t, condition)
        extra, rest = split_extra(condition, embedding.parts)
        with hook.adding(embedding(extra)):
            return backbone.call(backbone.network, x, t, rest)

    denoiser = Denoiser(call, backbone.path, backbone.prediction, backbone.embedded_guidance)
    return ImageGenerator(backbone, denoiser, sampling)


def load_image_generator(
    teacher: PipelineFolder | Path | str,
    lora: LoraHeader | Path | str | None = None,
    device: torch.device | str = "cpu",
    adapter: Path | str | None = None,
    precision: torch.dtype = torch.float32,
    *,
    compiled: bool = False,
    batch: int | None = None,
    encoders: Backbone | None = None,
    style: LoraHeader | None = None,
    style_scale: float = 1.0,
) -> ImageGenerator:
    """Load a pipeline folder and merge a student's LoRA into it.

    Inference settings are the student's; without any, a LoRA is sampled as TCD at 4 steps and a pipeline as a teacher.

    Args:
        adapter: folder of a language adapter for the prompts.
        precision: dtype of the denoiser's weights and calls, after the LoRA is merged.
        compiled: compile the denoiser for the shape of the first batch.
        batch: pictures drawn at once; None for what a small GPU has room for.
        encoders: loaded backbone of the same folder, whose text encoders and autoencoder are used.
        style: another LoRA, merged at `style_scale` times its own scale.

    Raises:
        UserError: not a pipeline, not a LoRA, or a LoRA or adapter of another base.
    """
    folder = teacher if isinstance(teacher, PipelineFolder) else read_folder(teacher)
    language = load_adapter(adapter, folder) if adapter is not None else None
    student = check_lora(lora, folder) if isinstance(lora, Path | str) else lora
    backbone = open_backbone(folder, device)
    if encoders is not None:
        backbone.share_encoders(encoders)
    backbone.load_encoders()
    if student is None:
        sampling, place = teacher_sampling(folder), folder.path
    else:
        sampling, place = student.sampling or Sampling(), student.file
        merge_lora(backbone.network, student)
    if style is not None:
        merge_lora(backbone.network, style, style_scale)
    if precision != torch.float32:
        backbone.network.to(precision)  # still in main memory: the device may lack the room for fp32
    backbone.to_device()
    embedding = read_extra_embeddings(place, folder.extra_inputs(sampling.extra_conditioning), backbone.time_width)
    image_generator = image_generator_of(backbone, sampling, embedding.to(backbone.device) if embedding else None)
    if compiled:
        compile_networks([backbone.network])
    file = student.file if student else None
    return replace(image_generator, adapter=language, precision=precision, batch=batch, filled=compiled, lora=file)
