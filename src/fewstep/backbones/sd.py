"""Stable Diffusion 1.x and 2.x shaped pipelines: UNet2DConditionModel, one text encoder, AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.denoiser import Condition
from fewstep.errors import UserError
from fewstep.folder import LORA_TARGETS, PipelineFolder, read_folder
from fewstep.names import Prediction
from fewstep.scheduler_config import path_of, prediction_of

_TEXT_ENCODERS = ("CLIPTextModel", "BertModel")
_TOKENIZERS = (
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "BertTokenizer",
    "BertTokenizerFast",
    "PreTrainedTokenizerFast",
)

UNUSED = "pooler."
"""What a text encoder may lack: pictures are drawn from its states alone."""
MOST_PIXELS = 2**21
"""Pixels that the autoencoder takes at once: 8 pictures of 512 x 512, about 1 GB for each of its widest activations."""


class _EnoughError(Exception):
    """The rest of a network need not run."""


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Say in one line what cannot be loaded; the libraries' own tables of keys stay away."""
    import diffusers.utils.logging as told
    import transformers.utils.logging as told_too

    levels = told.get_verbosity(), told_too.get_verbosity()
    told.set_verbosity_error()
    told_too.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"cannot load {what}: {' '.join(str(error).split())[:300]}") from error
    finally:
        told.set_verbosity(levels[0])
        told_too.set_verbosity(levels[1])


def _whole(loaded: tuple[Any, Mapping[str, Any]], what: str) -> Any:
    """The loaded network, if the file held all of its weights; a library would fill the rest with random ones.

    Raises:
        UserError: naming the first weight that is not there.
    """
    network, info = loaded
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(UNUSED))
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"cannot load {what}: its files hold no {missing[0]}{more}; give the whole pipeline folder")
    return network


class StableDiffusion:
    """A loaded pipeline. Networks are frozen, in eval mode and fp32; nothing here knows a method.

    Attributes:
        network: the UNet.
        path, prediction: the noise path of its scheduler and what it predicts.
        latent_shape: (channels, height, width) of a latent at the trained size.
        picture_size: pixels a side at the trained size.
        targets: where LoRA goes.
    """

    targets = LORA_TARGETS

    def __init__(self, folder: PipelineFolder, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)
        scheduler = folder.config("scheduler")
        self.prediction: Prediction = prediction_of(scheduler, str(folder.path))
        self.path = path_of(scheduler)
        unet = folder.config("unet")
        self.picture_size = folder.picture_size
        with _loading(f"the config of {folder.path / 'unet'}"):
            self.latent_shape = (int(unet["in_channels"]), int(unet["sample_size"]), int(unet["sample_size"]))
        self.network: nn.Module = self._load_unet()
        self._text: tuple[Any, Any] | None = None
        self._vae: Any = None

    def _load_unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        place = self.folder.path / "unet"
        with _loading(str(place)):
            loaded = UNet2DConditionModel.from_pretrained(
                place, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        ready: nn.Module = self._ready(_whole(loaded, str(place)))
        return ready

    def _ready(self, module: Any) -> Any:
        return module.to(self.device).eval().requires_grad_(False)

    def fresh_network(self) -> nn.Module:
        """Another copy of the UNet, for full fine-tuning."""
        return self._load_unet()

    @property
    def vae(self) -> Any:
        """The autoencoder, loaded at first use."""
        if self._vae is None:
            from diffusers import AutoencoderKL

            place = self.folder.path / "vae"
            with _loading(str(place)):
                loaded = AutoencoderKL.from_pretrained(
                    place, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
                )
            self._vae = self._ready(_whole(loaded, str(place)))
        return self._vae

    def _load_text(self) -> tuple[Any, Any]:
        if self._text is None:
            import transformers

            transformers.utils.logging.disable_progress_bar()  # its bars would stand between ours and in errors

            classes = []
            for component, legal in (("tokenizer", _TOKENIZERS), ("text_encoder", _TEXT_ENCODERS)):
                name = self.folder.components[component][1]
                if name not in legal:
                    raise UserError(f"{component} class {name!r} is not one of {', '.join(legal)}")
                classes.append(getattr(transformers, name))
            place = self.folder.path / "text_encoder"
            with _loading(str(place)):
                tokenizer = classes[0].from_pretrained(self.folder.path / "tokenizer", local_files_only=True)
                loaded = classes[1].from_pretrained(
                    place, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
            self._text = tokenizer, self._ready(_whole(loaded, str(place)))
        return self._text

    def load_encoders(self) -> None:
        """Load the text encoder and the autoencoder now, so that broken ones are refused before long work."""
        self._load_text()
        _ = self.vae

    def release_encoders(self) -> None:
        """Drop the text encoder and the autoencoder from memory; they are loaded again when asked for."""
        self._text = self._vae = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 256) -> Condition:
        """Prompts -> {"text": float32 [N, tokens, width] on the CPU}, as the diffusers pipeline encodes them."""
        return {"text": encode_text(*self._load_text(), prompts, self.device, batch)}

    def null(self, count: int) -> Condition:
        """The unconditional branch: the encoded empty prompt (SDXL, unlike this family, uses zeros)."""
        text = self.encode([""])["text"]
        return {"text": text.expand(count, *text.shape[1:])}

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, *, residuals: Any = None) -> Tensor:
        """One network call: x [B, C, H, W], t float64 [B] in training indices -> output like x.

        Times below index 0 (clean data) are asked as index 0.
        """
        extra = residuals or {}
        when = t.clamp(min=0).float().to(x.device, non_blocking=True)  # a plain copy would wait for the device
        out: Tensor = network(x, when, condition["text"], return_dict=False, **extra)[0]
        return out

    def features(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """What a UNet's way down makes of x: the outputs of its down blocks and of the middle, [B, C, h, w] each.

        The way up is not gone.
        """
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            if module is network.mid_block:
                raise _EnoughError

        parts: list[nn.Module] = [*network.down_blocks, network.mid_block]  # type: ignore[misc,list-item]
        handles = [part.register_forward_hook(keep) for part in parts]
        try:
            with suppress(_EnoughError):
                self.call(network, x, t, condition)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""
        channels = list(self.network.config.block_out_channels)  # type: ignore[union-attr,arg-type]
        return [*channels, channels[-1]]

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """The part of a UNet that embeds the time."""
        part: nn.Module = network.time_embedding  # type: ignore[assignment]
        return part

    outlets = ("conv_out", "up_blocks")
    """The last layers of a UNet, the very last one first."""

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return int(self.network.time_embedding.linear_2.out_features)  # type: ignore[union-attr,arg-type]

    @torch.no_grad()
    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] -> posterior means, float32 [N, C, h, w] on the CPU, scaled as the UNet expects."""
        return encode_pictures(self.vae, pictures, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures [N, 3, H, W] in about [-1, 1], with gradient."""
        decoded: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return decoded

    @torch.no_grad()
    def to_pictures(self, latents: Tensor) -> np.ndarray:
        """Latents -> uint8 [N, H, W, 3], rounded as diffusers rounds."""
        parts = []
        batch = _at_once(latents.shape[-1] * self.picture_size // self.latent_shape[-1])
        for start in range(0, len(latents), batch):
            part = latents[start : start + batch]
            decoded = self.decode(part.to(self.device))
            scaled = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
            parts.append((scaled * 255).round().astype(np.uint8))
        return np.concatenate(parts)


@torch.no_grad()
def encode_text(tokenizer: Any, encoder: Any, prompts: Sequence[str], device: torch.device, batch: int = 256) -> Tensor:
    """Prompts -> text states, float32 [N, tokens, width] on the CPU, as the diffusers pipeline makes them."""
    masked = getattr(encoder.config, "use_attention_mask", False)
    parts = []
    for start in range(0, len(prompts), batch):
        tokens = tokenizer(
            list(prompts[start : start + batch]),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
        parts.append(states.float().cpu())  # the states of all captions would not fit beside the networks
    return torch.cat(parts)


def _at_once(size: int) -> int:
    """How many pictures of `size` pixels a side the autoencoder takes at once."""
    return min(128, max(1, MOST_PIXELS // size**2))


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N, H, W, 3] -> posterior means, float32 [N, C, h, w] on the CPU, scaled as the UNet expects."""
    parts = []
    batch = _at_once(pictures.shape[1])
    for start in range(0, len(pictures), batch):
        part = torch.from_numpy(np.array(pictures[start : start + batch])).to(device)
        part = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append((vae.encode(part).latent_dist.mean * vae.config.scaling_factor).cpu())
    return torch.cat(parts)


BACKBONES = {"sd": StableDiffusion}
"""`PipelineFolder.kind` -> class."""


def load_backbone(path: Any, device: torch.device | str = "cpu") -> StableDiffusion:
    """Load a pipeline folder.

    Raises:
        UserError: not a pipeline folder of a known kind, or broken files.
    """
    folder = read_folder(path)
    return BACKBONES[folder.kind](folder, device)
