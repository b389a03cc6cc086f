"""Training of the teacher on an endless stream of scenes and prompts, and its pipeline folder."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.sd import encode_text
from fewstep.backbones.unet import padded_tokens
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.files import sha256
from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.schedule import scaled_linear
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import load_vae, to_pictures, to_tensor
from fewstep_worlds.common.denoiser import eps_loss, load_unet, make_unet
from fewstep_worlds.common.location import root
from fewstep_worlds.common.networks import copy_weights
from fewstep_worlds.common.pipeline import SCHEDULER, write_teacher
from fewstep_worlds.common.text import load_text_encoder, save_text_weights, trim_text
from fewstep_worlds.common.training import ENDLESS, Weights, fit
from fewstep_worlds.stickers.accuracy import scene_accuracy
from fewstep_worlds.stickers.autoencoder import AutoencoderMetrics
from fewstep_worlds.stickers.dataset import (
    REFERENCE_SEED,
    TRAINING_SEED,
    SceneWorkers,
    draw_captioned,
    fingerprint,
)
from fewstep_worlds.stickers.grammar import phrases
from fewstep_worlds.stickers.prompts import unseen_prompts
from fewstep_worlds.stickers.reader import load_reader, read_pictures
from fewstep_worlds.stickers.scene import SIDE
from fewstep_worlds.stickers.settings import TeacherConfig
from fewstep_worlds.stickers.sprites import sprite_folder

TOKENS = 28
"""Tokens of a prompt, [CLS] and [SEP] included. 1 prompt of 1,000 is longer and is cut."""


TEXT = "text_encoder."
"""Prefix of the text encoder's weights among those that are trained."""


class Encoders:
    """The autoencoder and the text encoder, on one device."""

    def __init__(self, vae: Any, text: Path, device: torch.device) -> None:
        speed_up(vae)
        self.device = device
        self.vae = vae.requires_grad_(False).to(device)
        self.tokenizer, encoder = load_text_encoder(text)
        self.encoder = encoder.to(device)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return token numbers, int64 [N, tokens], on the device."""
        ids: Tensor = padded_tokens(self.tokenizer, prompts, self.device).input_ids
        return ids

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Return text states, float32 [N, tokens, width], on the device."""
        return encode_text(self.tokenizer, self.encoder, prompts, self.device).to(self.device)

    @torch.no_grad()
    def latents(self, pictures: np.ndarray) -> Tensor:
        """Return posterior means of uint8 [N, 64, 64, 3], float32 [N, C, 16, 16], on the device."""
        means: Tensor = self.vae.encode(to_tensor(pictures).to(self.device)).latent_dist.mean
        return means.float()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> np.ndarray:
        """Return decoded latents, uint8 [N, 64, 64, 3]."""
        return to_pictures(self.vae.decode(latents.to(self.device)).sample)


@torch.no_grad()
def draw(
    unet: Any, encoders: Encoders, prompts: Sequence[str], *, steps: int, omega: float, seed: int, batch: int = 50
) -> np.ndarray:
    """Return pictures of prompts by guided DDIM, uint8 [N, 64, 64, 3]; omega is guidance in the papers' convention."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(steps)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = np.stack([generator(seed, "stickers sample", i).standard_normal(shape) for i in range(len(prompts))])
    null = encoders.states([""])
    parts = []
    for start in range(0, len(prompts), batch):
        states = encoders.states(prompts[start : start + batch])
        both = torch.cat([states, null.expand_as(states)])
        x = torch.from_numpy(noise[start : start + batch]).float().to(encoders.device)
        for t in scheduler.timesteps:
            stated, empty = unet(torch.cat([x, x]), t, both, return_dict=False)[0].float().chunk(2)
            x = scheduler.step(stated + omega * (stated - empty), t, x).prev_sample
        parts.append(encoders.pictures(x))
    return np.concatenate(parts)


class TeacherMetrics:
    """FD-Lite0 of samples of unseen prompts, and their scene accuracy where there is a reader."""

    def __init__(
        self, config: TeacherConfig, encoders: Encoders, cache: Path, folder: Path | None, accelerator: Accelerator
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.prompts = unseen_prompts("open", config.validation_prompts, REFERENCE_SEED)
        self.reader = load_reader(Path(config.reader)) if config.reader else None
        self.real = AutoencoderMetrics(folder, cache, config.validation_prompts)
        self.floors = {f"autoencoder_{name}": value for name, value in self.real(encoders.vae).items()}

    def __call__(self, unet: Any, encoders: Encoders) -> dict[str, float]:
        """Return the figures of a denoiser and its text encoder."""
        config, texts = self.config, [prompt.text for prompt in self.prompts]
        steps, omega = config.validation_steps, config.omega
        with self.accelerator.autocast():
            pictures = draw(unet, encoders, texts, steps=steps, omega=omega, seed=REFERENCE_SEED)
        result = {"fd": self.real.fd(pictures), **self.floors}
        if self.reader:
            claims = [prompt.claim for prompt in self.prompts]
            shares = scene_accuracy(read_pictures(self.reader, pictures), claims)
            result |= {f"accuracy {name}": share.value for name, share in shares.items()}
        return result


def train_teacher(
    config: TeacherConfig, out: Path, target: Path, accelerator: Accelerator, folder: Path | None = None
) -> None:
    """Train the denoiser in the run folder `out`, resuming what is there, and write the pipeline to `target`.

    Raises:
        UserError: the autoencoder, text encoder or sprite sheets cannot be read, or `out` holds another run.
    """
    vae = load_vae(Path(config.autoencoder))
    text = out / "text"
    if not text.is_dir():
        trim_text(Path(config.text) if config.text else root() / "teacher", text, phrases(), TOKENS, config.text_layers)
    device = accelerator.device
    encoders = Encoders(vae, text, device)
    shape = (vae.config.latent_channels, SIDE // 2 ** (len(vae.config.block_out_channels) - 1))

    def make() -> Any:
        unet = make_unet(config, *shape, encoders.encoder.config.hidden_size, plain=1)
        speed_up(unet)
        return unet.to(device)

    torch.manual_seed(config.loop.seed)
    unet = make()
    if config.unet:
        copy_weights(load_unet(Path(config.unet)), unet, "unet")
    path = scaled_linear()
    total = int(path.noisiest) + 1
    metrics: TeacherMetrics | None = None

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        scenes, which = np.unique(items // config.noises, return_inverse=True)
        pictures, prompts = workers.captioned(scenes + config.first_scene)
        empty = rng.chance("empty prompt", config.prompt_dropout).cpu().numpy()
        with accelerator.autocast():
            latents = encoders.latents(pictures)
        tokens = encoders.tokens([*prompts, ""])
        return {"latents": latents[which], "tokens": tokens[np.where(empty, len(prompts), which)]}

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        latents = batch["latents"]
        prompts, which = torch.unique(batch["tokens"], dim=0, return_inverse=True)
        states = encoders.encoder(prompts)[0].float()[which]
        eps = rng.normal("noise", tuple(latents.shape[1:]))
        return eps_loss(unet, path, latents, states, rng.integers("t", 0, total), eps, config.snr_power)

    def averaged(weights: Weights) -> tuple[Any, Encoders]:
        own, found = copy.copy(encoders), make()
        own.encoder = copy.deepcopy(encoders.encoder)
        of_text = {name: value for name, value in weights["unet"].items() if name.startswith(TEXT)}
        found.load_state_dict({name: value for name, value in weights["unet"].items() if name not in of_text})
        text_weights = {name.removeprefix(TEXT): value for name, value in of_text.items()}
        own.encoder.load_state_dict(own.encoder.state_dict() | text_weights)
        return found.eval(), own

    def evaluate(weights: Weights) -> dict[str, float]:
        nonlocal metrics
        metrics = metrics or TeacherMetrics(config, encoders, out / "features", folder, accelerator)
        return metrics(*averaged(weights))

    trained = dict(unet.named_parameters())
    if config.train_text:  # its embeddings are kept, so that words that no scene names stay near those that one does
        layers = encoders.encoder.encoder.requires_grad_(True)
        trained |= {f"{TEXT}encoder.{name}": weight for name, weight in layers.named_parameters()}
    plan = [Update("unet", trained, loss, config.optim)]
    _, prompts = draw_captioned(TRAINING_SEED, np.arange(64), folder or sprite_folder())
    inputs = {
        "scenes": fingerprint(folder),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "autoencoder": sha256(*sorted(Path(config.autoencoder).glob("*.safetensors"))),
        "text": sha256(*sorted(text.rglob("*.safetensors"))),
        **({"unet": sha256(*sorted(Path(config.unet).glob("*.safetensors")))} if config.unet else {}),
    }
    with SceneWorkers(config.workers, folder=folder) as workers:
        validate = evaluate if config.validation_prompts else None
        weights = fit("denoiser", plan, fetch, ENDLESS, out, config, config.loop, accelerator, inputs, validate)
    unet, encoders = averaged(weights)
    last = out / "text-trained"
    shutil.copytree(text, last, dirs_exist_ok=True)
    save_text_weights(last, encoders.encoder.state_dict())
    write_teacher(target, vae.cpu(), unet.cpu(), last, config.omega)
