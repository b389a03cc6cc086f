"""What a synthesised set says of itself, and how its files are laid out: read and refused without torch.

A set is a folder. While it is drawn, `unfinished/` holds the plan and a note of each whole file; the manifest
`synthesis.json` is written last and takes their place. `docs/guide/synthesis.md` describes the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    """What a set is drawn from, and how: everything that decides the bytes of its files.

    Attributes:
        teacher: identity of the teacher's denoiser and scheduler; encoders: of its text encoder and tokenizer.
        lines, distinct: prompts of the file, and different ones among them.
        prompts: SHA-256 of the file's prompts, one a line, in their order.
        precision, device: what the network computes in, and on what kind of device.
        weights: what its weights are kept in; sets that do not say have them in fp32.
        prediction: what the stored predictions are (the network's own output).
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
        """Samples of the set."""
        return self.lines * self.settings.each

    @property
    def shards(self) -> int:
        """Its shards."""
        return -(-self.samples // self.settings.shard)

    def items(self, shard: int) -> range:
        """The samples of a shard."""
        size = self.settings.shard
        return range(shard * size, min((shard + 1) * size, self.samples))

    def layout(self, count: int) -> dict[str, tuple[str, Shape]]:
        """The tensors of a shard of `count` samples: safetensors' type and shape."""
        return layout(self.settings, self.shape, count)


class FileRecord(Config):
    """A whole file."""

    file: str
    bytes: int
    sha256: str


class ShardRecord(FileRecord):
    """A whole shard."""

    samples: int


class Manifest(Config):
    """A whole set."""

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
        if [(note.file, note.samples) for note in self.shards] != wanted:
            raise ValueError(f"shards are not {plan.shards} of {plan.settings.shard} samples, {plan.samples} in all")
        if (self.prompts.file, self.conditions.file) != (PROMPTS, CONDITIONS):
            raise ValueError(f"prompts and conditions are not in {PROMPTS} and {CONDITIONS}")
        return self

    @property
    def notes(self) -> tuple[FileRecord, ...]:
        """Every file of the set but the manifest itself."""
        return self.prompts, self.conditions, *self.shards


def layout(settings: DrawnSettings, shape: Shape, count: int) -> dict[str, tuple[str, Shape]]:
    """The tensors of a shard of `count` samples with latents of a shape: safetensors' type and shape of each."""
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
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


def prompts_digest(lines: Sequence[str]) -> str:
    """SHA-256 of prompts in their order."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def record_of_file(path: Path) -> dict[str, Any]:
    """What a `FileRecord` says of a file: name, size, checksum."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def is_whole(folder: Path, note: FileRecord | None) -> bool:
    """Whether a file is there with the bytes that were noted of it."""
    if note is None:
        return False
    path = folder / note.file
    return path.is_file() and path.stat().st_size == note.bytes and sha256(path) == note.sha256


def write_record(folder: Path, path: Path, **more: int) -> None:
    """Note a file that has just been written to an unfinished set."""
    write_json(folder / UNFINISHED / f"{path.name}.json", record_of_file(path) | more)


def read_records(folder: Path, plan: Plan) -> dict[str, FileRecord]:
    """What was noted of the files of a set, by name: in its manifest, or one by one while it is unfinished.

    A note that is broken is none.
    """
    if (folder / MANIFEST).is_file():
        return {note.file: note for note in read_manifest(folder).notes}
    notes = {}
    for name in (PROMPTS, CONDITIONS, *map(shard_name, range(plan.shards))):
        with suppress(UserError):
            data = read_mapping(folder / UNFINISHED / f"{name}.json")
            notes[name] = validate(ShardRecord if "samples" in data else FileRecord, data)
    return {name: note for name, note in notes.items() if note.file == name}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished set.

    Raises:
        UserError: there is none, the set is not finished, or it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / UNFINISHED / PLAN).is_file():
            raise UserError(f"{folder} is not finished: run its `fewstep synthesize` again to go on")
        raise UserError(f"{folder} is no synthesised set: it holds no {MANIFEST}; `fewstep synthesize` makes one")
    return _read(Manifest, path)


def read_plan(folder: Path) -> Plan | None:
    """The plan of the set that a folder holds, finished or not; None if it holds none.

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
    """Refuse to go on with a set of another plan; `wanted` holds the entries of the plan that are known by now.

    Raises:
        UserError: naming the first difference.
    """
    known = {key: value for key, value in held.model_dump(mode="json").items() if key in wanted}
    ordered = {key: wanted[key] for key in known}
    if known != ordered:
        before, now = ({key: _short(value) for key, value in side.items()} for side in (known, ordered))
        raise UserError(
            f"synthesis folder {folder} holds a set with another {first_difference(before, now)}; "
            "give the same to go on with it, or another --out"
        )


def _short(value: Any) -> Any:
    """A checksum by its first letters."""
    return value[:12] if isinstance(value, str) else value


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a set whose files are not what its manifest says, by their sizes and headers.

    Raises:
        UserError: naming the first file that is missing, of another size, or laid out otherwise.
    """
    for note in manifest.notes:
        path = folder / note.file
        size = path.stat().st_size if path.is_file() else None
        if size != note.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {note.bytes}"
            raise UserError(f"{path} {found}; run its `fewstep synthesize` again to mend it")
    for note in manifest.shards:
        _, entries = read_safetensors_header(folder / note.file)
        if {name: (e.dtype, e.shape) for name, e in entries.items()} != manifest.plan.layout(note.samples):
            raise UserError(f"{folder / note.file} is not laid out as {MANIFEST} says")
    _, states = read_safetensors_header(folder / CONDITIONS)
    for name, entry in states.items():
        if entry.shape[:1] != (manifest.plan.distinct + 1,):
            raise UserError(f"{folder / CONDITIONS}: {name!r} has not one row a prompt and one for none")


def is_synthesis(source: str) -> bool:
    """Whether a setting means a synthesised set and not a folder of pictures."""
    folder = Path(source)
    return (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_dir()
