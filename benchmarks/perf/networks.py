"""What is timed: the bundled teacher, and random pipelines of Stable Diffusion's shape."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.files import atomic_folder
from fewstep.settings import teacher_path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shape:
    """A random pipeline.

    Attributes:
        channels: of the UNet's four levels.
        cross: width of the text states.
        side: of latents.
    """

    channels: tuple[int, ...]
    cross: int
    side: int


SHAPES = {
    "sd100m": Shape((128, 256, 416, 416), 768, 16),
    "sd15": Shape((320, 640, 1280, 1280), 768, 64),
}


def folder_of(name: str, cache: Path) -> Path:
    """The pipeline's folder, made if it is not there yet."""
    if name == "bundled":
        return teacher_path("")
    place = cache / name
    if not (place / "model_index.json").is_file():
        with atomic_folder(place) as part:
            make(SHAPES[name], part)
    return place


def make(shape: Shape, place: Path) -> None:
    """Write a random Stable Diffusion pipeline: its UNet's layout, a narrow autoencoder, CLIP-L."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_pipelines import clip_tokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=shape.side, block_out_channels=shape.channels, cross_attention_dim=shape.cross, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=8 * shape.side,
    )  # fmt: skip
    clip_tokenizer(place / "tokenizer")
    told = place / "tokenizer" / "tokenizer_config.json"
    told.write_text(
        json.dumps(json.loads(told.read_text(encoding="utf-8")) | {"model_max_length": 77}), encoding="utf-8"
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=shape.cross,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            vocab_size=49408,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(place / "tokenizer"),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place)  # fmt: skip
