"""Random pipelines that ComfyUI recognises as Stable Diffusion 1.5, SDXL and Flux: real widths where it tells kinds by
them, else narrow and short. Tokenizers are those of a checkout of ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

SIDE = 128
"""Trained size of the UNets, in pixels."""
DETECTION = "model_detection.py"
TEXT: dict[str, dict[str, int]] = {
    "sd1_clip_config.json": {"num_hidden_layers": 3},
    "clip_config_bigg.json": {"num_hidden_layers": 3},
    "text_encoders/t5_config_xxl.json": {"num_layers": 2, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4},
}
"""Sizes of the text encoders, which ComfyUI reads from these files of its own."""
FLUX = {"context_in_dim": 64, "hidden_size": 48, "num_heads": 3, "axes_dim": [4, 6, 6]}
"""Sizes of Flux, which are constants of ComfyUI's model_detection.py."""


@contextmanager
def small_sizes(comfy: Path) -> Iterator[None]:
    """Write the small sizes into a checkout of ComfyUI, and its own at the end."""
    root = comfy / "comfy"
    kept = {file: file.read_text(encoding="utf-8") for file in [*(root / name for name in TEXT), root / DETECTION]}
    try:
        for name, sizes in TEXT.items():
            (root / name).write_text(json.dumps({**json.loads(kept[root / name]), **sizes}), encoding="utf-8")
        before, kind, after = kept[root / DETECTION].partition('dit_config["image_model"] = "flux"\n')
        for name, size in FLUX.items():
            after = re.sub(rf'(dit_config\["{name}"\] = ).+', rf"\g<1>{size}", after, count=1)
        (root / DETECTION).write_text(before + kind + after, encoding="utf-8")
        yield
    finally:
        for file, text in kept.items():
            file.write_text(text, encoding="utf-8")


def clip_tokenizer(comfy: Path, **settings: Any) -> Any:
    """Return CLIP's tokenizer."""
    folder = comfy / "comfy" / "sd1_tokenizer"
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77, **settings)


def clip_large() -> Any:
    """Return a random CLIP ViT-L text encoder of few layers."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
            **TEXT["sd1_clip_config.json"], bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
        )
    )  # fmt: skip


def clip_big() -> Any:
    """Return a random OpenCLIP ViT-bigG text encoder of few layers."""
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_attention_heads=20, projection_dim=1280,
            **TEXT["clip_config_bigg.json"], hidden_act="gelu",
            bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
        )
    )  # fmt: skip


def autoencoder(scale: float, channels: int = 4, shift: float | None = None) -> Any:
    """Return a random autoencoder, whole."""
    flux = shift is not None
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scale, shift_factor=shift, use_quant_conv=not flux, use_post_quant_conv=not flux,
    )  # fmt: skip


def betas() -> dict[str, Any]:
    """Return the schedule of Stable Diffusion."""
    return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sd15(comfy: Path) -> Any:
    """Return a Stable Diffusion 1.5 with two levels of its UNet."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(320, 640), layers_per_block=1, cross_attention_dim=768,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(0.18215), text_encoder=clip_large(), tokenizer=clip_tokenizer(comfy), unet=unet,
        scheduler=diffusers.DDIMScheduler(**betas(), clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(comfy: Path) -> Any:
    """Return an SDXL whose UNet has all blocks, at the width of the first level."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(320, 320, 320), layers_per_block=2, cross_attention_dim=2048,
        attention_head_dim=(5, 5, 5), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(0.13025), text_encoder=clip_large(), text_encoder_2=clip_big(), unet=unet,
        tokenizer=clip_tokenizer(comfy), tokenizer_2=clip_tokenizer(comfy, pad_token="!"),
        scheduler=diffusers.EulerDiscreteScheduler(**betas()), add_watermarker=False,
    )  # fmt: skip


def flux(comfy: Path) -> Any:
    """Return a FLUX.1 dev of small sizes; its shift is that of 1024 pixels."""
    heads, axes = FLUX["num_heads"], FLUX["axes_dim"]
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=sum(axes),
        num_attention_heads=heads, joint_attention_dim=FLUX["context_in_dim"], pooled_projection_dim=768,
        guidance_embeds=True, axes_dims_rope=tuple(axes),
    )  # fmt: skip
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128, pad_token_id=0, feed_forward_proj="gated-gelu",
            **TEXT["text_encoders/t5_config_xxl.json"],
        )
    )  # fmt: skip
    tokenizer = transformers.T5TokenizerFast.from_pretrained(
        comfy / "comfy" / "text_encoders" / "t5_tokenizer", model_max_length=512
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(0.3611, 16, 0.1159), text_encoder=clip_large(), tokenizer=clip_tokenizer(comfy),
        text_encoder_2=t5, tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip


def write_base(kind: str, comfy: Path, folder: Path) -> Path:
    """Write the random pipeline of a kind, unless the folder is there."""
    if not folder.is_dir():
        torch.manual_seed(0)
        {"sd15": sd15, "sdxl": sdxl, "flux": flux}[kind](comfy).save_pretrained(folder)
    return folder
