"""What a pipeline folder is, found out from its JSON and headers: fast, and before anything heavy is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewstep.backbones.config_checks import (
    check_encoder,
    check_index,
    check_latents,
    check_model,
    check_scheduler,
    check_tokenizer,
    check_widths,
    defaults_of,
)
from fewstep.backbones.families import CONSISTENCY, FAMILIES, Family
from fewstep.backbones.scheduler_config import check_terminal_snr, settled
from fewstep.backbones.unsafe_weights import advice, first_pickle
from fewstep.common.choices import ExtraCondition
from fewstep.common.errors import UserError, nearest
from fewstep.common.files import read_mapping, sha256
from fewstep.common.safetensors_header import read_safetensors_header

WEIGHTS = "*.safetensors"
ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+)\.")
"""In the names of weights that were saved with an adapter on (PEFT's, and diffusers' own before it)."""
VARIANTS = ("", "fp16", "bf16")
"""Variants of weight files that are read, the plain names first: "fp16" stands for `model.fp16.safetensors`."""
LIBRARIES = ("diffusers", "transformers")
"""Where components come from; a folder may name code of its own, which is never run."""


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline on disk.

    Attributes:
        pipeline: its class in diffusers.
        family: what it is made of.
        components: component -> (library, class), from model_index.json.
    """

    path: Path
    pipeline: str
    family: Family
    components: dict[str, tuple[str, str]]

    @property
    def network(self) -> str:
        """The component that denoises."""
        return self.family.network

    def config_file(self, component: str) -> Path:
        """The JSON file of one component's config."""
        names = {"scheduler": "scheduler_config.json"} | dict.fromkeys(self.family.tokenizers, "tokenizer_config.json")
        return self.path / component / names.get(component, "config.json")

    def config(self, component: str) -> dict[str, Any]:
        """Return the config of one component as its class reads it: of the class that the pipeline names, and with
        the class's defaults for what the file lacks of the keys that fewstep reads."""
        name = self.components[component][1]
        return {**defaults_of(name), **read_mapping(self.config_file(component)), "_class_name": name}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the trained size.

        Raises:
            UserError: the configs do not say.
        """
        network, vae = self.config(self.network), self.config("vae")
        try:
            channels = int(vae["latent_channels"])
            told = int(network["in_channels"])
            said = int(network["out_channels"] or told)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path} does not say the size of its pictures and latents: {error!r}") from error
        if told != channels * self.family.packed:
            raise UserError(
                f"the {self.network} of {self.path} has in_channels = {told}, its latents have {channels}; the nearest "
                f"that is supported is a text-to-image network of {channels * self.family.packed}"
            )
        if said != told and not (self.family.variance and said == 2 * told):
            raise UserError(
                f"{self.config_file(self.network)}: out_channels = {said} beside in_channels = {told} is not "
                f"supported; the nearest that is supported is {told}"
            )
        return channels, self._side(network), self._side(network)

    def _side(self, network: Mapping[str, Any]) -> int:
        """Latent points a side at the trained size.

        Raises:
            UserError: a size that is missing, that is none, or whose sides differ.
        """
        size = network.get("sample_size") or self.family.sample_size
        if isinstance(size, list) and len(size) == 2 and self.network == "unet":
            if size[0] != size[1]:
                raise UserError(
                    f"{self.config_file(self.network)}: sample_size = {size} is no square, and trained sizes are; the "
                    f"nearest that is supported is {size[0]}, and other sizes may be drawn by the setting size"
                )
            size = size[0]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(
                f"{self.config_file(self.network)}: sample_size = {network.get('sample_size')!r} is no trained size; "
                f"give the latent points a side, 64 for pictures of {64 * self.scale} pixels"
            )
        # diffusers reads the oldest configs so: their sample_size was a default that meant nothing
        if self.family.kind == "sd" and size < 64 and _version(network) < (0, 9):
            return 64
        return size

    @property
    def noise(self) -> dict[str, Any]:
        """The scheduler's config. A shift that goes by the picture's size is the trained size's, at every size: one
        teacher has one noise path, which its students' times are points of.

        Raises:
            UserError: the configs do not say the size of latents.
        """
        patch = int(self.config(self.network).get("patch_size") or 1)
        _, height, width = self.latent_shape
        try:
            return settled(self.config("scheduler"), height * width // (self.family.packed * patch**2))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config_file('scheduler')}: no shift follows from base_shift, max_shift, base_image_seq_len "
                f"and max_image_seq_len: {error}"
            ) from error

    @property
    def scale(self) -> int:
        """Pixels a side of one latent point.

        Raises:
            UserError: the config does not say.
        """
        vae = self.config("vae")
        levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
        if not isinstance(levels, list) or not levels:
            raise UserError(f"{self.path / 'vae'} does not say its levels, block_out_channels")
        return 1 << (len(levels) - 1)  # each level but the last halves

    @property
    def unit(self) -> int:
        """Pixels that sides of pictures are multiples of: each level of a UNet but the last halves, patches are cut."""
        network = self.config(self.network)
        levels = network.get("block_out_channels")
        points = 1 << (len(levels) - 1) if isinstance(levels, list) else int(network.get("patch_size") or 1)
        return self.scale * max(points, math.isqrt(self.family.packed))

    def check_size(self, field: str, size: tuple[int, int]) -> None:
        """Refuse a (width, height) in pixels that latents and their network cannot have.

        Raises:
            UserError: naming the nearest side.
        """
        network = self.config(self.network)
        most = int(network.get("pos_embed_max_size") or 0) * int(network.get("patch_size") or 1) * self.scale
        for side in size:
            check_side(field, side, self.unit)
            if most and side > most:
                raise UserError(
                    f"{field} = {side} is more than the network has places for; the nearest legal one is {most}"
                )

    @property
    def picture_size(self) -> int:
        """Pixels a side at the trained size.

        Raises:
            UserError: the configs do not say.
        """
        return self.latent_shape[1] * self.scale

    @property
    def takes_guidance(self) -> bool:
        """Whether the network is told its guidance, and has no unconditional branch."""
        return bool(self.config(self.network).get("guidance_embeds")) or self.embeds_guidance

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is a UNet with diffusers' guidance embedding, as LCM's full weights have it.

        Raises:
            UserError: its width is no whole number above 3.
        """
        width = self.config(self.network).get("time_cond_proj_dim") if self.network == "unet" else None
        if width is not None and (not isinstance(width, int) or width < 4):
            raise UserError(
                f"{self.path / self.network} has time_cond_proj_dim = {width!r}; give a whole number from 4 on, or null"
            )
        return width is not None

    @property
    def consistency(self) -> bool:
        """Whether it is a consistency model with guidance as an input: a few jumps draw with it, no solver's steps."""
        scheduler = self.components["scheduler"][1]
        return self.embeds_guidance and (self.pipeline == CONSISTENCY or scheduler == "LCMScheduler")

    def extra_inputs(self, told: Iterable[ExtraCondition]) -> tuple[ExtraCondition, ...]:
        """What of `told` is no input of the network itself, and so embedded by weights beside it."""
        return tuple(name for name in told if name != "w" or not self.embeds_guidance)

    @property
    def denoising(self) -> str:
        """Identity of what denoises, and of the noise."""
        return self.identity(self.network, "scheduler")

    def fingerprint(self, *components: str) -> str:
        """sha256 over the bytes of the files that the components' weights are loaded from: an adapter's base."""
        return _digest_of(file for component in components for file in weight_files(self.path / component))

    def identity(self, *components: str) -> str:
        """sha256 over all that decides what the components do: whether what was made with them is stale.

        Besides the weights that is every JSON and vocabulary file: schedule, prediction type, latents' scale.

        Args:
            components: which; none for all that pictures are drawn with.
        """
        places = [self.path / component for component in components or self.family.parts]
        return _digest_of(file for place in places for file in [*weight_files(place), *_settings(place)])


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The major and minor version of diffusers that wrote a config; a late one where it is not named."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return tuple(map(int, found.groups())) if found else (1, 0)


def check_side(field: str, size: int, unit: int) -> None:
    """Refuse a side that latents and their network cannot have.

    Raises:
        UserError: naming the nearest multiple.
    """
    if size < unit or size % unit:
        legal = max(unit, round(size / unit) * unit)
        raise UserError(f"{field} = {size} is no multiple of {unit}; the nearest legal one is {legal}")


def _settings(component: Path) -> list[Path]:
    return [file for pattern in ("*.json", "*.txt", "*.model") for file in sorted(component.glob(pattern))]


def _digest_of(files: Iterable[Path]) -> str:
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """sha256 over the bytes of files, read once for each size and time of change: weights are gigabytes."""
    return sha256(*(file for file, _, _ in files))


def weight_files(component: Path) -> list[Path]:
    """The files that a component's weights are loaded from, in name order; empty if there are none.

    A folder may hold others beside them (`.non_ema`, or `.fp16` beside plain ones), which are not read and count for
    nothing.

    Raises:
        UserError: a broken index of shards.
    """
    return next((files for variant in VARIANTS if (files := _files_of(component, variant))), [])


def weight_variant(component: Path) -> str | None:
    """Return the variant that a component's weights are saved as ("fp16"), as `from_pretrained` takes it; None for
    plain file names.

    Raises:
        UserError: a broken index of shards.
    """
    return next((variant or None for variant in VARIANTS if _files_of(component, variant)), None)


def _files_of(component: Path, variant: str) -> list[Path]:
    """Return the weight files of one variant ("" for the plain names); empty if there are none."""
    dotted = f".{variant}" if variant else ""
    # where a whole file and shards lie side by side, diffusers takes the shards and transformers the file
    for name, shards_first in (("diffusion_pytorch_model", True), ("model", False)):
        whole, index = component / f"{name}{dotted}.safetensors", component / f"{name}.safetensors.index{dotted}.json"
        if whole.is_file() and not (shards_first and index.is_file()):
            return [whole]
        if index.is_file():
            listed = read_mapping(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"{index} holds no weight_map of files")
            return [component / file for file in sorted(set(listed.values()))]
    return []


def read_folder(path: Path | str, field: str = "teacher") -> PipelineFolder:
    """Identify a pipeline folder.

    Args:
        field: the setting that names it, for errors.

    Raises:
        UserError: no such folder, no model_index.json, a pipeline class without a backbone, broken weight files, or a
            network of other latents than its autoencoder's.
    """
    path = Path(path)
    index = path / "model_index.json"
    if not path.is_dir():
        reason = "is a file, not a pipeline folder" if path.exists() else "does not exist"
        raise UserError(f"{field} = {str(path)!r} {reason}; give a diffusers pipeline folder")
    if not index.is_file():
        inner = sorted([*path.glob(f"*/{index.name}"), *path.glob(f"snapshots/*/{index.name}")])
        more = f"; the nearest that does is {str(inner[0].parent)!r}" if inner else ""
        raise UserError(f"{field} = {str(path)!r} is no diffusers pipeline folder: it holds no {index.name}{more}")
    data = read_mapping(index)
    name = str(data.get("_class_name"))
    if name not in FAMILIES:
        raise UserError(
            f"{field} = {str(path)!r} is a {name}; the nearest supported pipeline is {nearest(name, FAMILIES)}"
        )
    family = FAMILIES[name]
    components = {
        key: (value[0], value[1])
        for key, value in data.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    for component in family.parts:
        if component not in components or not (path / component).is_dir():
            raise UserError(f"{field} = {str(path)!r} is incomplete: it holds no {component}")
        library = components[component][0]
        if library not in LIBRARIES and component != "scheduler":  # of a scheduler the JSON alone is read
            raise UserError(
                f"{field} = {str(path)!r} takes its {component} from {library!r}; code that is not of "
                f"{' or '.join(LIBRARIES)} is never run"
            )
    if components[family.network][1] not in family.classes:
        legal = ", ".join(family.classes)
        raise UserError(
            f"{field} = {str(path)!r} has a {components[family.network][1]} as its {family.network}; it must be {legal}"
        )
    for component in family.weighed:
        files = weight_files(path / component)
        if not files:
            files_there = sorted((path / component).glob(WEIGHTS))
            dangling = next((file for file in files_there if not file.exists()), None)
            if dangling:
                raise UserError(f"{dangling} is a link to {dangling.readlink()}, which is not there; fetch it again")
            others = [file.name for file in files_there]
            pickled = first_pickle((path / component).iterdir())
            found = f"; it holds {others[0]}, which must lie under the plain name" if others else ""
            if pickled and not others:
                found = f"; {advice(pickled)}"
            raise UserError(
                f"{path / component} holds no safetensors weights under the name that diffusers reads; pickled weights "
                f"are never read{found}"
            )
        for file in files:
            _, entries = read_safetensors_header(file)  # a missing, truncated or foreign file is refused here
            adapter = next((key for key in entries if ADAPTER.search(key)), None)
            if adapter:
                raise UserError(
                    f"{file} was saved with an adapter on: it holds {adapter}; load it as it was saved, merge the "
                    "adapter (fuse_lora and unload_lora_weights, or merge_and_unload), and save it again"
                )
    folder = PipelineFolder(path, name, family, components)
    _check_configs(folder, data)
    check_terminal_snr(folder.config("scheduler"))
    _ = folder.latent_shape  # an inpainting network, say, is refused here
    if name == CONSISTENCY and not folder.embeds_guidance:
        raise UserError(
            f"{field} = {str(path)!r} is a {name} whose {family.network} has no time_cond_proj_dim, the input of its "
            "guidance; a network without one belongs in a StableDiffusionPipeline"
        )
    return folder


def _check_configs(folder: PipelineFolder, index: Mapping[str, Any]) -> None:
    """Refuse a folder any of whose configs holds what fewstep does not act on.

    Raises:
        UserError: naming the file and the key.
    """
    family, file_of = folder.family, folder.config_file
    check_index(folder.pipeline, index, folder.path / "model_index.json")
    for component in (folder.network, "vae"):
        name, file = folder.components[component][1], file_of(component)
        check_model(name, component, read_mapping(file), file, folder.pipeline)
    check_latents(folder.config("vae"), file_of("vae"))
    for component in family.encoders:
        check_encoder(folder.components[component][1], read_mapping(file_of(component)), file_of(component))
    for component in family.tokenizers:
        file = file_of(component)
        config = read_mapping(file) if file.is_file() else {}
        check_tokenizer(folder.components[component][1], folder.path / component, config)
    own = read_mapping(file_of("scheduler"))
    used = folder.components["scheduler"][1]
    for named in dict.fromkeys([str(own.get("_class_name", used)), used]):
        # diffusers takes the pipeline's word; where the two differ, the file was of another scheduler
        check_scheduler({**own, "_class_name": named}, file_of("scheduler"), folder.pipeline)
    if folder.network == "unet":
        check_widths(folder.config("unet"), [folder.config(each) for each in family.encoders], file_of("unet"))
