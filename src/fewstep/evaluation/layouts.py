"""Folders of pictures as the programs of GenEval, GenEval 2 and DPG-Bench read them. Light: no torch."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, write_json, write_text
from fewstep.common.text import lines_of, read_text
from fewstep.evaluation.metric import Pictures


@dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    Attributes:
        name: of its file or folder.
        record: what the benchmark's own file says of it.
    """

    name: str
    prompt: str
    record: dict[str, Any]


class Layout(ABC):
    """How a benchmark's prompts are stored, and how its program expects the pictures.

    Attributes:
        count: pictures of a prompt.
        prompts: what its prompts come as, for errors.
    """

    count: int
    prompts: str

    @abstractmethod
    def read(self, place: Path) -> list[Item]:
        """Read the benchmark's prompts."""

    @abstractmethod
    def files(self, folder: Path, item: Item) -> list[Path]:
        """Return the files of a prompt's pictures."""

    def write(self, folder: Path, item: Item, pictures: Pictures) -> None:
        """Write the pictures of one prompt, uint8 [count, H, W, 3]."""
        for file, picture in zip(self.files(folder, item), pictures, strict=True):
            save_png(file, picture)

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        """Write what the program needs beside the pictures."""
        return None

    def is_written(self, folder: Path, item: Item) -> bool:
        """Return whether all pictures of a prompt are there."""
        return all(file.is_file() for file in self.files(folder, item))


def save_png(file: Path, picture: Pictures) -> None:
    """Write a picture [H, W, 3] as PNG, atomically."""
    with atomic_write(file) as part:
        Image.fromarray(picture).save(part, "PNG")


def read_lines(place: Path) -> list[Item]:
    """Read a file with one JSON mapping a line, each with its prompt.

    Raises:
        UserError: missing, or a line that is none.
    """
    items = []
    try:
        lines = [line for line in lines_of(read_text(place)) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"prompts = {str(place)!r} cannot be read: {error}") from error
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            items.append(Item(f"{number:05}", str(record["prompt"]), record))
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"prompts = {str(place)!r}: line {number + 1} is no JSON mapping with a prompt") from error
    return items


class GenEval(Layout):
    """NNNNN/metadata.jsonl and NNNNN/samples/NNNNN.png (djghosh13/geneval, generation/diffusers_generate.py)."""

    count, prompts = 4, "prompts/evaluation_metadata.jsonl of its repository"

    def read(self, place: Path) -> list[Item]:
        """Read evaluation_metadata.jsonl."""
        return read_lines(place)

    def files(self, folder: Path, item: Item) -> list[Path]:
        """Return the files of four pictures."""
        return [folder / item.name / "samples" / f"{number:05}.png" for number in range(self.count)]

    def write(self, folder: Path, item: Item, pictures: Pictures) -> None:
        """Write the prompt's record, and then its pictures."""
        write_text(folder / item.name / "metadata.jsonl", json.dumps(item.record))
        super().write(folder, item, pictures)


class GenEval2(Layout):
    """One picture of a prompt, and image_paths.json from prompts to files (facebookresearch/GenEval2)."""

    count, prompts = 1, "geneval2_data.jsonl of its repository"
    paths = "image_paths.json"

    def read(self, place: Path) -> list[Item]:
        """Read geneval2_data.jsonl."""
        return read_lines(place)

    def files(self, folder: Path, item: Item) -> list[Path]:
        """Return the file of one picture."""
        return [folder / "images" / f"{item.name}.png"]

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        """Write the paths, which the program takes as --image_filepath_data."""
        paths = {item.prompt: str(self.files(folder, item)[0].resolve()) for item in items}
        write_json(folder / self.paths, paths)


class DpgBench(Layout):
    """Four pictures as a 2 x 2 grid, named as the prompt's file (TencentQQGYLab/ELLA, dpg_bench)."""

    count, prompts = 4, "the folder dpg_bench/prompts of its repository"

    def read(self, place: Path) -> list[Item]:
        """Read a folder of text files.

        Raises:
            UserError: it holds none.
        """
        files = sorted(place.glob("*.txt"))
        if not files:
            raise UserError(f"prompts = {str(place)!r} holds no .txt file; give {self.prompts}")
        return [Item(file.stem, read_text(file).strip(), {}) for file in files]

    def files(self, folder: Path, item: Item) -> list[Path]:
        """Return the file of the grid."""
        return [folder / f"{item.name}.png"]

    def write(self, folder: Path, item: Item, pictures: Pictures) -> None:
        """Write the grid, row by row."""
        rows = [np.concatenate(list(pair), axis=1) for pair in (pictures[:2], pictures[2:])]
        save_png(self.files(folder, item)[0], np.concatenate(rows, axis=0))


LAYOUTS: dict[str, Layout] = {"geneval": GenEval(), "geneval2": GenEval2(), "dpg": DpgBench()}
