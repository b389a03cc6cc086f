"""`fewstep train-teacher`: the bundled teacher from Emoji-8, as a folder that plain diffusers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.config import Config
from fewstep.errors import UserError
from fewstep.files import atomic_folder, write_json
from fewstep.training.cpu import speed_up
from fewstep.world import emoji8
from fewstep.world.train_unet import UnetConfig, train_unet
from fewstep.world.train_vae import VaeConfig, make_vae, reconstruction_psnr, train_vae

SHARD_BYTES = 14 * 2**20
"""Largest weight file in the repository (its limit is 15 MiB a file)."""


class TeacherConfig(Config):
    """The bundled teacher's recipe."""

    text: str = Field("", description="folder with text_encoder/ and tokenizer/; empty for the bundled one")
    vae: VaeConfig = VaeConfig()
    unet: UnetConfig = UnetConfig()


class TextStates:
    """The frozen text encoder: prompts -> last hidden states, as the diffusers pipeline computes them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, BertModel

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.encoder: Any = BertModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """float32 [N, tokens, width]."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states: Tensor = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states


def save_sharded(folder: Path, module: Any, stem: str = "diffusion_pytorch_model") -> None:
    """Write a diffusers model as fp16 safetensors shards of at most `SHARD_BYTES`, with config and index."""
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)
    tensors = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    total = sum(value.nbytes for value in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def save_pipeline(folder: Path, vae: Any, unet: Any, text: Path) -> None:
    """Write the whole pipeline folder, atomically: what `StableDiffusionPipeline.from_pretrained` reads."""
    with atomic_folder(folder) as part:
        for component in ("text_encoder", "tokenizer"):
            shutil.copytree(text / component, part / component)
        save_sharded(part / "vae", vae)
        save_sharded(part / "unet", unet)
        (part / "scheduler").mkdir()
        write_json(part / "scheduler" / "scheduler_config.json", SCHEDULER)
        tokenizer = json.loads((text / "tokenizer" / "tokenizer_config.json").read_text())["tokenizer_class"]
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "BertModel"],
            "tokenizer": ["transformers", tokenizer],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        write_json(part / "model_index.json", index)


SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}


def finished_vae(config: VaeConfig, folder: Path) -> Any | None:
    """The autoencoder of an earlier, finished training in `folder`, or None."""
    path = folder / "final.safetensors"
    if not path.is_file():
        return None
    vae = make_vae(config)
    vae.load_state_dict(load_file(path))
    return vae.eval()


def train_teacher(config: TeacherConfig, out: Path, target: Path) -> dict[str, float]:
    """Train autoencoder and denoiser (resuming what `out` already holds) and write the pipeline to `target`.

    Returns:
        the held-out PSNR of the autoencoder, in dB.
    """
    from accelerate import Accelerator

    from fewstep.world.location import root

    text = Path(config.text) if config.text else root() / "teacher"
    if not (text / "text_encoder" / "config.json").is_file():
        raise UserError(f"text = {str(text)!r} holds no text_encoder/; the bundled one lies in world/teacher")
    data, heldout = emoji8.load("train"), emoji8.load("heldout-concept")
    vae = finished_vae(config.vae, out / "vae")
    if vae is None:
        accelerator = Accelerator(mixed_precision=_mixed(config.vae.loop.precision))
        vae = train_vae(config.vae, data.pictures, heldout.pictures, out / "vae", accelerator)
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, out / "vae" / "final.safetensors")
    vae = vae.cpu().eval()
    speed_up(vae)
    psnr = reconstruction_psnr(vae, heldout.pictures)
    Accelerator._shared_state.clear() if hasattr(Accelerator, "_shared_state") else None
    accelerator = Accelerator(mixed_precision=_mixed(config.unet.loop.precision))
    unet = train_unet(config.unet, vae, TextStates(text), out / "unet", accelerator)
    save_pipeline(target, vae, unet.cpu(), text)
    return {"vae_psnr_heldout": psnr}


def _mixed(precision: str) -> str:
    return "no" if precision == "fp32" else precision
