"""What a pipeline folder is, found out from its JSON alone: fast, and before anything heavy is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, nearest
from fewstep.files import read_mapping
from fewstep.tensor_header import read_safetensors_header

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

    def fingerprint(self, *components: str) -> str:
        """sha256 over the weights of the components: which base an adapter belongs to.

        Hashes the bytes of every safetensors file in name order.
        """
        return _sha256(file for component in components for file in sorted((self.path / component).glob(WEIGHTS)))

    def identity(self, *components: str) -> str:
        """sha256 over all that decides what the components do: whether what was made with them is stale.

        Besides the weights that is every JSON and vocabulary file: schedule, prediction type, latents' scale.

        Args:
            components: which; none for all that pictures are drawn with.
        """
        return _sha256(
            file
            for component in components or PARTS
            for pattern in (WEIGHTS, "*.json", "*.txt")
            for file in sorted((self.path / component).glob(pattern))
        )


def _sha256(files: Iterable[Path]) -> str:
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """sha256 over the bytes of files, read once for each size and time of change: weights are gigabytes."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_folder(path: Path | str) -> PipelineFolder:
    """Identify a pipeline folder.

    Raises:
        UserError: no such folder, no model_index.json, a pipeline class without a backbone, or broken weight files.
    """
    path = Path(path)
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"teacher = {str(path)!r} is no diffusers pipeline folder: it holds no model_index.json")
    data = read_mapping(index)
    name = str(data.get("_class_name"))
    if name not in KNOWN:
        raise UserError(
            f"teacher = {str(path)!r} is a {name}; the nearest supported pipeline is {nearest(name, KNOWN)}"
        )
    components = {
        key: (value[0], value[1])
        for key, value in data.items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
    }
    for component in PARTS:
        if component not in components or not (path / component).is_dir():
            raise UserError(f"teacher = {str(path)!r} is incomplete: it holds no {component}")
    for component in ("unet", "vae", "text_encoder"):
        files = list((path / component).glob(WEIGHTS))
        if not files:
            raise UserError(f"{path / component} holds no safetensors weights; pickled weights are never read")
        for file in files:
            read_safetensors_header(file)  # a truncated or foreign file is refused here
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
