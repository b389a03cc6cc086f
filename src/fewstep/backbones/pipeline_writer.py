"""A fully fine-tuned student as a whole pipeline folder, with its inference settings beside the weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.backbones.families import CONSISTENCY
from fewstep.backbones.modular import modular_index
from fewstep.backbones.pipeline_folder import INDEX, LIBRARIES, MODULAR_INDEX, PipelineFolder
from fewstep.backbones.scheduler_config import BETAS, is_flow
from fewstep.backbones.weight_files import weight_files, weight_variant
from fewstep.common.config import validate
from fewstep.common.files import final_path, read_mapping, write_json
from fewstep.diffusion.config import Sampling

if TYPE_CHECKING:  # its settings are read before torch is
    from torch import nn

RECORD = "fewstep.json"
"""The file of inference settings in a pipeline folder; diffusers ignores it."""


PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx")
"""Weights that are never read here, and so not copied."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def write_pipeline(place: Path, base: PipelineFolder, network: nn.Module, record: Mapping[str, Any]) -> None:
    """Copy the pipeline folder `base` with another denoiser; write `record` (with a `sampling` entry), if any, beside.

    The components in the base's model_index.json and its licences are copied, its card and pictures are not. The new
    index names those components that diffusers can load (`loadable_index`).

    Raises:
        UserError: a number of the denoiser is not finite.
    """
    from fewstep.common.tensors import check_finite

    saver: Any = network
    modular = base.family.modular
    index = modular_index(base, final_path(place)) if modular else loadable_index(base)
    check_finite(network.state_dict(), f"{final_path(place) / base.network} was not written")
    for name in base.components:
        if name != base.network and index.get(name, [None])[0] is not None:
            copy_component(base.path / name, place / name)
    if saver.config.get("time_cond_proj_dim") is not None:
        index |= _as_consistency(base, record, place)
    write_json(place / (MODULAR_INDEX if modular else INDEX), index)
    copy_licences(base.path, place)
    saver.save_pretrained(place / base.network, safe_serialization=True)
    if record:
        (place / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n", encoding="utf-8")


def _as_consistency(folder: PipelineFolder, record: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Return the entries of model_index.json by which stock pipelines draw an LCM student with a guidance embedding.

    diffusers' LCMScheduler is written into the folder, and Stable Diffusion becomes a LatentConsistencyModelPipeline.
    Empty for a student that is sampled otherwise than LCMScheduler does.
    """
    sampling = validate(Sampling, record.get("sampling") or {})
    plain = isinstance(sampling.grid, int) and sampling.spacing == "grid" and sampling.step_jump == "skip"
    config = folder.config("scheduler")
    if sampling.sampler != "lcm" or not plain or is_flow(config):
        return {}
    from diffusers import DDPMScheduler, LCMScheduler

    own = {key: config[key] for key in (*BETAS, "prediction_type") if key in config}
    noise = {key: value for key, value in DDPMScheduler(**own).config.items() if key in (*BETAS, "prediction_type")}
    with suppress(NotImplementedError):  # a beta schedule that LCMScheduler does not have
        made = LCMScheduler(**noise, original_inference_steps=sampling.grid)
        shutil.rmtree(place / "scheduler", ignore_errors=True)
        made.save_config(place / "scheduler")
        named = {"_class_name": CONSISTENCY} if folder.family.kind == "sd" else {}
        return {"scheduler": ["diffusers", "LCMScheduler"], **named}
    return {}


def loadable_index(folder: PipelineFolder) -> dict[str, Any]:
    """Return a folder's model_index.json without the components that diffusers cannot load from a copy.

    A component that pictures are not drawn with (a safety checker, a feature extractor, an image encoder) is left out
    if the folder lacks it, holds only pickled weights of it, or names code that no library has. A class that
    transformers has renamed gets its present name.
    """
    index = read_mapping(folder.path / INDEX)
    for name, (library, kind) in folder.components.items():
        if name in folder.family.parts:
            continue
        present, place = _present_class(library, kind), folder.path / name
        network = (place / "config.json").is_file()  # else a processor, which has JSON files alone
        if present is None or not (weight_files(place) if network else any(place.glob("*.json"))):
            index[name] = [None, None]
            if name == "safety_checker":
                index["requires_safety_checker"] = False
        else:
            index[name] = [library, present]
    return index


def _present_class(library: str, kind: str) -> str | None:
    """Return the present name of a class in model_index.json; None if no installed library has it.

    Image processors were called feature extractors before transformers 4.26, and in folders saved until then.
    """
    if library not in LIBRARIES:
        # diffusers' own short name of the module that holds a pipeline's safety checker
        return kind if importlib.util.find_spec(f"diffusers.pipelines.{library}") else None
    module = importlib.import_module(library)
    renamed = kind.replace("FeatureExtractor", "ImageProcessor")
    return next((name for name in (kind, renamed) if hasattr(module, name)), None)


def copy_licences(source: Path, target: Path) -> None:
    """Copy a pipeline folder's licences."""
    for item in [found for pattern in LICENCES for found in source.glob(pattern)]:
        (shutil.copytree if item.is_dir() else shutil.copy2)(item, target / item.name)


def copy_component(source: Path, target: Path) -> None:
    """Copy a component but for its pickles; weights of a variant (fp16) get the names that are loaded by default."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*PICKLES))
    if variant := weight_variant(source):
        for file in target.glob(f"*.{variant}.*"):
            file.replace(file.with_name(file.name.replace(f".{variant}.", ".")))


def read_record(pipeline: Path) -> dict[str, Any]:
    """Return a pipeline folder's record of its student; empty for one that has none.

    Raises:
        UserError: the record is broken.
    """
    path = pipeline / RECORD
    return read_mapping(path) if path.is_file() else {}
