"""What is timed: the bundled teacher, and random pipelines of Stable Diffusion's shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.backbones.teachers import teacher_path
from fewstep.common.files import atomic_folder

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """A random pipeline.

    Attributes:
        channels: of the UNet's four levels.
        side: of latents.
        autoencoder: channels of its four levels.
        layers: of the text encoder.
        inner: width within its layers.
    """

    channels: tuple[int, ...]
    side: int
    autoencoder: tuple[int, ...]
    layers: int
    inner: int


SHAPES = {
    "sd100m": Shape((128, 256, 416, 416), 16, (48, 96, 192, 192), 1, 256),
    "sd15": Shape((320, 640, 1280, 1280), 64, (128, 256, 512, 512), 12, 3072),
}
"""Of SD 1.5, and a small one whose encoders take the same part of a step: encoding a picture takes as much as 1.39
calls of SD 1.5's UNet and 1.34 here, decoding 3.13 and 3.05, reading a prompt .02 and .06 (operations counted)."""
WIDTH = 768
"""Of text states."""


def folder_of(name: str, cache: Path) -> Path:
    """The pipeline's folder, made if it is not there yet."""
    if name == "bundled":
        return teacher_path("")
    if (Path(name) / "model_index.json").is_file():
        return Path(name)
    place = cache / name
    if not (place / "model_index.json").is_file():
        with atomic_folder(place) as part:
            make_xl(part) if name == "sdxl" else make(SHAPES[name], part)
    return place


def tokenizer_in(place: Path) -> Any:
    """A tokenizer of single letters that fills 77 places, as CLIP's does."""
    from transformers import CLIPTokenizer

    place.mkdir(parents=True)
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), BEGIN, END]
    (place / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (place / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(place)


def xl_unet() -> Any:
    """SDXL's UNet, at its own size, in the default type and on the default device."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def modules(shape: Shape) -> tuple[Any, Any, Any]:
    """A UNet, an autoencoder and a text encoder in Stable Diffusion's layout, random."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=shape.side, block_out_channels=shape.channels, cross_attention_dim=WIDTH, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=shape.autoencoder, layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=shape.autoencoder[0] // 4, sample_size=8 * shape.side,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=12,
            vocab_size=49408,
        )
    )
    return unet, vae, text


def make(shape: Shape, place: Path) -> None:
    """Write a random Stable Diffusion pipeline in its own layout."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, vae, text = modules(shape)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer_in(place / "tokenizer"),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place)  # fmt: skip


def make_xl(place: Path) -> None:
    """Write a random SDXL: its UNet, autoencoder and both text encoders at their own sizes, in half precision."""
    import diffusers
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    unet = xl_unet()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025,
    )  # fmt: skip
    sizes = {"vocab_size": 49408, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    small = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **sizes
    )
    large = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        **sizes,
    )  # fmt: skip
    text, text_2 = CLIPTextModel(small), CLIPTextModelWithProjection(large)
    torch.set_default_dtype(torch.float32)
    diffusers.StableDiffusionXLPipeline(
        unet=unet, vae=vae, text_encoder=text, text_encoder_2=text_2,
        tokenizer=tokenizer_in(place / "tokenizer"),
        tokenizer_2=tokenizer_in(place / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    ).save_pretrained(place)  # fmt: skip
