"""What a pipeline folder is, found out from its JSON and headers: fast, and before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, nearest
from fewstep.files import read_mapping, sha256
from fewstep.tensor_header import read_safetensors_header

LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
"""The layers that LCM-LoRA, TCD and TLCM adapt (suffixes of module names)."""
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
"""What pictures are drawn with."""
WEIGHTS = "*.safetensors"
KNOWN = {"StableDiffusionPipeline": "sd"}
"""Pipeline class -> backbone."""


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline on disk.

    Attributes:
        kind: the backbone that loads it.
        components: component -> (library, class), from model_index.json.
    """

    path: Path
    kind: str
    components: dict[str, tuple[str, str]]

    def config(self, component: str) -> dict[str, Any]:
        """The JSON config of one component."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_mapping(self.path / component / name)

    @property
    def picture_size(self) -> int:
        """Pixels a side at the trained size.

        Raises:
            UserError: the configs do not say.
        """
        unet, vae = self.config("unet"), self.config("vae")
        try:
            return int(unet["sample_size"]) << (len(vae["block_out_channels"]) - 1)  # each level but the last halves
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path} does not say the size of its pictures: {error!r}") from error

    def fingerprint(self, *components: str) -> str:
        """sha256 over the bytes of the files that the components' weights are loaded from: an adapter's base."""
        return _digest_of(file for component in components for file in weight_files(self.path / component))

    def identity(self, *components: str) -> str:
        """sha256 over all that decides what the components do: whether what was made with them is stale.

        Besides the weights that is every JSON and vocabulary file: schedule, prediction type, latents' scale.

        Args:
            components: which; none for all that pictures are drawn with.
        """
        places = [self.path / component for component in components or PARTS]
        return _digest_of(file for place in places for file in [*weight_files(place), *_settings(place)])


def _settings(component: Path) -> list[Path]:
    return [file for pattern in ("*.json", "*.txt") for file in sorted(component.glob(pattern))]


def _digest_of(files: Iterable[Path]) -> str:
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """sha256 over the bytes of files, read once for each size and time of change: weights are gigabytes."""
    return sha256(*(file for file, _, _ in files))


def weight_files(component: Path) -> list[Path]:
    """The files that a component's weights are loaded from, in name order; empty if there are none.

    A folder may hold others beside them (`.fp16`, `.non_ema`), which are not read and count for nothing.

    Raises:
        UserError: a broken index of shards.
    """
    # where a whole file and shards lie side by side, diffusers takes the shards and transformers the file
    for name, shards_first in (("diffusion_pytorch_model", True), ("model", False)):
        whole, index = component / f"{name}.safetensors", component / f"{name}.safetensors.index.json"
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
        UserError: no such folder, no model_index.json, a pipeline class without a backbone, or broken weight files.
    """
    path = Path(path)
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{field} = {str(path)!r} is no diffusers pipeline folder: it holds no model_index.json")
    data = read_mapping(index)
    name = str(data.get("_class_name"))
    if name not in KNOWN:
        raise UserError(
            f"{field} = {str(path)!r} is a {name}; the nearest supported pipeline is {nearest(name, KNOWN)}"
        )
    components = {
        key: (value[0], value[1])
        for key, value in data.items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
    }
    for component in PARTS:
        if component not in components or not (path / component).is_dir():
            raise UserError(f"{field} = {str(path)!r} is incomplete: it holds no {component}")
    for component in ("unet", "vae", "text_encoder"):
        files = weight_files(path / component)
        if not files:
            others = sorted(file.name for file in (path / component).glob(WEIGHTS))
            found = f"; it holds {others[0]}, which must lie under the plain name" if others else ""
            raise UserError(
                f"{path / component} holds no safetensors weights under the name that diffusers reads; pickled weights "
                f"are never read{found}"
            )
        for file in files:
            read_safetensors_header(file)  # a missing, truncated or foreign file is refused here
    folder = PipelineFolder(path, KNOWN[name], components)
    check_terminal_snr(folder.config("scheduler"))
    return folder


def check_terminal_snr(scheduler: dict[str, Any]) -> None:
    """Refuse an eps network on a schedule that ends in pure noise: x0 = (x - sigma eps)/alpha is not there.

    Raises:
        UserError: it is one.
    """
    if scheduler.get("rescale_betas_zero_snr") and scheduler.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "prediction_type = 'epsilon' with zero terminal SNR (rescale_betas_zero_snr) has no x0 at the noisiest "
            "time; the nearest legal one is 'v_prediction', or rescale_betas_zero_snr = false"
        )
