"""A teacher as a pipeline folder that plain diffusers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.backbones.pipeline_writer import RECORD
from fewstep.common.files import atomic_folder, write_json
from fewstep.common.tensors import save_tensors
from fewstep.diffusion.config import TEACHER_SAMPLING

SHARD_BYTES = 14 * 2**20
"""Largest weight file in the repository (its limit is 15 MiB a file)."""
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
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def save_sharded(folder: Path, module: Any, stem: str = "diffusion_pytorch_model") -> None:
    """Write a diffusers model as fp16 safetensors shards of at most `SHARD_BYTES`, with config and index."""
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)
    tensors = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        save_tensors(folder / f"{stem}.safetensors", shards[0], metadata={"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, shard, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    total = sum(value.nbytes for value in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_teacher(folder: Path, vae: Any, unet: Any, text: Path, omega: float) -> None:
    """Write the whole pipeline folder, atomically: what `StableDiffusionPipeline.from_pretrained` reads.

    Args:
        omega: guidance in the teacher's record.
    """
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
        sampling = TEACHER_SAMPLING.model_copy(update={"omega": omega}).model_dump(
            mode="json", exclude={"gamma", "grid"}
        )
        write_json(part / RECORD, {"sampling": sampling})
