"""Emoji-8, the bundled picture set: emoji concepts drawn in up to eight art styles, 64x64 on white.

Pictures are tiles of one contact sheet per style. `pictures.jsonl` lists the concept and the split of each tile,
`concepts.jsonl` the text of the concepts, `sources.json` each style's source package. `tools/build_emoji8.py` writes
them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewstep.common.errors import UserError, did_you_mean
from fewstep.common.text import lines_of, read_text
from fewstep.data.images import Captioned, HeldPictures, from_prompts
from fewstep_worlds.common import location

SIZE = 64
"""Edge of a picture and of a tile, in pixels."""
COLUMNS = 40
"""Tiles in a row of a contact sheet."""
SPLITS = ("train", "heldout-concept", "heldout-pair")
STYLE_FAMILY: Mapping[str, str] = MappingProxyType(
    {
        "noto": "noto",
        "noto-v1": "noto",
        "twemoji": "twemoji",
        "fluent-color": "fluent",
        "fluent-flat": "fluent",
        "fluent-3d": "fluent",
        "emojione": "emojione",
        "fxemoji": "fxemoji",
    }
)
"""Art style -> family. Styles of a family share geometry, so they are held out together."""


@dataclass(frozen=True)
class Record:
    """One picture: its own line, the text of its concept, the family and the source package of its style."""

    style: str
    family: str
    tile: int
    codepoint: str
    concept: str
    group: str
    name: str
    keywords: tuple[str, ...]
    name_zh: str
    keywords_zh: tuple[str, ...]
    source: str
    split: str

    @property
    def id(self) -> str:
        """Unique name of the picture."""
        return f"{self.style}/{self.concept}"


@dataclass(frozen=True)
class Emoji8:
    """Pictures, uint8 RGB [N, 64, 64, 3] on white, and their N records in the same order."""

    pictures: npt.NDArray[np.uint8]
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)


def folder() -> Path:
    """Return the Emoji-8 folder inside the bundled world.

    Raises:
        UserError: there is none.
    """
    path = location.root() / "emoji8"
    if not (path / "pictures.jsonl").is_file():
        raise UserError(f"{path} has no pictures.jsonl; point {location.ENVIRONMENT} at a complete world/ folder")
    return path


def load_records(split: str | tuple[str, ...] = "train") -> tuple[Record, ...]:
    """Read the records of one split or of several, without the pictures.

    Raises:
        UserError: a split of another name, or an index that is missing, unreadable or at odds with another.
    """
    wanted = (split,) if isinstance(split, str) else split
    for one in wanted:
        if one not in SPLITS:
            raise UserError(f"split = {one!r} is not one of {', '.join(SPLITS)}{did_you_mean(one, SPLITS)}")
    place = folder()
    with _reading(place / "sources.json") as path:
        sources: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    with _reading(place / "concepts.jsonl") as path:
        concepts = {fields["concept"]: _text(fields) for fields in _read_lines(path)}
    with _reading(place / "pictures.jsonl") as path:
        lines = (fields for sheet in _read_lines(path) for fields in _tiles(sheet) if fields["split"] in wanted)
        return tuple(_record(fields, concepts, sources) for fields in lines)


def load(split: str | tuple[str, ...] = "train") -> Emoji8:
    """Read the pictures and records of one split or of several.

    Raises:
        UserError: a split of another name, or a missing, truncated or foreign file.
    """
    records = load_records(split)
    place = folder()
    pictures = np.empty((len(records), SIZE, SIZE, 3), dtype=np.uint8)
    for style in STYLE_FAMILY:
        rows = [row for row, record in enumerate(records) if record.style == style]
        if not rows:
            continue
        tiles = read_sheet(place / f"{style}.webp")
        indices = [records[row].tile for row in rows]
        last = max(indices)
        if last >= len(tiles):
            raise UserError(f"{style}.webp has {len(tiles)} tiles but pictures.jsonl lists tile {last}")
        pictures[rows] = tiles[indices]
    pictures.flags.writeable = False
    return Emoji8(pictures, records)


def read_sheet(path: Path) -> npt.NDArray[np.uint8]:
    """Cut a contact sheet into tiles, uint8 [rows * COLUMNS, 64, 64, 3], row by row (unused ones are white).

    Raises:
        UserError: not a readable picture of whole tiles.
    """
    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the contact sheet {path}: {error}") from error
    height, width, _ = sheet.shape
    if width != COLUMNS * SIZE or height % SIZE:
        raise UserError(f"{path} is {width}x{height} pixels, not {COLUMNS} columns of {SIZE}x{SIZE} tiles")
    grid = sheet.reshape(height // SIZE, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    return grid.reshape(-1, SIZE, SIZE, 3)


def read_prompts(name: str) -> tuple[str, ...]:
    """Read one of the bundled prompt lists (`benchmark`, `validation`, `gamma`, `heldout_concepts`, ...).

    Raises:
        UserError: there is no list of that name.
    """
    place = folder() / "prompts"
    path = place / f"{name}.txt"
    if not path.is_file():
        known = sorted(file.stem for file in place.glob("*.txt"))
        raise UserError(f"prompt list {name!r} is unknown; give one of {', '.join(known)}{did_you_mean(name, known)}")
    return tuple(line for line in lines_of(read_text(path)) if line)


def style_words(style: str) -> str:
    """Return a style in words: "fluent-3d" -> "fluent 3d style"."""
    return f"{style.replace('-', ' ')} style"


def name(record: Record) -> str:
    """Return the concept's name alone: "octopus"."""
    return record.name


def name_with_style(record: Record) -> str:
    """Return name and style: "octopus, noto style"."""
    return f"{record.name}, {style_words(record.style)}"


def keywords(record: Record, generator: np.random.Generator) -> str:
    """Return 2 to 4 keywords in random order (all of them if there are fewer; the name if there are none)."""
    if not record.keywords:
        return record.name
    count = min(int(generator.integers(2, 5)), len(record.keywords))
    chosen = generator.permutation(len(record.keywords))[:count]
    return ", ".join(record.keywords[index] for index in chosen)


def keywords_with_style(record: Record, generator: np.random.Generator) -> str:
    """Return keywords and style: "sea, animal, noto style"."""
    return f"{keywords(record, generator)}, {style_words(record.style)}"


def name_with_keywords(record: Record, generator: np.random.Generator) -> str:
    """Return name and keywords: "octopus, sea, animal"."""
    words = keywords(record, generator)
    return record.name if words == record.name else f"{record.name}, {words}"


def draw_caption(record: Record, generator: np.random.Generator) -> str:
    """Draw a caption: 45 % name with style, 30 % name, 15 % keywords, 10 % keywords with style.

    Half of the keywords without style come after the name. 45 % of the captions have several right pictures.
    """
    place = generator.random()
    if place < 0.45:
        return name_with_style(record)
    if place < 0.75:
        return name(record)
    if place < 0.90:
        form: Callable[[Record, np.random.Generator], str]
        form = keywords if generator.random() < 0.5 else name_with_keywords
        return form(record, generator)
    return keywords_with_style(record, generator)


def caption_table(records: Sequence[Record], variants: int, seed: int) -> list[list[str]]:
    """Draw `variants` captions for each record, so that their embeddings can be computed once.

    A record's captions depend on (seed, record id) alone: not on the other records or their order.

    Raises:
        UserError: fewer than one variant.
    """
    if variants < 1:
        raise UserError(f"variants = {variants} must be at least 1")
    table = []
    for record in records:
        generator = _generator(seed, record.id)
        table.append([draw_caption(record, generator) for _ in range(variants)])
    return table


def captioned(captions: int, seed: int) -> Captioned:
    """Return the training split with `captions` captions a picture."""
    data = load("train")
    return Captioned(HeldPictures(data.pictures), caption_table(data.records, captions, seed))


def captions_alone(captions: int, seed: int) -> Captioned:
    """Return the same captions without opening the pictures."""
    return from_prompts([caption for row in caption_table(load_records("train"), captions, seed) for caption in row])


def _generator(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"emoji8-captions:{seed}:{key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except KeyError as error:
        raise UserError(f"cannot read {path}: {error} is missing or unknown") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def _tiles(sheet: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a mapping for each tile of a style's sheet, in order; tiles that no held-out list names are trained on."""
    split_of = {tile: split for split in SPLITS[1:] for tile in sheet[split]}
    for tile, concept in enumerate(sheet["concepts"].split()):
        yield {"style": sheet["style"], "tile": tile, "concept": concept, "split": split_of.get(tile, SPLITS[0])}


def _text(fields: Mapping[str, Any]) -> dict[str, Any]:
    lists = {key: tuple(fields[key]) for key in ("keywords", "keywords_zh")}
    return {**fields, **lists, "codepoint": fields["concept"]}


def _record(fields: Mapping[str, Any], concepts: Mapping[str, Mapping[str, Any]], sources: Mapping[str, str]) -> Record:
    style = fields["style"]
    text = concepts[fields["concept"]]
    return Record(**{**text, **fields, "family": STYLE_FAMILY[style], "source": sources[style]})
