"""A diffusers pipeline folder, read from its JSON and headers: fast, and before anything heavy is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.backbones import config_keys
from fewstep.backbones.config_checks import (
    check_keys,
    check_latents,
    check_model,
    check_scheduler,
    check_tokenizer,
    check_widths,
    text_part,
)
from fewstep.backbones.families import CONSISTENCY, FAMILIES, Family
from fewstep.backbones.latent_space import channels_of, scale_of
from fewstep.backbones.scheduler_config import check_terminal_snr, flux2_mu, with_static_shift
from fewstep.backbones.weight_files import check_weights, digest_of, weight_files
from fewstep.common.choices import ExtraCondition
from fewstep.common.errors import UserError, did_you_mean
from fewstep.common.files import read_mapping

LIBRARIES = ("diffusers", "transformers")
"""Libraries that components come from; a folder may name code of its own, which is never run."""
INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
"""The index of a modular pipeline; the places that it names for its components are not followed."""
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Config and vocabulary files of a component, and the template of a chat's tokenizer."""


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline on disk, checked by `read_folder`.

    Attributes:
        pipeline: its class in diffusers.
        family: its components, network and LoRA targets.
        components: component -> (library, class), from model_index.json.
    """

    path: Path
    pipeline: str
    family: Family
    components: dict[str, tuple[str, str]]

    @property
    def network(self) -> str:
        """Name of the denoiser's component."""
        return self.family.network

    def config_file(self, component: str) -> Path:
        """Return the JSON file of one component's config."""
        names = {"scheduler": "scheduler_config.json"} | dict.fromkeys(self.family.tokenizers, "tokenizer_config.json")
        return self.path / component / names.get(component, "config.json")

    def config(self, component: str) -> dict[str, Any]:
        """Return the config of one component as its class reads it: of the class that the pipeline names, and with
        the class's defaults for what the file lacks of the keys that fewstep reads."""
        name, known = self.components[component][1], config_keys.MODELS | config_keys.SCHEDULERS
        defaults = known[name].read if name in known else {}
        return {**defaults, **read_mapping(self.config_file(component)), "_class_name": name}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the trained size.

        Raises:
            UserError: the configs lack it, or a network of other inputs than noisy latents.
        """
        network, vae = self.config(self.network), self.config("vae")
        try:
            channels = channels_of(vae)
            taken = int(network["in_channels"])
            given = int(network["out_channels"] or taken)
            if self.family.packed > 1:
                given *= int(network.get("patch_size") or 1) ** 2
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the configs of {self.path} lack the size of pictures or latents: {error!r}") from error
        if taken != channels * self.family.packed:
            raise UserError(
                f"the {self.network} of {self.path} has in_channels = {taken}, its latents have {channels}; give a "
                f"text-to-image network, with in_channels = {channels * self.family.packed}"
            )
        if given != taken and not (self.family.variance and given == 2 * taken):
            file = self.config_file(self.network)
            raise UserError(f"{file}: out_channels = {given} is not supported; it must be {taken}, as in_channels")
        return channels, self._side(network), self._side(network)

    def _side(self, network: Mapping[str, Any]) -> int:
        """Return the latent points a side at the trained size.

        Raises:
            UserError: a size that is missing, no positive integer, or not square.
        """
        size = network.get("sample_size") or self.family.sample_size
        if isinstance(size, list) and len(size) == 2 and self.network == "unet":
            if size[0] != size[1]:
                raise UserError(
                    f"{self.config_file(self.network)}: sample_size = {size} is not square; give one number, and draw "
                    "other sizes by the setting size"
                )
            size = size[0]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(
                f"{self.config_file(self.network)}: sample_size = {network.get('sample_size')!r} is not a size; "
                f"give the latent points a side, 64 for pictures of {64 * self.scale} pixels"
            )
        # diffusers before 0.9 wrote a default sample_size that meant nothing; such configs are read as 64 there too
        found = re.match(r"(\d+)\.(\d+)", str(network.get("_diffusers_version", "")))
        early = found is not None and (int(found[1]), int(found[2])) < (0, 9)
        return 64 if self.family.kind == "sd" and size < 64 and early else size

    @property
    def noise(self) -> dict[str, Any]:
        """The scheduler's config. A shift that depends on the picture's size is that of the trained size at every
        size: a teacher has one noise path, whose points are its students' times.

        Raises:
            UserError: the configs lack the size of latents or the parameters of the shift.
        """
        _, height, width = self.latent_shape
        try:
            tokens, scheduler = height * width // self.patch**2, self.config("scheduler")
            mu = flux2_mu(tokens) if self.family.kind == "flux2" else None
            return with_static_shift(scheduler, tokens, mu)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config_file('scheduler')}: no shift follows from base_shift, max_shift, base_image_seq_len "
                f"and max_image_seq_len: {error}"
            ) from error

    @property
    def scale(self) -> int:
        """Pixels a side of one latent point.

        Raises:
            UserError: the config lacks it.
        """
        scale = scale_of(self.config("vae"))
        if scale is None:
            raise UserError(f"{self.path / 'vae'} has no block_out_channels in its config")
        return scale

    @property
    def patch(self) -> int:
        """Latent points a side of one token of a transformer; 1 for a UNet."""
        packed = math.isqrt(self.family.packed)
        own = self.config(self.network).get("patch_size") or self.family.patch
        return packed if packed > 1 else int(own[-1] if isinstance(own, list) else own)

    @property
    def unit(self) -> int:
        """Pixels that sides of pictures are multiples of, by the UNet's downsampling or the transformer's patches."""
        levels = self.config(self.network).get("block_out_channels")
        return self.scale * (1 << (len(levels) - 1) if isinstance(levels, list) else self.patch)

    def check_size(self, field: str, size: tuple[int, int]) -> None:
        """Refuse a (width, height) in pixels that latents and their network cannot have.

        Raises:
            UserError: a side that is no multiple of `unit`, or larger than the network's position embeddings.
        """
        network = self.config(self.network)
        tokens = network.get("pos_embed_max_size") or min(network.get("axes_lens", [0])[1:], default=0)
        points = min(network.get("max_size", [0])[1:], default=0)  # a video's frames are first
        most = int(tokens * self.patch or points) * self.scale
        for side in size:
            check_side(field, side, self.unit)
            if most and side > most:
                raise UserError(f"{field} = {side} must be at most {most}, the network's largest size")

    @property
    def picture_size(self) -> int:
        """Pixels a side at the trained size.

        Raises:
            UserError: as `latent_shape`.
        """
        return self.latent_shape[1] * self.scale

    @property
    def takes_guidance(self) -> bool:
        """Whether guidance is an input of the network, which then has no unconditional branch."""
        return bool(self.config(self.network).get("guidance_embeds")) or self.embeds_guidance

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is a UNet with diffusers' guidance embedding, as LCM's full weights have it.

        Raises:
            UserError: its width is no integer of at least 4.
        """
        width = self.config(self.network).get("time_cond_proj_dim") if self.network == "unet" else None
        if width is not None and (not isinstance(width, int) or width < 4):
            raise UserError(
                f"{self.path / self.network} has time_cond_proj_dim = {width!r}; give an integer of at least 4, or null"
            )
        return width is not None

    @property
    def consistency(self) -> bool:
        """Whether it is a consistency model with guidance as an input: sampled by jumps, not by a solver."""
        scheduler = self.components["scheduler"][1]
        return self.embeds_guidance and (self.pipeline == CONSISTENCY or scheduler == "LCMScheduler")

    def extra_inputs(self, names: Iterable[ExtraCondition]) -> tuple[ExtraCondition, ...]:
        """Return those of `names` that are no input of the network itself, and so embedded by weights beside it."""
        return tuple(name for name in names if name != "w" or not self.embeds_guidance)

    @property
    def denoising(self) -> str:
        """Identity of the denoiser and its scheduler."""
        return self.identity(self.network, "scheduler")

    def fingerprint(self, *components: str) -> str:
        """Return the sha256 over the files of the components' weights: identifies an adapter's base."""
        return digest_of(file for component in components for file in weight_files(self.path / component))

    def identity(self, *components: str) -> str:
        """Return the sha256 over all that determines what components compute: weights, configs and vocabularies.

        Args:
            components: which; none for all that pictures are drawn with.
        """
        places = [self.path / component for component in components or self.family.parts]
        return digest_of(
            file
            for place in places
            for file in [*weight_files(place), *(own for end in SETTINGS for own in sorted(place.glob(end)))]
        )


def index_file(path: Path) -> Path:
    """Return the index of a pipeline folder, which a modular one may have under a name of its own."""
    own = path / MODULAR_INDEX
    return own if own.is_file() and not (path / INDEX).is_file() else path / INDEX


def check_side(field: str, size: int, unit: int) -> None:
    """Refuse a side in pixels that latents and their network cannot have.

    Raises:
        UserError: no positive multiple of `unit`.
    """
    if size < unit or size % unit:
        legal = max(unit, round(size / unit) * unit)
        raise UserError(f"{field} = {size} must be a multiple of {unit}, such as {legal}")


def read_folder(path: Path | str, field: str = "teacher") -> PipelineFolder:
    """Read and check a pipeline folder: its index, the headers of its weights and all its configs.

    Args:
        field: the setting that names it, for errors.

    Raises:
        UserError: no such folder, no model_index.json, a pipeline class without a backbone, broken weight files, a
            config key that is not supported, or a network of other latents than its autoencoder's.
    """
    path = Path(path)
    index = index_file(path)
    what = f"{field} = {str(path)!r}"
    if not path.is_dir():
        reason = "is a file, not a pipeline folder" if path.exists() else "does not exist"
        raise UserError(f"{what} {reason}; give a diffusers pipeline folder")
    if not index.is_file():
        inner = sorted([*path.glob(f"*/{index.name}"), *path.glob(f"snapshots/*/{index.name}")])
        more = f"; did you mean {str(inner[0].parent)!r}?" if inner else ""
        raise UserError(f"{what} is not a diffusers pipeline folder: it holds no {index.name}{more}")
    data = read_mapping(index)
    name = str(data.get("_class_name"))
    if name not in FAMILIES:
        known = f"one of {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}"
        raise UserError(f"{what} is a {name}; it must be {known}")
    folder = folder_of(path, data, what)
    kind = folder.components[folder.network][1]
    if kind not in folder.family.classes:
        legal = ", ".join(folder.family.classes)
        raise UserError(f"{what} has a {kind} as its {folder.network}; it must be {legal}")
    lacking = next((component for component in folder.family.parts if not (path / component).is_dir()), None)
    if lacking:
        raise UserError(f"{what} is incomplete: it holds no {lacking}")
    for component in folder.family.weighed:
        check_weights(path / component)
    _check_configs(folder, data)
    check_terminal_snr(folder.config("scheduler"))
    _ = folder.latent_shape  # refuses an inpainting network, for example
    if name == CONSISTENCY and not folder.embeds_guidance:
        raise UserError(
            f"{what} is a {name} whose {folder.network} has no time_cond_proj_dim, the input of its guidance; a "
            "network without one belongs in a StableDiffusionPipeline"
        )
    return folder


def folder_of(path: Path, index: Mapping[str, Any], what: str) -> PipelineFolder:
    """Return a pipeline folder by its model_index.json; its files are not checked.

    Args:
        what: names the folder in errors.

    Raises:
        UserError: the index lacks a component that pictures are drawn with, or takes one from another library.
    """
    name = str(index["_class_name"])
    components = {
        key: (value[0], value[1])
        for key, value in index.items()
        if isinstance(value, list) and len(value) in (2, 3) and all(isinstance(word, str) for word in value[:2])
    }
    for component in FAMILIES[name].parts:
        if component not in components:
            raise UserError(f"{what} is incomplete: it holds no {component}")
        library = components[component][0]
        if library not in LIBRARIES and component != "scheduler":  # of a scheduler the JSON alone is read
            known = " or ".join(LIBRARIES)
            raise UserError(f"{what} takes its {component} from {library!r}; code that is not of {known} is never run")
    return PipelineFolder(path, name, FAMILIES[name], components)


def _check_configs(folder: PipelineFolder, index: Mapping[str, Any]) -> None:
    """Refuse a folder with a config key that fewstep does not act on."""
    family, file_of = folder.family, folder.config_file
    named = {key: value for key, value in index.items() if value != [None, None]}
    check_keys(config_keys.PIPELINES[folder.pipeline], named, index_file(folder.path))
    for component in (folder.network, "vae"):
        name, file = folder.components[component][1], file_of(component)
        check_model(name, component, read_mapping(file), file, folder.pipeline)
    check_latents(folder.config("vae"), file_of("vae"))
    for component in family.encoders:
        kind = folder.components[component][1]
        keys = config_keys.ENCODERS.get(kind) or config_keys.MODELS.get(kind)
        if keys:  # a class without a table is refused when it is loaded
            check_keys(keys, text_part(read_mapping(file_of(component))), file_of(component))
    for component in family.tokenizers:
        file = file_of(component)
        config = read_mapping(file) if file.is_file() else {}
        check_tokenizer(folder.components[component][1], folder.path / component, config)
    own = read_mapping(file_of("scheduler"))
    used = folder.components["scheduler"][1]
    for kind in dict.fromkeys([str(own.get("_class_name", used)), used]):
        # diffusers builds the class of model_index.json; where the two differ, the file was of another scheduler
        check_scheduler({**own, "_class_name": kind}, file_of("scheduler"), folder.pipeline)
    if folder.network == "unet":
        check_widths(folder.config("unet"), [folder.config(each) for each in family.encoders], file_of("unet"))
