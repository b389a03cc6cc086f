"""The bundled world: what is used where no teacher, data, prompts or student is named.

The library imports no world. A package registers one as an entry point, a module with the functions of `World`:

    [project.entry-points."fewstep.worlds"]
    bundled = "package.module"
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from fewstep.common.errors import UserError

GROUP = "fewstep.worlds"
"""Entry point group that a world registers in."""


class World(Protocol):
    """Interface of a world. Types of higher packages are `Any`: they are not imported here.

    Attributes:
        PICTURES: name of its pictures as `data.source`, the default one.
        CAPTIONS: name of their captions alone as `data.source`.
        SIZE: edge of its pictures, in pixels.
        STUDENTS: names of its students; the first is the default one.
    """

    PICTURES: str
    CAPTIONS: str
    SIZE: int
    STUDENTS: tuple[str, ...]

    def root(self) -> Path:
        """Return the folder that holds `teacher/` (a pipeline folder) and `students/NAME/`."""

    def captioned(self, captions: int, seed: int) -> Any:
        """Return the training pictures with `captions` captions each, a `Captioned`."""

    def captions_alone(self, captions: int, seed: int) -> Any:
        """Return the same captions without the pictures, a `Captioned`."""

    def read_prompts(self, name: str) -> tuple[str, ...]:
        """Return one of its prompt lists; `validation` is the default one of distillations on its data."""

    def suite(self, prompts: Sequence[str], seed: int, features: Any) -> Any:
        """Return the metrics of its pictures and the real pictures that answer the prompts, a `Suite`."""

    def load_scorer(self, device: Any) -> Any:
        """Return its preference scorer, a `PreferenceScorer`."""

    def text_pairs(self) -> Any:
        """Return pairs of a text in any language and the same in English, `Pairs`, for `train-adapter`."""

    def held_out_pairs(self, count: int) -> Any:
        """Return sets of such pairs by name, at most `count` each, to measure what `text_pairs` leaves out."""

    def add_commands(self, app: Any, studies: Any) -> None:
        """Add its verbs to the command and to `fewstep world`, each a `cyclopts.App`."""

    def configs(self) -> dict[str, Any]:
        """Return the settings of its verbs by verb."""


@lru_cache(maxsize=1)
def installed_world() -> World | None:
    """Return the registered world, or None if no package registers one."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return found[0].load() if found else None


def default_source() -> str:
    """Return the name of the bundled world's pictures as `data.source`, or an empty text if no world is installed."""
    found = installed_world()
    return found.PICTURES if found else ""


def world(field: str = "teacher") -> World:
    """Return the bundled world.

    Args:
        field: the setting that was left empty, for the error.

    Raises:
        UserError: no world is installed.
    """
    found = installed_world()
    if found is None:
        raise UserError(f"{field} is not given, and no bundled world is installed; name one")
    return found


def check_world_size(size: int, field: str, remedy: str = "give a folder of pictures") -> None:
    """Refuse a teacher whose pictures have another size than the bundled world's.

    Args:
        size: edge of the teacher's pictures, in pixels.
        field: the setting that names the world's pictures or prompts, for the error.
    """
    own = world(field).SIZE
    if size != own:
        raise UserError(f"{field} has pictures of {own} pixels a side, the teacher draws {size}; {remedy}")
