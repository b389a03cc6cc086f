"""Configs of Stable Diffusion 1.5, 2.1 and XL's base, for checkpoints of one file that come without them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fewstep.backbones.single_file.recognise import Version
from fewstep.common.choices import Prediction
from fewstep.common.files import atomic_folder, file_lock, write_json

_END = "<|endoftext|>"
_ATTENTION = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def _unet(version: Version, side: int) -> dict[str, Any]:
    """Return the config of the UNet; `side` in latent points."""
    common: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "sample_size": side, "layers_per_block": 2}
    down, up = _ATTENTION
    if version == "sd1":
        return {
            **common,
            "down_block_types": down,
            "up_block_types": up,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        }
    if version == "sd2":
        return {
            **common,
            "down_block_types": down,
            "up_block_types": up,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        }
    return {
        **common,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def _vae(side: int, scale: float) -> dict[str, Any]:
    """Return the config of the autoencoder; `side` in pixels."""
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": side,
        "scaling_factor": scale,
    }


def _text(
    width: int, layers: int, heads: int, act: str, projection: int, kind: str = "CLIPTextModel"
) -> dict[str, Any]:
    """Return the config of a CLIP text encoder; `eos_token_id` = 2 makes the largest token of a prompt its end."""
    return {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": projection,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": act,
        "layer_norm_eps": 1e-05,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _tokenizer(pad: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": pad,
        "do_lower_case": True,
    }


def configs(version: Version, prediction: Prediction) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a pipeline folder, by their paths in it, without the tokenizers' vocabulary.

    Networks of 2.x were trained on 768 pixels a side to predict v, and on 512 to predict eps.
    """
    side = {"sd1": 512, "sd2": 768 if prediction == "v" else 512, "sdxl": 1024}[version]
    tokenizers = {"tokenizer": "!" if version == "sd2" else _END}
    texts = {"text_encoder": _text(768, 12, 12, "quick_gelu", 768)}
    scheduler, scale = "PNDMScheduler", 0.18215
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    if version == "sd2":
        texts = {"text_encoder": _text(1024, 23, 16, "gelu", 512)}
        scheduler = "DDIMScheduler"
    if version == "sdxl":
        kind = "CLIPTextModelWithProjection"
        texts["text_encoder_2"] = _text(1280, 32, 20, "gelu", 1280, kind)
        tokenizers["tokenizer_2"] = "!"
        scheduler, scale = "EulerDiscreteScheduler", 0.13025
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    said = "v_prediction" if prediction == "v" else "epsilon"
    noise = {"_class_name": scheduler, **_BETAS, "prediction_type": said}
    if scheduler == "PNDMScheduler":
        noise |= {"skip_prk_steps": True}
    if scheduler == "EulerDiscreteScheduler":
        del noise["clip_sample"], noise["set_alpha_to_one"]
    index |= {name: ["transformers", config["architectures"][0]] for name, config in texts.items()}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", scheduler]}
    return {
        "model_index.json": index,
        "unet/config.json": _unet(version, side // 8),
        "vae/config.json": _vae(side, scale),
        "scheduler/scheduler_config.json": noise,
        **{f"{name}/config.json": config for name, config in texts.items()},
        **{f"{name}/tokenizer_config.json": _tokenizer(pad) for name, pad in tokenizers.items()},
    }


def config_folder(version: Version, prediction: Prediction, vocabulary: tuple[Path, Path], cache: Path) -> Path:
    """Return a pipeline folder of configs and tokenizers, made in a cache folder if it is not there yet.

    Args:
        vocabulary: CLIP's vocab.json and merges.txt.

    Raises:
        UserError: the cache cannot be written to.
    """
    files = configs(version, prediction)
    known = json.dumps(files, sort_keys=True) + "".join(path.read_text(encoding="utf-8") for path in vocabulary)
    place = cache / f"{version}-{prediction}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    with file_lock(place.with_name(f".{place.name}.lock")):
        if not place.is_dir():
            with atomic_folder(place, keep=True) as part:
                for name, data in files.items():
                    (part / name).parent.mkdir(exist_ok=True)
                    write_json(part / name, data)
                    if name.endswith("tokenizer_config.json"):
                        for source in vocabulary:
                            (part / name).with_name(source.name).write_bytes(source.read_bytes())
    return place
