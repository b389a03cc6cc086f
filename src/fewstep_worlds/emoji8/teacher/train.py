"""`fewstep world train-teacher`: the bundled teacher from Emoji-8, as a pipeline folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.autoencoder import at_once, encode_pictures
from fewstep.backbones.sd import encode_text
from fewstep.common.accelerator import make_accelerator
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.device import pick_device
from fewstep.common.distributed import fail_together
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, hold_folder, read_json, sha256, sweep
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep_worlds.common.autoencoder import load_vae, reconstruction_psnr
from fewstep_worlds.common.location import root
from fewstep_worlds.common.pipeline import write_teacher
from fewstep_worlds.common.text import load_text_encoder
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import TeacherConfig
from fewstep_worlds.emoji8.teacher.decoder import train_decoder
from fewstep_worlds.emoji8.teacher.unet import train_unet
from fewstep_worlds.emoji8.teacher.vae import train_vae


class WorldEncoders:
    """The finished autoencoder and the frozen text encoder on the CPU, for `fewstep.data.latents`."""

    prompts_at_once = 256

    def __init__(self, vae: Any, folder: Path) -> None:
        self.vae = vae
        self.tokenizer, self.encoder = load_text_encoder(folder)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return {"text": last hidden states of prompts, float32 [N, tokens, width]}."""
        return {"text": encode_text(self.tokenizer, self.encoder, prompts, torch.device("cpu"))}

    def null(self, count: int) -> dict[str, Tensor]:
        """Return the encoded empty prompt, `count` times."""
        text = self.encode([""])["text"]
        return {"text": text.expand(count, *text.shape[1:])}

    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """Return the posterior means of uint8 [N, 64, 64, 3], float32 [N, C, 8, 8]."""
        return encode_pictures(self.vae, pictures, torch.device("cpu"))

    def pictures_at_once(self, pixels: int) -> int:
        """Return how many pictures of so many pixels the autoencoder takes in one call."""
        return at_once(pixels)


FINAL = "final.safetensors"
"""A run folder's finished autoencoder, fp32."""


def finished_vae(folder: Path) -> Any | None:
    """Return the autoencoder that a finished training left in `folder`, or None."""
    from diffusers import AutoencoderKL

    if not (folder / FINAL).is_file():
        return None
    vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, local_files_only=True))
    vae.load_state_dict(load_tensors(folder / FINAL))
    return vae.eval()


def check_text(text: Path, width: int) -> None:
    """Refuse a folder without a text encoder, or with one of another width than the denoiser's."""
    config = text / "text_encoder" / "config.json"
    if not config.is_file():
        raise UserError(f"text = {str(text)!r} holds no text_encoder/; the bundled one is in world/teacher")
    theirs = read_json(config).get("hidden_size")
    if theirs != width:
        raise UserError(f"unet.text_width = {width} is not the text encoder's width; use {theirs}")


def check_same_vae(ours: Any, given: Any, folder: Path) -> None:
    """Refuse a given autoencoder where the run folder already holds another."""
    known, named = ours.state_dict(), given.state_dict()
    if known.keys() != named.keys() or any(not torch.equal(known[name], named[name]) for name in known):
        raise UserError(
            f"run folder {folder} holds another autoencoder than the given one; give another --out",
            field="autoencoder",
        )


def save_vae(vae: Any, folder: Path) -> None:
    """Write a finished autoencoder to its run folder: its shape, then its weights."""
    vae.save_config(folder)
    with atomic_write(folder / FINAL) as part:
        save_tensors(part, vae.state_dict())


def train_teacher(config: TeacherConfig, out: Path, target: Path) -> dict[str, float]:
    """Train autoencoder, denoiser, and the decoder once more, resuming what `out` holds; write the pipeline.

    Returns:
        the held-out PSNR of the autoencoder, in dB.
    """
    text = Path(config.text) if config.text else root() / "teacher"
    check_text(text, config.unet.text_width)
    data, heldout = emoji8.load("train"), emoji8.load("heldout-concept")
    device = pick_device("auto")
    accelerator = make_accelerator(config.vae.loop.precision, device)
    vae = finished_vae(out / "vae")
    given = load_vae(Path(config.autoencoder)) if config.autoencoder else None
    if vae is not None and given is not None:
        check_same_vae(vae, given, out / "vae")
    if vae is None:
        vae = given or train_vae(config.vae, data.pictures, heldout.pictures, out / "vae", accelerator)
        with fail_together():
            if accelerator.is_main_process:
                save_vae(vae, out / "vae")
    vae = vae.cpu().eval()
    speed_up(vae)
    fingerprint = sha256(out / "vae" / FINAL, *sorted((text / "text_encoder").glob("*.safetensors")))
    encoders = WorldEncoders(vae, text)
    accelerator = make_accelerator(config.unet.loop.precision, device)
    with ExitStack() as held:
        with fail_together():
            if accelerator.is_main_process:
                held.enter_context(hold_folder(out / "unet"))  # before anything is encoded into it
                sweep(out / "unet" / "cache")
        unet = train_unet(config.unet, encoders, fingerprint, out / "unet", accelerator)
    # last: the encoder and its latents, which the denoiser was trained on, do not change
    accelerator = make_accelerator(config.decoder.loop.precision, device)
    vae = train_decoder(config.decoder, vae, data.pictures, heldout.pictures, out / "decoder", accelerator)
    with fail_together():
        if accelerator.is_main_process:
            write_teacher(target, vae, unet.cpu(), text, config.omega)
    return {"vae_psnr_heldout": reconstruction_psnr(vae, heldout.pictures)}
