"""The records of a synthesised set and the layout of its files. Light: no torch.

A set is a folder. While it is drawn, `unfinished/` holds the plan and a record of each whole file; the manifest
`synthesis.json` is written last and replaces them. `docs/guide/synthesis.md` describes the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fewstep.common.choices import Prediction
from fewstep.common.config import Config, ConfigT, first_difference, validate
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, sha256, write_json
from fewstep.common.safetensors_header import Shape, read_safetensors_header
from fewstep.distillation.synthesis.settings import DrawnSettings

MANIFEST = "synthesis.json"
PROMPTS = "prompts.txt"
CONDITIONS = "conditions.safetensors"
UNFINISHED = "unfinished"
PLAN = "plan.json"
DTYPES = {"fp16": "F16", "fp32": "F32"}
"""`DrawnSettings.dtype` -> safetensors' name."""


class Plan(Config):
    """The settings and fingerprints that decide the bytes of a set's files.

    Attributes:
        teacher: identity of the teacher's denoiser and scheduler; encoders: of its text encoder and tokenizer.
        lines, distinct: prompts of the file, and different ones among them.
        prompts: SHA-256 of the file's prompts, one a line, in their order.
        precision, device: of the network's computation.
        weights: type of its weights; older sets, without the entry, had fp32.
        prediction: kind of the stored outputs of the network.
        shape: of a latent, (channels, height, width).
        times: of the points, rising, [N + 1]: the end point, then the grid.
    """

    format: Literal[1] = 1
    settings: DrawnSettings
    teacher: str
    encoders: str
    lines: int = Field(ge=1)
    distinct: int = Field(ge=1)
    prompts: str
    precision: Literal["fp32", "bf16", "fp16"]
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str
    prediction: Prediction
    shape: tuple[int, int, int]
    times: tuple[float, ...]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.lines * self.settings.each

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.settings.shard)

    def items(self, shard: int) -> range:
        """Return the numbers of a shard's samples."""
        size = self.settings.shard
        return range(shard * size, min((shard + 1) * size, self.samples))

    def layout(self, count: int) -> dict[str, tuple[str, Shape]]:
        """Return the tensors of a shard of `count` samples: safetensors' type and shape of each."""
        return layout(self.settings, self.shape, count)


class FileRecord(Config):
    """A whole file: name, size in bytes, checksum."""

    file: str
    bytes: int
    sha256: str


class ShardRecord(FileRecord):
    """A whole shard and its number of samples."""

    samples: int


class Manifest(Config):
    """The record of a finished set."""

    plan: Plan
    prompts: FileRecord
    conditions: FileRecord
    shards: tuple[ShardRecord, ...]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        plan = self.plan
        if len(plan.times) != plan.settings.points + 1:
            raise ValueError(f"times has {len(plan.times)} entries for a grid of {plan.settings.points} points")
        wanted = [(shard_name(i), len(plan.items(i))) for i in range(plan.shards)]
        if [(record.file, record.samples) for record in self.shards] != wanted:
            raise ValueError(f"shards are not {plan.shards} of {plan.settings.shard} samples, {plan.samples} in all")
        if (self.prompts.file, self.conditions.file) != (PROMPTS, CONDITIONS):
            raise ValueError(f"prompts and conditions are not in {PROMPTS} and {CONDITIONS}")
        return self

    @property
    def records(self) -> tuple[FileRecord, ...]:
        """All files of the set but the manifest."""
        return self.prompts, self.conditions, *self.shards


def layout(settings: DrawnSettings, shape: Shape, count: int) -> dict[str, tuple[str, Shape]]:
    """Return the tensors of a shard of `count` samples with latents of a shape: safetensors' type and shape of each."""
    kind, n = DTYPES[settings.dtype], settings.points
    tensors: dict[str, tuple[str, Shape]] = {
        "prompt": ("I64", (count,)),
        "seed": ("I64", (count,)),
        "omega": ("F64", (count,)),
        "latents": (kind, (count, *shape)),
    }
    if settings.kind == "trajectories":
        tensors["points"] = (kind, (count, n + 1, *shape))
        tensors["with_prompt"] = tensors["without_prompt"] = (kind, (count, n, *shape))
    return tensors


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def is_whole(folder: Path, record: FileRecord | None) -> bool:
    """Return whether the recorded file exists with its recorded bytes."""
    if record is None:
        return False
    path = folder / record.file
    return path.is_file() and path.stat().st_size == record.bytes and sha256(path) == record.sha256


def write_record(folder: Path, path: Path, **more: int) -> None:
    """Record a file that was written to an unfinished set."""
    record = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), **more}
    write_json(folder / UNFINISHED / f"{path.name}.json", record)


def read_records(folder: Path, plan: Plan) -> dict[str, FileRecord]:
    """Return the records of a set's files by name: from its manifest, or one by one while it is unfinished.

    Unreadable records are skipped.
    """
    if (folder / MANIFEST).is_file():
        return {record.file: record for record in read_manifest(folder).records}
    found = {}
    for name in (PROMPTS, CONDITIONS, *map(shard_name, range(plan.shards))):
        with suppress(UserError):
            data = read_mapping(folder / UNFINISHED / f"{name}.json")
            found[name] = validate(ShardRecord if "samples" in data else FileRecord, data)
    return {name: record for name, record in found.items() if record.file == name}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished set.

    Raises:
        UserError: there is none, the set is not finished, or it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / UNFINISHED / PLAN).is_file():
            raise UserError(f"{folder} is not finished: run its `fewstep synthesize` again to resume it")
        raise UserError(f"{folder} is not a synthesised set: it holds no {MANIFEST}; `fewstep synthesize` makes one")
    return _read(Manifest, path)


def read_plan(folder: Path) -> Plan | None:
    """Read the plan of the set that a folder holds, finished or not; None if it holds none.

    Raises:
        UserError: it is broken, or of another format.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).plan
    path = folder / UNFINISHED / PLAN
    return _read(Plan, path) if path.is_file() else None


def _read(model: type[ConfigT], path: Path) -> ConfigT:
    data = read_mapping(path)
    plan = data.get("plan", data)
    if isinstance(plan, dict) and plan.get("format") != 1:
        raise UserError(f"{path} is of format {plan.get('format')!r}; this version reads format 1")
    try:
        return validate(model, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def refuse_other(folder: Path, held: Plan, wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a set of another plan; `wanted` holds those entries of the plan that are known."""
    known = {key: value for key, value in held.model_dump(mode="json").items() if key in wanted}
    ordered = {key: wanted[key] for key in known}
    if known != ordered:
        before, now = ({key: _short(value) for key, value in side.items()} for side in (known, ordered))
        raise UserError(
            f"synthesis folder {folder} holds a set with another {first_difference(before, now)}; "
            "use the same to resume it, or another --out"
        )


def _short(value: Any) -> Any:
    """Return the first digits of a checksum."""
    return value[:12] if isinstance(value, str) else value


@dataclass(frozen=True)
class SynthesizedSet:
    """A finished set, whose files were checked by their sizes and headers."""

    folder: Path
    manifest: Manifest


def open_set(folder: Path) -> SynthesizedSet:
    """Check the files of a finished set against its manifest by their sizes and headers; `is_whole` reads the bytes.

    Raises:
        UserError: there is no finished set, or a file of it is missing, of another size or of another layout.
    """
    manifest = read_manifest(folder)
    for record in manifest.records:
        path = folder / record.file
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {record.bytes}"
            raise UserError(f"{path} {found}; run its `fewstep synthesize` again to repair it")
    for record in manifest.shards:
        _, entries = read_safetensors_header(folder / record.file)
        if {name: (e.dtype, e.shape) for name, e in entries.items()} != manifest.plan.layout(record.samples):
            raise UserError(f"{folder / record.file} has other tensors than {MANIFEST} names")
    _, states = read_safetensors_header(folder / CONDITIONS)
    for name, entry in states.items():
        if entry.shape[:1] != (manifest.plan.distinct + 1,):
            raise UserError(f"{folder / CONDITIONS}: {name!r} needs one row a prompt and one for the empty prompt")
    return SynthesizedSet(folder, manifest)


def is_synthesis(folder: Path) -> bool:
    """Return whether a folder holds a synthesised set, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_dir()
