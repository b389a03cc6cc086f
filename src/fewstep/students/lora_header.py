"""What a LoRA file says of itself, read from its header alone: refusals need neither torch nor the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder, weight_files
from fewstep.backbones.scheduler_config import is_flow, other_noise, prediction_of, shift_of
from fewstep.backbones.teachers import teacher_path
from fewstep.backbones.unsafe_weights import advice, first_pickle, is_pickle
from fewstep.common.config import read_yaml, validate
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import (
    Entry,
    Shape,
    is_safetensors,
    metadata_record,
    read_numbers,
    read_safetensors_header,
)
from fewstep.diffusion.config import Sampling
from fewstep.students.lora_keys import COMPONENTS, PEFT_PREFIX, Keys, find_keys

FILE = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""
CONDITIONING = "conditioning.safetensors"
"""What a student is told by, if it is told where its jumps land (`export.conditioning`); beside its weights."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps rank, alpha and targets in a file's metadata."""
_PEFT_FILE = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA of one layer, without its weights.

    Attributes:
        keys: what the file calls A and B.
        a, b: shapes of A [r, in, ...] and B [out, r, ...].
        scale: alpha / rank (alpha / sqrt(rank) for a rank-stabilised one).
        rows: ranges of the file's B that are this layer's, in order; empty for all of them.
    """

    keys: tuple[str, str]
    a: Shape
    b: Shape
    scale: float
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA file without its weights.

    Attributes:
        file: where it lies.
        layers: module name in the base -> its LoRA.
        base: sha256 of the UNet weights it was trained on, or "" if the file does not say.
        sampling: how to sample with it; None if the file does not say.
        notes: the whole `fewstep` record.
    """

    file: Path
    layers: dict[str, LoraLayer]
    base: str
    sampling: Sampling | None
    notes: dict[str, Any]


def _adapter(file: Path, metadata: Mapping[str, str], by_peft: bool) -> dict[str, Any]:
    """What trained the LoRA says of its scales: in the metadata (diffusers) or in a file beside it (PEFT)."""
    config = file.parent / _PEFT_CONFIG
    if not by_peft or METADATA in metadata or not config.is_file():
        named = metadata_record(metadata, METADATA, file).items()
        return {key.partition(".")[2]: value for key, value in named if key.startswith(COMPONENTS)}
    return read_mapping(config)


def _scales(
    adapter: Mapping[str, Any], alphas: Mapping[str, float], ranks: Mapping[str, int], file: Path
) -> dict[str, float]:
    """Scale of each module: from its own alpha, else by PEFT's rules from the adapter's; 1 where no one says."""
    patterns: dict[str, Any] = adapter.get("alpha_pattern") or {}
    scales = {}
    try:
        for module, rank in ranks.items():
            if module in alphas:
                scales[module] = alphas[module] / rank
                continue
            named = (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
            alpha = next(named, adapter.get("lora_alpha", rank))
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise TypeError(f"alpha is {alpha!r}")
            scales[module] = alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
            if not math.isfinite(scales[module]):
                raise ValueError(f"alpha is {alpha}")
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise UserError(f"{file} has broken metadata: {error}") from error
    return scales


def _shapes(file: Path, found: Mapping[str, Keys], entries: Mapping[str, Entry]) -> dict[str, tuple[Shape, Shape]]:
    """Shapes of A and B of every layer as they lie in the file; both must be there and fit."""
    lacking = next((f", of {module} not both" for module, keys in found.items() if not (keys.A and keys.B)), "")
    if not found or lacking:
        ups, downs = sum(bool(keys.B) for keys in found.values()), sum(bool(keys.A) for keys in found.values())
        raise UserError(f"{file} is not a whole LoRA: it holds {downs} A and {ups} B matrices{lacking}")
    shapes = {module: (entries[keys.A].shape, entries[keys.B].shape) for module, keys in found.items()}
    for module, (a, b) in shapes.items():
        if min(len(a), len(b)) < 2 or 0 in a or b[1] != a[0] or math.prod(b[2:]) != 1:
            raise UserError(f"{file} is not a whole LoRA: A {a} and B {b} of {module} do not fit")
    return shapes


def _rows(module: str, keys: Keys, b: Shape, weights: Mapping[str, Shape], name: str) -> tuple[tuple[int, int], ...]:
    """The ranges of B's rows that are a layer's own; empty for all.

    Raises:
        UserError: B has not as many rows as the layers that share it.
    """
    sizes = [weights[f"{layer}.weight"][0] for layer in keys.share or (module,)]
    if keys.share and sum(sizes) != b[0]:
        shared = ", ".join(keys.share)
        raise UserError(f"lora = {name!r} is for another base: {keys.B} has {b[0]} rows, {shared} have {sum(sizes)}")
    if keys.swapped:
        return (b[0] // 2, b[0]), (0, b[0] // 2)
    if not keys.share:
        return ()
    start = sum(sizes[: keys.share.index(module)])
    return ((start, start + weights[f"{module}.weight"][0]),)


def of_run(path: Path) -> Path:
    """Return the student of a run folder that `fewstep distill` wrote; any other path as it is.

    Raises:
        UserError: a run folder without a student, which the end of a run writes.
    """
    if (path / "model_index.json").is_file() or any(path.glob("*.safetensors")) or not (path / "config.yaml").is_file():
        return path
    if not (path / "student").is_dir():
        raise UserError(f"{str(path)!r} is a run folder without a finished student; let the run finish, or give a LoRA")
    return path / "student"


def distilled_from(notes: Mapping[str, Any], file: Path) -> str:
    """Return the teacher of a student in words, from its record or its run folder; "" where neither names one."""
    named = notes.get("teacher")
    config = file.parent.parent / "config.yaml"
    if not named and file.parent.name == "student" and config.is_file():
        with suppress(UserError):
            named = read_yaml(config).get("teacher")
    if named:
        return f"; it was distilled from {named!r}"
    with suppress(UserError):
        if notes.get("base") == read_folder(teacher_path("")).fingerprint("unet"):
            return "; it was distilled from the bundled teacher: leave --teacher out"
    kind = notes.get("base_model")
    pipeline = kind.get("pipeline") if isinstance(kind, dict) else None
    return f"; it was distilled from a {pipeline}" if pipeline else ""


def _check_floating(file: Path, found: Mapping[str, Keys], entries: Mapping[str, Entry]) -> None:
    """Refuse matrices of whole numbers or truth values: the factor that scales them is not in the file."""
    for module, keys in found.items():
        for key in (keys.A, keys.B):
            if not entries[key].dtype.startswith(("F", "BF")):
                raise UserError(
                    f"{file} holds {key} of {module} in {entries[key].dtype}, which is no floating-point type; give "
                    "the LoRA as it was trained, in fp32, fp16 or bf16"
                )


def _find_file(path: Path) -> Path:
    path = of_run(path)
    if (path / "model_index.json").is_file():
        raise UserError(f"lora = {str(path)!r} is a whole pipeline; give it as the teacher, with lora = 'none'")
    file = path
    if path.is_dir():
        file = path / (_PEFT_FILE if (path / _PEFT_FILE).is_file() and not (path / FILE).is_file() else FILE)
    if not file.is_file():
        pickled = first_pickle(path.iterdir()) if path.is_dir() else None
        more = f"; it holds {pickled.name}, a pickle, which is never read: {advice(pickled)}" if pickled else ""
        others = [] if more else sorted(str(other) for other in path.glob("*.safetensors"))
        more += f"; give the file itself, such as {others[0]!r}" if others else ""
        reason = f"holds no {FILE}" if path.is_dir() else "does not exist"
        raise UserError(f"lora = {str(path)!r} {reason}{more}")
    if is_pickle(file):
        raise UserError(f"lora = {str(path)!r} is a pickle, which is never read; {advice(file)}")
    if file.suffix.lower() not in (".safetensors", ".sft") and not is_safetensors(file):
        raise UserError(f"lora = {str(path)!r} is not a .safetensors file; pickled weights are never read")
    return file


def read_header(path: Path | str, weights: Mapping[str, Shape]) -> LoraHeader:
    """Read the header of a LoRA file, or of the one in a folder, in any of the spellings of `export.spellings`.

    Args:
        path: the file or the folder.
        weights: shapes of the base's network, by parameter name: the LoRA's layers are found among them.

    Raises:
        UserError: missing, truncated, not safetensors, not a LoRA of a UNet alone, or of a UNet with other layers.
    """
    file = _find_file(Path(path))
    metadata, entries = read_safetensors_header(file)
    modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    notes = metadata_record(metadata, "fewstep", file)
    try:
        found = find_keys(entries, modules, file)
    except UserError as error:
        raise UserError(f"{error}{distilled_from(notes, file) if notes else ''}") from error
    shapes = _shapes(file, found, entries)
    _check_floating(file, found, entries)
    values = read_numbers(file, {keys.alpha: entries[keys.alpha] for keys in found.values() if keys.alpha})
    adapter = _adapter(file, metadata, any(PEFT_PREFIX in key for key in entries))
    alphas = {module: values[keys.alpha] for module, keys in found.items() if keys.alpha}
    scales = _scales(adapter, alphas, {module: a[0] for module, (a, _) in shapes.items()}, file)
    layers = {}
    for module, keys in found.items():
        a, b = shapes[module]
        rows = _rows(module, keys, b, weights, str(path))
        own = (sum(stop - start for start, stop in rows) or b[0], *b[1:])
        layers[module] = LoraLayer((keys.A, keys.B), a, own, scales[module], rows)
    sampling = validate(Sampling, notes["sampling"]) if isinstance(notes.get("sampling"), dict) else None
    return LoraHeader(file, layers, str(notes.get("base") or ""), sampling, notes)


def read_records(path: Path) -> dict[str, Any]:
    """The whole `fewstep` record of a LoRA file or a single-file checkpoint, or of the LoRA in a folder; empty for
    another tool's.

    Raises:
        UserError: no such file, or broken metadata.
    """
    file = _find_file(path)
    metadata, _ = read_safetensors_header(file)
    return metadata_record(metadata, "fewstep", file)


def _plain(shape: Shape) -> Shape:
    """A 1x1 convolution is a linear layer: trainers write either for the other."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def check_fits(header: LoraHeader, weights: Mapping[str, Shape], fingerprint: str, name: str) -> None:
    """Refuse a LoRA that was trained on another base or does not fit this one.

    Args:
        header: the LoRA.
        weights: shapes of the base's UNet, by parameter name.
        fingerprint: sha256 of the base's UNet weights.
        name: what the user called the LoRA.

    Raises:
        UserError: naming the first thing that differs.
    """
    if header.base and header.base != fingerprint:
        raise UserError(
            f"lora = {name!r} was trained on another base (sha256 {header.base[:12]}, this one {fingerprint[:12]})"
            f"{distilled_from(header.notes, header.file)}; give its own as the teacher (a diffusers pipeline takes it "
            "on any of its shape: docs/results/add-ons.md)"
        )
    for module, layer in header.layers.items():
        shape, want = weights[f"{module}.weight"], (layer.b[0], *layer.a[1:])
        if _plain(shape) != _plain(want):
            raise UserError(
                f"lora = {name!r} is for another base: {module} is {shape}, not {want}"
                f"{distilled_from(header.notes, header.file)}"
            )


def base_shapes(folder: PipelineFolder) -> dict[str, Shape]:
    """Shapes of a pipeline folder's UNet, by parameter name.

    Raises:
        UserError: broken weight files.
    """
    files = weight_files(folder.path / folder.network)
    return {name: entry.shape for file in files for name, entry in read_safetensors_header(file)[1].items()}


def check_lora(path: Path | str, folder: PipelineFolder) -> LoraHeader:
    """Read a LoRA's header and refuse it if it does not belong to the pipeline folder; takes milliseconds.

    Raises:
        UserError: as `read_header` and `check_fits`.
    """
    weights = base_shapes(folder)
    header = read_header(path, weights)
    beside = folder.extra_inputs(header.sampling.extra_conditioning) if header.sampling else ()
    if beside and not (header.file.parent / CONDITIONING).is_file():
        raise UserError(f"lora = {str(path)!r} is told {', '.join(beside)} by a {CONDITIONING} that is not beside it")
    check_fits(header, weights, folder.fingerprint(folder.network) if header.base else "", str(path))
    check_noise(header.notes, folder.noise, str(path), str(folder.path))
    return header


def check_noise(notes: Mapping[str, Any], noise: Mapping[str, Any], name: str, place: str) -> None:
    """Refuse a LoRA of another prediction, path, shift or noise levels than a scheduler's config says.

    Args:
        notes: what the LoRA says of itself.
        noise: the config; `place`: what it belongs to, for errors.
        name: what the user called the LoRA.

    Raises:
        UserError: naming the first thing that differs.
    """
    flow = is_flow(noise)
    own = {
        "prediction": prediction_of(noise, place),
        "path": "flow" if flow else "vp",
        "shift": float(shift_of(noise) or 1.0) if flow else 1.0,
    }
    for field, value in own.items():
        found = notes.get(field, value)
        close = isinstance(found, float) and isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)
        if found != value and not close:
            raise UserError(
                f"lora = {name!r} was trained at {field} = {found!r}; the scheduler of {place} says {value!r}, "
                "and the nearest is the scheduler of the LoRA's own base"
            )
    if other := other_noise(notes, noise):
        raise UserError(
            f"lora = {name!r} was trained at {other} in {place}; the nearest is the scheduler of the LoRA's own base"
        )
