"""Files that the page may read: teachers, students and runs below the folders that were named at its start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fewstep.backbones.pipeline_folder import INDEX, PipelineFolder
from fewstep.backbones.teachers import ONE_FILE
from fewstep.common.defaults import installed_world
from fewstep.common.errors import UserError
from fewstep.common.safetensors_header import metadata_record, read_safetensors_header
from fewstep.students.lora_file import CONDITIONING, FILE
from fewstep.students.resolve import AUTO, NONE

DEPTH = 6
"""Levels of folders that are searched."""
SKIPPED = ("checkpoints", "tensorboard", "grids", "node_modules")
CHECKPOINT = ("model.diffusion_model.", "diffusion_model.", "input_blocks.", "joint_blocks.", "double_blocks.")
"""Beginnings of the keys of single-file checkpoints."""
Choice = tuple[str, str]
"""(label, value) of a menu's entry."""


class Folders:
    """The folders that were named at start.

    Args:
        places: the folders; anything outside of them is refused.
        named: teachers and students that were named at start, which may lie outside.

    Raises:
        UserError: a place that is no folder.
    """

    def __init__(self, places: Sequence[Path | str], named: Sequence[str] = ()) -> None:
        self.places = [Path(place).resolve() for place in places]
        for place in self.places:
            if not place.is_dir():
                raise UserError(
                    f"folders has {str(place)!r}, which is no folder; name an existing one", field="folders"
                )
        world = installed_world()
        self.bundled = world.root() / "teacher" if world else None
        self.students_of_bundled = list(world.STUDENTS) if world else []
        self.allowed = {"", AUTO, NONE, *self.students_of_bundled, *named}

    def check(self, field: str, named: str) -> str:
        """Return what a person chose or typed: a path below the folders, or a name that is allowed.

        Raises:
            UserError: a path outside of the folders, links followed, or a missing one.
        """
        if named in self.allowed:
            return named
        path = Path(named).resolve()
        if not any(path.is_relative_to(place) for place in self.places):
            known = ", ".join(map(str, self.places))
            raise UserError(f"{field} = {named!r} lies outside of {known}; name its folder when the page is started")
        if not path.exists():
            raise UserError(f"{field} = {named!r} does not exist; choose one of the menu")
        return str(path)

    def menus(self, teacher: PipelineFolder) -> tuple[list[Choice], list[Choice], list[Choice]]:
        """Return what there is to choose: teachers, students of a teacher, and runs, the newest one first."""
        found = list(self._found())
        own = self.bundled is not None and teacher.path.resolve() == self.bundled.resolve()
        base = teacher.fingerprint(teacher.network)
        teachers = [path for kind, path, _ in found if kind == "teacher"]
        students = [path for kind, path, of in found if kind == "lora" and of in ("", base)]
        runs = sorted((path for kind, path, _ in found if kind == "run"), key=_written, reverse=True)
        bundled = [(f"bundled {name}", name) for name in self.students_of_bundled if own]
        return (
            [*([("bundled teacher", "")] if self.bundled else []), *map(self._labelled, teachers)],
            [("the teacher itself", NONE), *bundled, *map(self._labelled, students)],
            [*map(self._labelled, runs)],
        )

    def _labelled(self, path: Path) -> Choice:
        """Return the entry of a path, labelled by the part below its folder."""
        inner = next((path.relative_to(place) for place in self.places if path.is_relative_to(place)), path)
        return str(inner) if inner.parts else path.name, str(path)

    def _found(self) -> Iterator[tuple[str, Path, str]]:
        """Yield (teacher, lora or run; its path; the base that a LoRA names)."""
        for place in self.places:
            for name, inner, files in os.walk(place):
                path = Path(name)
                inner[:] = sorted(each for each in inner if not each.startswith(".") and each not in SKIPPED)
                if "log.jsonl" in files and "config.yaml" in files:
                    yield "run", path, ""
                if INDEX in files:
                    yield "teacher", path, ""
                if INDEX in files or len(path.relative_to(place).parts) >= DEPTH:
                    inner.clear()
                for file in sorted(files) if INDEX not in files else ():
                    if file.endswith(ONE_FILE) and file != CONDITIONING and (kind := _kind_of(path / file)):
                        yield kind[0], path if file == FILE else path / file, kind[1]


def _kind_of(file: Path) -> tuple[str, str] | None:
    """Return (teacher or lora, base that it names) of a safetensors file; None for anything else."""
    with suppress(UserError):
        metadata, entries = read_safetensors_header(file)
        if any("lora" in key for key in entries):
            return "lora", str(metadata_record(metadata, "fewstep", file).get("base") or "")
        if any(key.startswith(CHECKPOINT) for key in entries):
            return "teacher", ""
    return None


def _written(run: Path) -> float:
    return (run / "log.jsonl").stat().st_mtime
