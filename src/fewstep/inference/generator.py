"""`fewstep sample`: prompts to pictures with a teacher or a student, and sheets of them to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.backbones.autoencoder import to_bytes
from fewstep.backbones.base import Backbone, bad_weights, open_backbone
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.common.compilation import compile_networks
from fewstep.common.distributed import fail_together, gather_to_main, is_main, local_rows, world_size
from fewstep.common.errors import UserError
from fewstep.common.tensors import finite
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.draw_latents import Source, draw_latents
from fewstep.diffusion.time_conditioning import ExtraEmbedding, ExtraEmbeddingHook, split_extra
from fewstep.inference.multilingual.adapter import Adapter, load_adapter
from fewstep.students.conditioning_file import read_extra_embeddings
from fewstep.students.lora import merge_lora, read_lora
from fewstep.students.lora_checks import check_lora
from fewstep.students.lora_header import LoraHeader
from fewstep.students.sampling import teacher_sampling

MOST_LATENT_POINTS = 2**16
"""Points of latents (height x width) that the network draws at once where nobody says how many pictures: 16 of Stable
Diffusion at 512 x 512, or 4 of SDXL."""
MOST_DRAWN = 64
"""Pictures that it then draws at once at most."""


def default_batch(height: int, width: int) -> int:
    """How many pictures with latents of that size the network draws at once, where nobody says."""
    return min(MOST_DRAWN, max(1, MOST_LATENT_POINTS // (height * width)))


@dataclass(frozen=True)
class ImageGenerator:
    """A loaded network that draws: a teacher, or a student with its own settings.

    Attributes:
        precision: type that the network computes in; conversions, steps and the autoencoder are fp32.
        adapter: reads prompts of other languages in the text encoder's place; the null prompt stays the teacher's own.
        batch: pictures that the network draws at once; None for what a small GPU has room for.
        lora: file of the LoRA that is merged into the network; None for none.
        filled: a batch that is left over is filled up by its last picture, which is then drawn more than once: a
            compiled network has one graph, and a picture is the same wherever it stands in the list.
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

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> what the network is told of them, on the CPU."""
        own = self.backbone.encode
        return own(prompts) if self.adapter is None else self.adapter.encode(prompts, own)

    def latents(
        self,
        condition: Condition,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        title: str | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """One latent a seed, float32 on the CPU; `condition` has one row a seed, a source one or as many.

        A title asks for a progress bar.

        Raises:
            UserError: a latent is not finite, naming its seed and the file.
        """
        device = self.backbone.device
        null = self.backbone.null(1) if sampling.omega > 0 else {}
        null = {name: value.to(device) for name, value in null.items()}
        shape = self.backbone.shape_of(sampling.size)
        _, height, width = shape
        batch = self.batch or default_batch(height, width)
        parts = []
        silent = title is None or len(seeds) <= batch or not is_main()
        with tqdm(total=len(seeds), desc=title, unit="picture", leave=False, disable=silent) as bar:
            for start in range(0, len(seeds), batch):
                own = min(batch, len(seeds) - start)
                wide = batch if self.filled and start else own
                rows = [start + min(row, own - 1) for row in range(wide)]
                part = {name: value[rows].to(device) for name, value in condition.items()}
                with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                    begun = source
                    if source is not None and len(source.latents) > 1:
                        begun = replace(source, latents=source.latents[rows])
                    their = [seeds[row] for row in rows]
                    asked = (sampling, their, shape, self.role, device, begun, self.backbone.arranged)
                    drawn = draw_latents(self.denoiser, part, null, *asked)[:own]
                parts.append(drawn.cpu())
                if world_size() == 1:  # others would wait for the rest of this one's; `_shared` refuses in all of them
                    self._check_finite(parts[-1], seeds[start : start + own], "latent")
                bar.update(len(drawn))
        return torch.cat(parts)

    def to_pictures(self, latents: Tensor, seeds: Sequence[int]) -> np.ndarray:
        """Decode latents, one a seed: uint8 [N, H, W, 3].

        Raises:
            UserError: a decoded picture is not finite, naming its seed and the file.
        """
        parts = []
        for start, decoded in self.backbone.decoded(latents):
            self._check_finite(decoded, seeds[start : start + len(decoded)], "decoded picture")
            parts.append(to_bytes(decoded))
        return np.concatenate(parts)

    def _check_finite(self, values: Tensor, seeds: Sequence[int], what: str) -> None:
        """Refuse rows, one a seed, with numbers that are not finite; in that case alone the weights are searched."""
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
    ) -> np.ndarray:
        """One picture for each (prompt, seed), shared out as `pictures` are; each process reads its own prompts."""
        rows = local_rows(len(seeds))
        condition = self.encode([prompts[row] for row in rows])
        return self._shared(condition, rows, seeds, sampling or self.sampling, title="drawing", source=source)

    def pictures(
        self,
        condition: Condition,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        title: str | None = None,
        source: Source | None = None,
    ) -> np.ndarray:
        """The pictures of `latents`, uint8 [N, H, W, 3].

        The processes of a launch share them out; all must ask. The main one gets all, the others [0, H, W, 3].
        """
        rows = local_rows(len(seeds))
        own = {name: value[rows] for name, value in condition.items()}
        return self._shared(own, rows, seeds, sampling, title=title, source=source)

    def _shared(
        self,
        own: Condition,
        rows: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        title: str | None,
        source: Source | None,
    ) -> np.ndarray:
        """The same, of this process's rows: `own` is what the network is told of them."""
        if source is not None and len(source.latents) > 1:
            source = replace(source, latents=source.latents[rows])
        latents = self.latents(own, [seeds[row] for row in rows], sampling, title=title, source=source)
        with fail_together():
            own_seeds = [seeds[row] for row in rows]
            self._check_finite(latents, own_seeds, "latent")
            drawn = self.to_pictures(latents, own_seeds)
        return gather_to_main(torch.from_numpy(drawn), len(seeds)).numpy()


def image_generator_of(
    backbone: Backbone, sampling: Sampling = TEACHER_SAMPLING, embedding: ExtraEmbedding | None = None
) -> ImageGenerator:
    """Let a backbone draw as it is, told by `embedding` what its sampling says that it is told."""
    ear = ExtraEmbeddingHook(backbone.time_embedding(backbone.network)) if embedding else None

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        if ear is None or embedding is None:
            return backbone.call(backbone.network, x, t, condition)
        told, rest = split_extra(condition, embedding.parts)
        with ear.adding(embedding(told)):
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
) -> ImageGenerator:
    """Load a pipeline folder and, merged into it, a student's LoRA; prompts are read by an adapter if one is given.

    A student (LoRA or whole pipeline) brings its own inference settings; a LoRA that has none is sampled as TCD at
    4 steps, a pipeline that has none as a teacher.

    Args:
        precision: type that the denoiser's weights are kept and its calls computed in, after the LoRA was merged.
        compiled: compile the denoiser, for the shape of the first batch that is drawn.
        batch: pictures that it draws at once; None for what a small GPU has room for.

    Raises:
        UserError: not a pipeline, not a LoRA, or a LoRA or adapter of another base.
    """
    folder = teacher if isinstance(teacher, PipelineFolder) else read_folder(teacher)
    reads = load_adapter(adapter, folder) if adapter is not None else None
    student = check_lora(lora, folder) if isinstance(lora, Path | str) else lora
    backbone = open_backbone(folder, device)
    backbone.load_encoders()
    if student is None:
        sampling, place = teacher_sampling(folder), folder.path
    else:
        sampling, place = student.sampling or Sampling(), student.file
        merge_lora(backbone.network, read_lora(student))
    if precision != torch.float32:
        backbone.network.to(precision)  # in main memory still: the device may have no room for more
    backbone.to_device()
    embedding = read_extra_embeddings(place, folder.extra_inputs(sampling.extra_conditioning), backbone.time_width)
    image_generator = image_generator_of(backbone, sampling, embedding.to(backbone.device) if embedding else None)
    if compiled:
        compile_networks([backbone.network])
    file = student.file if student else None
    return replace(image_generator, adapter=reads, precision=precision, batch=batch, filled=compiled, lora=file)
