"""`fewstep train-teacher`: the bundled teacher from Emoji-8, as a folder that plain diffusers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.base import at_once, encode_pictures
from fewstep.backbones.pipeline_writer import RECORD
from fewstep.backbones.sd import encode_text
from fewstep.common.accelerator import make_accelerator
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.device import pick_device
from fewstep.common.distributed import together
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, atomic_write, hold_folder, read_json, sha256, sweep, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.diffusion.config import TEACHER_SAMPLING
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import TeacherConfig
from fewstep_worlds.emoji8.teacher.decoder import train_decoder
from fewstep_worlds.emoji8.teacher.unet import train_unet
from fewstep_worlds.emoji8.teacher.vae import reconstruction_psnr, train_vae

SHARD_BYTES = 14 * 2**20
"""Largest weight file in the repository (its limit is 15 MiB a file)."""


class WorldEncoders:
    """The finished autoencoder and the frozen text encoder, as the diffusers pipeline uses them."""

    prompts_at_once = 256

    def __init__(self, vae: Any, folder: Path) -> None:
        from transformers import AutoTokenizer, BertModel

        self.vae = vae
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.encoder: Any = BertModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> {"text": last hidden states, float32 [N, tokens, width]}."""
        return {"text": encode_text(self.tokenizer, self.encoder, prompts, torch.device("cpu"))}

    def null(self, count: int) -> dict[str, Tensor]:
        """The encoded empty prompt."""
        text = self.encode([""])["text"]
        return {"text": text.expand(count, *text.shape[1:])}

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """uint8 [N, 64, 64, 3] -> posterior means, float32 [N, C, 8, 8]."""
        return encode_pictures(self.vae, pictures, torch.device("cpu"))

    def pictures_at_once(self, pixels: int) -> int:
        """Most pictures of so many pixels that go through the autoencoder in one call."""
        return at_once(pixels)


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

    `omega` is the guidance that the teacher brings along in its record.
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


FINAL = "final.safetensors"
"""A run folder's finished autoencoder, fp32."""


def finished_vae(folder: Path) -> Any | None:
    """The autoencoder that a finished training left in `folder`, or None."""
    path = folder / FINAL
    if not path.is_file():
        return None
    vae = load_config(folder)
    vae.load_state_dict(load_tensors(path))
    return vae.eval()


def load_config(folder: Path) -> Any:
    """A freshly initialised autoencoder of the shape that the folder's config.json says."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(AutoencoderKL.load_config(folder, local_files_only=True))


def given_vae(folder: Path) -> Any:
    """A finished autoencoder of the user's.

    Raises:
        UserError: the folder holds none.
    """
    from diffusers import AutoencoderKL

    if not (folder / "config.json").is_file():
        raise UserError(f"autoencoder = {str(folder)!r} holds no config.json; give the folder of an AutoencoderKL")
    try:
        return AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load autoencoder {folder}: {' '.join(str(error).split())[:200]}") from error


def check_text(text: Path, width: int) -> None:
    """Refuse a folder without a text encoder, or with one of another width than the denoiser is made for.

    Raises:
        UserError: it is one.
    """
    config = text / "text_encoder" / "config.json"
    if not config.is_file():
        raise UserError(f"text = {str(text)!r} holds no text_encoder/; the bundled one lies in world/teacher")
    theirs = read_json(config).get("hidden_size")
    if theirs != width:
        raise UserError(f"unet.text_width = {width} is not the text encoder's; the nearest legal one is {theirs}")


def check_same_vae(ours: Any, given: Any, folder: Path) -> None:
    """Refuse a given autoencoder where the run folder already holds another.

    Raises:
        UserError: it does.
    """
    known, named = ours.state_dict(), given.state_dict()
    if known.keys() != named.keys() or any(not torch.equal(known[name], named[name]) for name in known):
        raise UserError(f"run folder {folder} holds another autoencoder than the given one; give another --out")


def save_vae(vae: Any, folder: Path) -> None:
    """Keep a finished autoencoder in its run folder: its shape, then its weights."""
    vae.save_config(folder)
    with atomic_write(folder / FINAL) as part:
        save_tensors(part, vae.state_dict())


def train_teacher(config: TeacherConfig, out: Path, target: Path) -> dict[str, float]:
    """Train autoencoder, denoiser, and the decoder once more; write the pipeline to `target`.

    What `out` already holds is resumed.

    Returns:
        the held-out PSNR of the autoencoder, in dB.
    """
    from fewstep_worlds.emoji8.location import root

    text = Path(config.text) if config.text else root() / "teacher"
    check_text(text, config.unet.text_width)
    data, heldout = emoji8.load("train"), emoji8.load("heldout-concept")
    device = pick_device("auto")
    accelerator = make_accelerator(config.vae.loop.precision, device)
    vae = finished_vae(out / "vae")
    given = given_vae(Path(config.autoencoder)) if config.autoencoder else None
    if vae is not None and given is not None:
        check_same_vae(vae, given, out / "vae")
    if vae is None:
        if given is not None:
            vae = given
        else:
            vae = train_vae(config.vae, data.pictures, heldout.pictures, out / "vae", accelerator)
        with together():
            if accelerator.is_main_process:
                save_vae(vae, out / "vae")
    vae = vae.cpu().eval()
    speed_up(vae)
    fingerprint = sha256(out / "vae" / FINAL, *sorted((text / "text_encoder").glob("*.safetensors")))
    encoders = WorldEncoders(vae, text)
    accelerator = make_accelerator(config.unet.loop.precision, device)
    with ExitStack() as held:
        with together():
            if accelerator.is_main_process:
                held.enter_context(hold_folder(out / "unet"))  # before anything is encoded into it
                sweep(out / "unet" / "cache")
        unet = train_unet(config.unet, encoders, fingerprint, out / "unet", accelerator)
    # last, on the encoder's latents as they are: the denoiser does not see the difference
    accelerator = make_accelerator(config.decoder.loop.precision, device)
    vae = train_decoder(config.decoder, vae, data.pictures, heldout.pictures, out / "decoder", accelerator)
    with together():
        if accelerator.is_main_process:
            write_teacher(target, vae, unet.cpu(), text, config.omega)
    return {"vae_psnr_heldout": reconstruction_psnr(vae, heldout.pictures)}
