"""Pictures: ours, the network calls and the decoding that they are made of, and the diffusers pipeline, in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.drawing import Artist, load_artist
from fewstep.settings import Sampling
from perf.timing import Timed, rounds

STEPS = 4


def time_sampling(folder: Path, batch: int, precision: torch.dtype, device: str, count: int) -> dict[str, Timed]:
    """`ours`, `calls + decode` and `diffusers` for one batch of pictures from text states that are there.

    SSS (TCD) at gamma .3 for us and for diffusers' own scheduler: the same network calls, of the same batch.
    """
    place = torch.device(device)
    artist = load_artist(folder, None, place)
    sampling = Sampling(sampler="sss", steps=STEPS, gamma=0.3)
    condition = artist.encode([f"picture {i}" for i in range(batch)])
    seeds = list(range(batch))
    mixed = torch.autocast(place.type, precision, enabled=precision != torch.float32)
    ours = Artist(artist.backbone, artist.denoiser, sampling, artist.role, precision)
    pipe = diffusers_pipeline(folder, place)
    there = {name: value.to(place) for name, value in condition.items()}
    told = {"prompt_embeds": there["text"]}
    if "pooled" in there:
        told["pooled_prompt_embeds"] = there["pooled"]
    x = torch.randn(batch, *artist.backbone.latent_shape, device=place)
    t = torch.full((batch,), 499.0, dtype=torch.float64)

    def draw() -> None:
        ours.backbone.to_pictures(ours.latents(condition, seeds, sampling))

    @torch.no_grad()
    def bare() -> None:
        with mixed:
            for _ in range(STEPS):
                artist.backbone.call(artist.backbone.network, x, t, there)
        artist.backbone.to_pictures(x)

    @torch.no_grad()
    def theirs() -> None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with mixed:
            latents: Tensor = pipe(
                **told, num_inference_steps=STEPS, guidance_scale=0, eta=0.3,
                generator=generators, output_type="latent",
            ).images  # fmt: skip
        decoded = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor, return_dict=False)[0]
        pipe.image_processor.postprocess(decoded, output_type="np")

    return rounds({"ours": draw, "calls + decode": bare, "diffusers": theirs}, place, count)


def diffusers_pipeline(folder: Path, device: torch.device) -> Any:
    """The folder's pipeline with diffusers' TCD scheduler."""
    import diffusers

    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(
        device
    )
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe
