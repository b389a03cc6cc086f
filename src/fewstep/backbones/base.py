"""What every backbone is: a pipeline folder whose network is loaded, and whose encoders are when they are asked for.

A family adds how prompts become conditions and how its network is called. Nothing here knows a method.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.backbones.config_checks import check_merges
from fewstep.backbones.lengths import words_beyond
from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder, weight_files, weight_variant
from fewstep.backbones.scheduler_config import path_of, prediction_of
from fewstep.common.errors import NotFiniteError, UserError
from fewstep.common.tensors import check_finite, first_not_finite
from fewstep.diffusion.denoiser import Condition

UNUSED = "pooler."
"""What a text encoder may lack: pictures are drawn from its states alone."""
MOST_PIXELS = 2**21
"""Pixels that the autoencoder takes at once: 8 pictures of 512 x 512, about 1 GB for each of its widest activations."""


class _EnoughError(Exception):
    """Ends a call of a network whose rest need not run."""


@contextmanager
def named(verb: str, part: str) -> Iterator[None]:
    """Turn what a library raises inside the block into one line that names the part of a pipeline.

    Raises:
        UserError: "cannot VERB PART: ..." for any error.
    """
    try:
        yield
    except (UserError, _EnoughError):
        raise
    except Exception as error:  # libraries have classes of their own, which change from version to version
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot {verb} {part}: {said}") from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say in one line what cannot be loaded; the libraries' own tables of keys stay away."""
    import diffusers.utils.logging as told
    import transformers.utils.logging as told_too

    levels = told.get_verbosity(), told_too.get_verbosity()
    told.set_verbosity_error()
    told_too.set_verbosity_error()
    try:
        with named("load", what):
            yield
    finally:
        told.set_verbosity(levels[0])
        told_too.set_verbosity(levels[1])


def whole(loaded: tuple[Any, Mapping[str, Any]], what: str) -> Any:
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


def nothing_left(loaded: tuple[Any, Mapping[str, Any]], what: str) -> tuple[Any, Mapping[str, Any]]:
    """Return a loaded network of diffusers if every weight of its files has a place in it.

    Raises:
        UserError: naming the first weight that has none: its config builds less than was trained.
    """
    left = sorted(loaded[1]["unexpected_keys"])
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        raise UserError(
            f"cannot load {what}: its config.json builds no {left[0]}{more}, which its files hold; give the config "
            "that the weights were saved with"
        )
    return loaded


def outputs_of(parts: Sequence[nn.Module], run: Callable[[], object]) -> list[Any]:
    """What each of these parts of a network says while it runs, in order; the run ends with the last of them."""
    found: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output)
        if module is parts[-1]:
            raise _EnoughError

    handles = [part.register_forward_hook(keep) for part in parts]
    try:
        with suppress(_EnoughError):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


class Backbone(ABC):
    """A loaded pipeline. Networks are frozen, in eval mode and fp32.

    The network is read into main memory, and `settle` brings it to the device: what encodes may have that to itself
    before. Encoders are on the device.

    Args:
        kept: type of the network's weights.

    Attributes:
        network: what denoises.
        path, prediction: the noise path of its scheduler and what it predicts.
        latent_shape: (channels, height, width) of a latent at the trained size.
        picture_size: pixels a side at the trained size.
        targets: where LoRA goes.
        outlets: the network's last layers, by the beginnings of their names, the very last one first.
    """

    outlets: Sequence[str]
    layout: torch.memory_format = torch.contiguous_format
    """How the network's convolutions have their weights, and with these their pictures, in memory."""
    prompts_at_once = 256
    text_classes: Sequence[str] = ()
    """Classes that a text encoder may be of; empty for any of transformers."""
    tokenizer_classes: Sequence[str] = ()
    """Classes that a tokenizer may be of; empty for any of transformers."""

    def __init__(
        self, folder: PipelineFolder, device: torch.device | str = "cpu", kept: torch.dtype = torch.float32
    ) -> None:
        self.folder = folder
        self.device = torch.device(device)
        noise = folder.noise
        self.prediction = prediction_of(noise, str(folder.path))
        self.path = path_of(noise)
        self.latent_shape = folder.latent_shape
        self.picture_size = folder.picture_size
        self.targets = list(folder.family.targets)
        self.network: nn.Module = self._loaded(folder.network, kept)
        self._readers: list[tuple[Any, Any]] | None = None
        self._vae: Any = None

    def resize(self, size: int | None) -> None:
        """Draw and learn pictures of another size than the trained one, pixels a side; None for that one.

        Raises:
            UserError: no multiple of what latents and their network ask for.
        """
        if size is not None:
            self.latent_shape, self.picture_size = self.shape_of((size, size)), size

    def shape_of(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(channels, height, width) of a latent of (width, height) pixels; of the own size for None.

        Raises:
            UserError: a side that is no multiple of what latents and their network ask for.
        """
        if size is None:
            return self.latent_shape
        self.folder.check_size("size", size)
        return self.latent_shape[0], size[1] // self.folder.scale, size[0] // self.folder.scale

    @property
    def embedded_guidance(self) -> bool:
        """Whether the network is told its guidance, and has no unconditional branch."""
        return False

    @property
    def default_guidance(self) -> float:
        """The guidance scale that such a network is told where nobody names one; 1, none, elsewhere."""
        return 1.0

    def settle(self) -> None:
        """Bring the network to the device, and lay it out as it runs fastest."""
        self.network.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]

    def _loaded(self, component: str, kept: torch.dtype = torch.float32) -> Any:
        """A component of diffusers, from its own files alone, in main memory."""
        import diffusers

        place, name = self.folder.path / component, self.folder.components[component][1]
        with loading(str(place)):
            kind = getattr(diffusers, name)
            more = {"variant": weight_variant(place), "use_safetensors": True, "output_loading_info": True}
            loaded = kind.from_pretrained(place, torch_dtype=kept, **more)
        return whole(nothing_left(loaded, str(place)), str(place)).eval().requires_grad_(False)

    def fresh_network(self) -> nn.Module:
        """Another copy of the network in fp32, on the device."""
        network: nn.Module = self._loaded(self.folder.network).to(self.device)
        return network

    @property
    def vae(self) -> Any:
        """The autoencoder, loaded at first use."""
        if self._vae is None:
            self._vae = self._loaded("vae").to(self.device, memory_format=torch.channels_last)
        return self._vae

    def _load_text(self) -> list[tuple[Any, Any]]:
        """The tokenizers and encoders that read prompts, loaded at first use, in order."""
        if self._readers is None:
            import transformers

            transformers.utils.logging.disable_progress_bar()  # its bars would stand between ours and in errors
            family = self.folder.family
            pairs = list(zip(family.tokenizers, family.encoders, strict=True))
            # every class is looked at before anything is loaded
            kinds = [
                (self._text_class(tokenizer, self.tokenizer_classes), self._text_class(encoder, self.text_classes))
                for tokenizer, encoder in pairs
            ]
            readers = []
            for (tokenizer, encoder), (reads, encodes) in zip(pairs, kinds, strict=True):
                place = self.folder.path / encoder
                with loading(str(self.folder.path / tokenizer)):
                    read = reads.from_pretrained(self.folder.path / tokenizer, local_files_only=True)
                    check_merges(self.folder.path / tokenizer, read.all_special_tokens)
                with loading(str(place)):
                    loaded = encodes.from_pretrained(
                        place,
                        local_files_only=True,
                        use_safetensors=True,
                        variant=weight_variant(place),
                        dtype=torch.float32,
                        output_loading_info=True,
                    )
                network = whole(loaded, str(place)).to(self.device).eval().requires_grad_(False)
                # a tokenizer that names no length has one of 1e30
                most = getattr(network.config, "max_position_embeddings", read.model_max_length)
                with loading(str(self.folder.path / tokenizer)):
                    read.model_max_length = int(min(read.model_max_length, most))
                readers.append((read, network))
            self._readers = readers
        return self._readers

    @property
    def text_encoders(self) -> list[Any]:
        """The networks that read prompts, in order."""
        return [encoder for _, encoder in self._load_text()]

    def _text_class(self, component: str, legal: Sequence[str]) -> Any:
        import transformers

        name = self.folder.components[component][1]
        if (legal and name not in legal) or not hasattr(transformers, name):
            raise UserError(f"{component} class {name!r} is not one of {', '.join(legal) or 'transformers'}")
        return getattr(transformers, name)

    def load_encoders(self) -> None:
        """Load the text encoders and the autoencoder now, so that broken ones are refused before long work."""
        self._load_text()
        _ = self.vae

    def release_encoders(self) -> None:
        """Drop the text encoders and the autoencoder from memory; they are loaded again when asked for."""
        self._readers = self._vae = None

    def encode(self, prompts: Sequence[str], batch: int | None = None) -> Condition:
        """Encode prompts as the pipeline does, float32 [N, ...] each on the CPU.

        Args:
            batch: prompts encoded at once; None for the family's own number.

        Raises:
            UserError: tokenizers and text encoders do not fit each other.
        """
        self._load_text()
        with named("read prompts by", self._placed(*self.folder.family.readers)):
            return self._encode(prompts, batch or self.prompts_at_once)

    @abstractmethod
    def _encode(self, prompts: Sequence[str], batch: int) -> Condition:
        """Encode prompts, `batch` at once."""

    def lost_words(self, prompts: Sequence[str]) -> list[str]:
        """Return the words of each prompt beyond what every text encoder reads; empty for none."""
        readers = self._load_text()
        with named("read prompts by", self._placed(*self.folder.family.readers)):
            spelled, lengths = self.spelled(prompts), self.lengths()
            pairs = zip(readers, lengths, strict=True)
            lost = [words_beyond(tokenizer, spelled, length) for (tokenizer, _), length in pairs]
        return [min(words, key=len) for words in zip(*lost, strict=True)]

    def spelled(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the tokenizers get them."""
        return list(prompts)

    def lengths(self) -> list[int]:
        """Tokens that each text encoder reads of a prompt, special ones counted."""
        return [int(tokenizer.model_max_length) for tokenizer, _ in self._load_text()]

    @abstractmethod
    def null(self, count: int) -> Condition:
        """The condition of the unconditional branch, as the pipeline makes it, `count` rows."""

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, *, residuals: Any = None) -> Tensor:
        """Call the network once: x [B, C, H, W], t float64 [B] in the path's time -> output like x.

        Raises:
            UserError: the network takes no such latents or conditions.
        """
        with named("run", self._placed(self.folder.network)):
            return self._call(network, x, t, condition, residuals or {})

    @abstractmethod
    def _call(
        self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, residuals: Mapping[str, Any]
    ) -> Tensor:
        """Call the network once, as `call`; `residuals` are further arguments of it."""

    def _placed(self, *components: str) -> str:
        """Name components in errors."""
        return f"the {' and '.join(components)} of {self.folder.path}"

    @abstractmethod
    def features(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """What the network makes of x on its way, [B, C, h, w] each; what comes after the last of them is not run."""

    def arranged(self, noise: Tensor) -> Tensor:
        """Noise [B, C, H, W] as a generator drew it -> where its numbers stand in the pipeline's own latents."""
        return noise

    @property
    @abstractmethod
    def feature_channels(self) -> list[int]:
        """Channels of each of its `features`."""

    @abstractmethod
    def time_embedding(self, network: nn.Module) -> nn.Module:
        """The part of a network that embeds the time."""

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        part: Any = self.time_embedding(self.network)
        return int(part.linear_2.out_features)

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Whether a network embeds w, the guidance omega in its condition, by a layer of its own."""
        return False

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Give a network such a layer, of zeros, where its kind has a place for one and it has none."""
        return

    def pictures_at_once(self, pixels: int) -> int:
        """Most pictures of so many pixels that `to_latents` hands to the autoencoder in one call."""
        return at_once(pixels)

    @torch.no_grad()
    def to_latents(self, pictures: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] -> posterior means, float32 [N, C, h, w] on the CPU, scaled as the network expects."""
        vae = self.vae
        with named("encode pictures by", self._placed("vae")):
            return encode_pictures(vae, pictures, self.device, self._placed("vae"))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures [N, 3, H, W] in about [-1, 1], with gradient."""
        vae = self.vae
        with named("decode latents by", self._placed("vae")):
            decoded: Tensor = vae.decode(from_network_scale(vae, latents), return_dict=False)[0]
            return decoded

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Decode latents a few at a time: yields the number of the first and [b, 3, H, W] in about [-1, 1]."""
        batch = at_once(latents.shape[-1] * latents.shape[-2] * self.folder.scale**2)
        for start in range(0, len(latents), batch):
            yield start, self.decode(latents[start : start + batch].to(self.device))

    def to_pictures(self, latents: Tensor) -> np.ndarray:
        """Latents -> uint8 [N, H, W, 3], rounded as diffusers rounds."""
        return np.concatenate([to_bytes(part) for _, part in self.decoded(latents)])


def to_bytes(decoded: Tensor) -> np.ndarray:
    """Pictures [N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3], rounded as diffusers rounds."""
    scaled = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return (scaled * 255).round().astype(np.uint8)


def _scale_of(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """Return (mean, factor) of an autoencoder's latents: numbers, or [C, 1, 1] where each channel has its own."""
    config = vae.config
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    each = [latents.new_tensor(values).reshape(-1, 1, 1) for values in (mean, deviation)]
    return each[0], config.scaling_factor / each[1]


def to_network_scale(vae: Any, latents: Tensor) -> Tensor:
    """Scale an autoencoder's latents [N, C, h, w] to the network's: (z - mean) factor.

    The mean is latents_mean, the factor scaling_factor / latents_std (SDXL's pipelines); or shift_factor and
    scaling_factor where the autoencoder's config names no mean and deviation of each channel.
    """
    mean, factor = _scale_of(vae, latents)
    scaled: Tensor = (latents - mean) * factor
    return scaled


def from_network_scale(vae: Any, latents: Tensor) -> Tensor:
    """Scale the network's latents to the autoencoder's, the inverse of `to_network_scale`."""
    mean, factor = _scale_of(vae, latents)
    scaled: Tensor = latents / factor + mean
    return scaled


def at_once(pixels: int) -> int:
    """How many pictures of so many pixels the autoencoder takes at once."""
    return min(128, max(1, MOST_PIXELS // pixels))


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray, device: torch.device, name: str = "the autoencoder") -> Tensor:
    """uint8 [N, H, W, 3] -> posterior means, float32 [N, C, h, w] on the CPU, scaled as the network expects.

    Args:
        name: of the autoencoder, for errors.

    Raises:
        UserError: a latent is not finite.
    """
    parts = []
    batch = at_once(pictures.shape[1] * pictures.shape[2])
    for start in range(0, len(pictures), batch):
        part = torch.from_numpy(np.array(pictures[start : start + batch])).to(device)
        part = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        found = vae.encode(part)
        # AutoencoderTiny and AutoencoderDC are deterministic
        means = found.latent_dist.mean if hasattr(found, "latent_dist") else found[0]
        parts.append(to_network_scale(vae, means).cpu())
        check_finite({"a latent": parts[-1]}, f"{name} cannot encode the pictures")
    return torch.cat(parts)


def unsound_weights(folder: PipelineFolder) -> str:
    """Return which of a pipeline's weight files holds a number that is not finite, in words; "" for none."""
    found = first_not_finite(file for part in folder.family.weighed for file in weight_files(folder.path / part))
    return f"{found[0]} holds numbers that are not finite, in {found[1]}; get a sound copy of it" if found else ""


@contextmanager
def blaming_weights(place: Path | str) -> Iterator[None]:
    """Name a pipeline's unsound weights in place of a result that is not finite for their sake.

    The weights are searched after such a result alone.

    Raises:
        UserError: naming the file; else the error of the block.
    """
    try:
        yield
    except NotFiniteError as error:
        if why := unsound_weights(read_folder(place)):
            raise UserError(why) from error
        raise


def open_backbone(path: Path | str, device: torch.device | str = "cpu", kept: torch.dtype = torch.float32) -> Backbone:
    """Load a pipeline folder, its network into main memory: who calls that has it `settle` first.

    Args:
        kept: type of the network's weights.

    Raises:
        UserError: not a pipeline folder of a known kind, or broken files.
    """
    folder = read_folder(path)
    module, _, name = folder.family.backbone.partition(":")
    backbone: Backbone = getattr(importlib.import_module(module), name)(folder, device, kept)
    return backbone


def load_backbone(path: Path | str, device: torch.device | str = "cpu") -> Backbone:
    """Load a pipeline folder, its network onto the device.

    Raises:
        UserError: as `open_backbone`.
    """
    backbone = open_backbone(path, device)
    backbone.settle()
    return backbone
