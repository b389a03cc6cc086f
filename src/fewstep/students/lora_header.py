"""A LoRA file without its weights, read from its header: errors need neither torch nor the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.teachers import read_teacher
from fewstep.backbones.weight_files import weight_files
from fewstep.common.config import read_yaml, validate
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.common.safetensors_header import Entry, Shape, metadata_record, read_numbers, read_safetensors_header
from fewstep.diffusion.config import Sampling
from fewstep.students.lora_file import METADATA, PEFT_CONFIG, find_lora
from fewstep.students.lora_keys import COMPONENTS, PEFT_PREFIX, Keys, find_keys


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA of one layer, without its weights.

    Attributes:
        keys: of A and B in the file.
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
    """A LoRA file without its weights; `lora_checks.check_lora` returns one that fits its base.

    Attributes:
        path: the file or folder that was named.
        file: the file.
        layers: module name in the base -> its LoRA.
        base: sha256 of the denoiser's weights it was trained on; "" if not recorded.
        sampling: inference settings; None if not recorded.
        record: the whole `fewstep` record; empty for another tool's file.
    """

    path: Path
    file: Path
    layers: dict[str, LoraLayer]
    base: str
    sampling: Sampling | None
    record: dict[str, Any]

    @property
    def origin(self) -> str:
        """The teacher it was distilled from, as text for errors; "" if unknown."""
        return distilled_from(self.record, self.file)


def base_shapes(folder: PipelineFolder) -> dict[str, Shape]:
    """Return the shapes of a pipeline folder's denoiser, by parameter name.

    Raises:
        UserError: broken weight files.
    """
    files = weight_files(folder.path / folder.network)
    return {name: entry.shape for file in files for name, entry in read_safetensors_header(file)[1].items()}


def distilled_from(record: Mapping[str, Any], file: Path) -> str:
    """Return the teacher of a student as text for errors, from its record or its run folder; "" if unknown."""
    named = record.get("teacher")
    config = file.parent.parent / "config.yaml"
    if not named and file.parent.name == "student" and config.is_file():
        with suppress(UserError):
            named = read_yaml(config).get("teacher")
    if named:
        return f"; it was distilled from {named!r}"
    with suppress(UserError):
        if record.get("base") == read_teacher().fingerprint("unet"):
            return "; it was distilled from the bundled teacher: leave --teacher out"
    kind = record.get("base_model")
    pipeline = kind.get("pipeline") if isinstance(kind, dict) else None
    return f"; it was distilled from a {pipeline}" if pipeline else ""


def read_header(path: Path | str, weights: Mapping[str, Shape]) -> LoraHeader:
    """Read the header of a LoRA file, or of the one in a folder, in any spelling of `lora_keys`.

    Args:
        path: the file or the folder.
        weights: shapes of the base's network, by parameter name: the LoRA's layers are found among them.

    Raises:
        UserError: missing, truncated, not safetensors, not a LoRA of a denoiser alone, or of one with other layers.
    """
    file = find_lora(Path(path))
    metadata, entries = read_safetensors_header(file)
    modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    record = metadata_record(metadata, "fewstep", file)
    try:
        found = find_keys(entries, modules, file)
    except UserError as error:
        origin = distilled_from(record, file) if record else ""
        raise UserError(f"{error}{origin}", field=error.field) from error
    shapes = _shapes(file, found, entries)
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
    sampling = validate(Sampling, record["sampling"]) if isinstance(record.get("sampling"), dict) else None
    return LoraHeader(Path(path), file, layers, str(record.get("base") or ""), sampling, record)


def _shapes(file: Path, found: Mapping[str, Keys], entries: Mapping[str, Entry]) -> dict[str, tuple[Shape, Shape]]:
    """Return the shapes of A and B of every layer as they are in the file.

    Raises:
        UserError: one of them is missing, they do not fit, or are not floating-point (their factor is not in the file).
    """
    lacking = next((f", of {module} not both" for module, keys in found.items() if not (keys.A and keys.B)), "")
    if not found or lacking:
        ups, downs = sum(bool(keys.B) for keys in found.values()), sum(bool(keys.A) for keys in found.values())
        raise UserError(f"{file} is an incomplete LoRA: it holds {downs} A and {ups} B matrices{lacking}")
    shapes = {module: (entries[keys.A].shape, entries[keys.B].shape) for module, keys in found.items()}
    for module, (a, b) in shapes.items():
        if min(len(a), len(b)) < 2 or 0 in a or b[1] != a[0] or math.prod(b[2:]) != 1:
            raise UserError(f"{file} is an incomplete LoRA: A {a} and B {b} of {module} do not fit")
    for module, key in ((module, key) for module, keys in found.items() for key in (keys.A, keys.B)):
        if not entries[key].dtype.startswith(("F", "BF")):
            raise UserError(
                f"{file} holds {key} of {module} in {entries[key].dtype}, which is not a floating-point type; give the "
                "LoRA as it was trained, in fp32, fp16 or bf16"
            )
    return shapes


def _adapter(file: Path, metadata: Mapping[str, str], by_peft: bool) -> dict[str, Any]:
    """Return the adapter's config: from the metadata (diffusers) or from a file beside it (PEFT)."""
    config = file.parent / PEFT_CONFIG
    if not by_peft or METADATA in metadata or not config.is_file():
        named = metadata_record(metadata, METADATA, file).items()
        return {key.partition(".")[2]: value for key, value in named if key.startswith(COMPONENTS)}
    return read_mapping(config)


def _scales(
    adapter: Mapping[str, Any], alphas: Mapping[str, float], ranks: Mapping[str, int], file: Path
) -> dict[str, float]:
    """Return the scale of each module: from its own alpha, else from the adapter's config by PEFT's rules, else 1."""
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


def _rows(module: str, keys: Keys, b: Shape, weights: Mapping[str, Shape], name: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges of B's rows that are a layer's own; empty for all.

    Raises:
        UserError: B has not as many rows as the layers that share it.
    """
    sizes = [weights[f"{layer}.weight"][0] for layer in keys.share or (module,)]
    if keys.share and sum(sizes) != b[0]:
        shared = ", ".join(keys.share)
        message = f"lora = {name!r} is for another base: {keys.B} has {b[0]} rows, {shared} have {sum(sizes)}"
        raise UserError(message)
    if keys.swapped:
        return (b[0] // 2, b[0]), (0, b[0] // 2)
    if not keys.share:
        return ()
    start = sum(sizes[: keys.share.index(module)])
    return ((start, start + weights[f"{module}.weight"][0]),)
