"""The base class of backbones: a pipeline folder with its network loaded, and its encoders at first use.

A family adds how prompts become conditions and how its network is called. Independent of methods.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.backbones.autoencoder import at_once, decode, encode_pictures, of_video, to_bytes
from fewstep.backbones.families import adapts
from fewstep.backbones.loading import EnoughError, load_network, load_text, named, words_beyond
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.backbones.scheduler_config import path_of, prediction_of
from fewstep.backbones.weight_files import weight_files
from fewstep.common.errors import NotFiniteError, UserError
from fewstep.common.tensors import finite
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.schedule import index_of
from fewstep.diffusion.time_conditioning import embedding_width


def outputs_of(parts: Sequence[nn.Module], run: Callable[[], object]) -> list[Any]:
    """Return the outputs of some modules during `run`, in order; `run` is stopped after the last of them."""
    found: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output)
        if module is parts[-1]:
            raise EnoughError

    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        with suppress(EnoughError):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def numbered(targets: Sequence[str], network: nn.Module) -> list[str]:
    """Return targets, with the network's own layers in the place of one that holds {i}."""
    names = [name for name, _ in network.named_modules()]
    every = [[name for name in names if adapts(each, name)] if "{i}" in each else [each] for each in targets]
    return [name for some in every for name in some]


class Backbone(ABC):
    """A loaded pipeline. Networks are frozen, in eval mode and fp32.

    The network is read into main memory; `to_device` moves it, so that encoders may have the device to themselves
    before. Encoders are on the device.

    Args:
        dtype: of the network's weights.

    Attributes:
        network: the denoiser.
        path, prediction: the noise path of its scheduler and what it predicts.
        latent_shape: (channels, height, width) of a latent at the trained size.
        picture_size: pixels a side at the trained size.
        targets: where LoRA goes.
        outlets: the network's last layers, by the beginnings of their names, the very last one first.
    """

    outlets: Sequence[str]
    time_embedder: str
    """Name of the module that embeds the time, in the network."""
    layout: torch.memory_format = torch.contiguous_format
    """Memory format of the network's convolutions, and of their inputs."""
    prompts_at_once = 256
    text_dtype = torch.float32
    """Type of the text encoders."""
    text_offload = False
    """Whether the text encoders' weights are in main memory."""
    text_classes: Sequence[str] = ()
    """Classes that a text encoder may be of; empty for any of transformers."""
    tokenizer_classes: Sequence[str] = ()
    """Classes that a tokenizer may be of; empty for any of transformers."""

    def __init__(
        self, folder: PipelineFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder = folder
        self.device = torch.device(device)
        noise = folder.noise
        self.prediction = prediction_of(noise, str(folder.path))
        self.path = path_of(noise)
        self.latent_shape = folder.latent_shape
        self.picture_size = folder.picture_size
        self.network: nn.Module = load_network(folder, folder.network, dtype)
        self.targets = numbered(folder.family.targets, self.network)

    def resize(self, size: int | None) -> None:
        """Set the size of pictures, pixels a side, that are drawn and learned; None for the trained one.

        Raises:
            UserError: a side that latents or the network cannot have.
        """
        if size is not None:
            self.latent_shape, self.picture_size = self.shape_of((size, size)), size

    def shape_of(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """Return (channels, height, width) of a latent of (width, height) pixels; of the own size for None.

        Raises:
            UserError: a side that latents or the network cannot have.
        """
        if size is None:
            return self.latent_shape
        self.folder.check_size("size", size)
        return self.latent_shape[0], size[1] // self.folder.scale, size[0] // self.folder.scale

    @property
    def embedded_guidance(self) -> bool:
        """Whether guidance is an input of the network, which then has no unconditional branch."""
        return self.folder.takes_guidance

    @property
    def default_guidance(self) -> float:
        """The guidance scale that such a network gets where none is set; 1, no guidance, elsewhere."""
        return 1.0

    def to_device(self) -> None:
        """Move the network to the device, in its memory layout (`layout`)."""
        self.network.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]

    def fresh_network(self) -> nn.Module:
        """Load another copy of the network in fp32, on the device."""
        network: nn.Module = load_network(self.folder, self.folder.network).to(self.device)
        return network

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, loaded at first use."""
        vae = load_network(self.folder, "vae")
        layout = torch.contiguous_format if of_video(vae) else torch.channels_last
        return vae.to(self.device, memory_format=layout)

    @cached_property
    def readers(self) -> list[tuple[Any, Any]]:
        """The tokenizers and text encoders in order, loaded at first use."""
        classes = self.tokenizer_classes, self.text_classes
        return load_text(self.folder, self.device, *classes, self.text_dtype, offload=self.text_offload)

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, in order."""
        return [encoder for _, encoder in self.readers]

    def load_encoders(self) -> None:
        """Load the text encoders and the autoencoder now, so that broken ones are refused before long work."""
        _ = self.readers, self.vae

    def share_encoders(self, other: Backbone) -> None:
        """Use the text encoders and the autoencoder that another backbone of the same folder has loaded."""
        vars(self).update({name: part for name, part in vars(other).items() if name in ("readers", "vae")})

    def release_encoders(self) -> None:
        """Drop the text encoders and the autoencoder from memory; the next use loads them again."""
        for name in ("readers", "vae"):
            vars(self).pop(name, None)

    def encode(self, prompts: Sequence[str], batch: int | None = None) -> Condition:
        """Encode prompts as the pipeline does, fp32 [N, ...] each on the CPU.

        Args:
            batch: prompts encoded at once; None for the family's own number.

        Raises:
            UserError: tokenizers and text encoders do not fit each other.
        """
        _ = self.readers  # errors of loading have texts of their own
        with named("read prompts by", self._parts(*self.folder.family.readers)):
            return self._encode(prompts, batch or self.prompts_at_once)

    @abstractmethod
    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """Encode prompts, `batch` at once."""

    def lost_words(self, prompts: Sequence[str]) -> list[str]:
        """Return the words of each prompt beyond what every text encoder reads; empty for none."""
        readers = self.readers
        with named("read prompts by", self._parts(*self.folder.family.readers)):
            texts, lengths = self.tokenizer_input(prompts), self.lengths()
            pairs = zip(readers, lengths, strict=True)
            lost = [words_beyond(tokenizer, texts, length) for (tokenizer, _), length in pairs]
        return [min(words, key=len) for words in zip(*lost, strict=True)]

    def tokenizer_input(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts as the pipeline passes them to its tokenizers."""
        return list(prompts)

    def lengths(self) -> list[int]:
        """Return how many tokens of a prompt each text encoder reads, special ones counted."""
        return [int(tokenizer.model_max_length) for tokenizer, _ in self.readers]

    def null(self, count: int) -> Condition:
        """Return the condition of the unconditional branch, `count` rows."""
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.null_row().items()}

    def null_row(self) -> Condition:
        """Return one row of the unconditional branch, as the pipeline makes it: the encoded empty prompt."""
        return self.encode([""])

    def timesteps(self, x: Tensor, t: Tensor) -> Tensor:
        """Return times as training indices, fp32 [B] on x's device; those below index 0 (clean data) become 0."""
        # a plain copy would wait for the device
        return index_of(self.path, t).clamp(min=0).float().to(x.device, non_blocking=True)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the network once: x [B, C, H, W], t float64 [B] in the path's time -> output like x.

        Raises:
            UserError: the network takes no such latents or conditions.
        """
        with named("run", self._parts(self.folder.network)):
            return self._call(network, x, t, condition)

    @abstractmethod
    def _call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the network once, as `call`."""

    def _parts(self, *components: str) -> str:
        """Name components in errors."""
        return f"the {' and '.join(components)} of {self.folder.path}"

    @abstractmethod
    def features(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return intermediate feature maps, [B, C, h, w] each; layers after the last of them are not evaluated."""

    @property
    @abstractmethod
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""

    def arranged(self, noise: Tensor) -> Tensor:
        """Rearrange noise [B, C, H, W] in drawing order to the order of the pipeline's own latents."""
        return noise

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return latents that the pipeline returns, for a picture of so many pixels, in the network's own form."""
        return latents

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """Return the module of a network that embeds the time."""
        return network.get_submodule(self.time_embedder)

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return embedding_width(self.time_embedding(self.network))

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Return whether a network has a layer that embeds w, the guidance omega in its condition."""
        return False

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Add such a layer, of zeros, where networks of this kind may have one and this one has none."""
        return

    def pictures_at_once(self, pixels: int) -> int:
        """Return how many pictures of so many pixels `to_latents` passes to the autoencoder in one call."""
        return at_once(pixels)

    @torch.no_grad()
    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """Encode uint8 [N, H, W, 3] to posterior means, fp32 [N, C, h, w] on the CPU, at the network's scale."""
        vae = self.vae
        with named("encode pictures by", self._parts("vae")):
            return encode_pictures(vae, pictures, self.device, self._parts("vae"))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pictures [N, 3, H, W] in about [-1, 1], with gradient."""
        vae = self.vae
        with named("decode latents by", self._parts("vae")):
            return decode(vae, latents)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Decode latents a few at a time: yield the number of the first and [b, 3, H, W] in about [-1, 1]."""
        batch = at_once(latents.shape[-1] * latents.shape[-2] * self.folder.scale**2)
        for start in range(0, len(latents), batch):
            yield start, self.decode(latents[start : start + batch].to(self.device))

    def to_pictures(self, latents: Tensor) -> np.ndarray:
        """Decode latents to uint8 [N, H, W, 3], rounded as diffusers rounds."""
        return np.concatenate([to_bytes(part) for _, part in self.decoded(latents)])


def bad_weights(folder: PipelineFolder) -> str:
    """Return a message that names a pipeline's weight file with a number that is not finite; "" if all are finite."""
    for file in (file for part in folder.family.weighed for file in weight_files(folder.path / part)):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118, it is no mapping
                if not finite(stream.get_tensor(name)):
                    return f"{file} holds numbers that are not finite, in {name}; fetch it again"
    return ""


@contextmanager
def naming_bad_weights(folder: PipelineFolder) -> Iterator[None]:
    """Turn a result that is not finite into an error that names the pipeline's weight file with such numbers, if any.

    The weights are searched only after such a result.

    Raises:
        UserError: naming the file; else the error of the block.
    """
    try:
        yield
    except NotFiniteError as error:
        if why := bad_weights(folder):
            raise UserError(why) from error
        raise


def open_backbone(
    folder: PipelineFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load the network of a pipeline folder into main memory; `Backbone.to_device` moves it.

    Args:
        dtype: of the network's weights.

    Raises:
        UserError: broken files.
    """
    module, _, name = folder.family.backbone.partition(":")
    backbone: Backbone = getattr(importlib.import_module(module), name)(folder, device, dtype)
    return backbone


def load_backbone(path: Path | str, device: torch.device | str = "cpu") -> Backbone:
    """Read and load a pipeline folder, its network onto the device.

    Raises:
        UserError: as `read_folder` and `open_backbone`.
    """
    backbone = open_backbone(read_folder(path), device)
    backbone.to_device()
    return backbone
