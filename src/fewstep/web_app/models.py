"""What the page draws with: models below the folders that were named at start, and one queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.backbones.pipeline_folder import PipelineFolder, read_folder
from fewstep.backbones.teachers import read_teacher
from fewstep.common.defaults import installed_world
from fewstep.common.errors import UserError
from fewstep.inference.snippets import as_code, as_command
from fewstep.inference.text_to_image import LoadedModels
from fewstep.students.find import find_models
from fewstep.students.resolve import AUTO, NONE, ResolvedStudent, resolve_student

Choice = tuple[str, str]
"""(label, value) of a menu's entry."""


@dataclass(frozen=True)
class Request:
    """What a person asks for: a prompt, models by name, and settings; None for the model's own."""

    prompt: str
    teacher: str = ""
    lora: str = AUTO
    seed: int = 0
    steps: int | None = None
    gamma: float | None = None
    omega: float | None = None
    size: tuple[int, int] | None = None
    negative_prompt: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings that are given."""
        named = "steps", "gamma", "omega", "size"
        return {name: value for name in named if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Drawn:
    """A picture; `evaluations` of the network, a guided call counts two; `text` are the entries of its PNG."""

    request: Request
    picture: Image.Image
    seconds: float
    evaluations: int
    text: dict[str, str]


class Models:
    """Teachers and students, loaded when they are first drawn with.

    Args:
        places: folders; files outside of them are refused, except `named`, which were named at start.
        teacher_config: pipeline folder with the configs of single-file teachers.
        options: other arguments of `fewstep.load`.

    Attributes:
        closed: set it to end what is being drawn, as the process waits for it.

    Raises:
        UserError: a place that is no folder.
    """

    def __init__(
        self, places: Sequence[Path | str], named: Sequence[str] = (), *, teacher_config: str = "", **options: Any
    ) -> None:
        self.places = [Path(place).resolve() for place in places]
        for place in self.places:
            if not place.is_dir():
                raise UserError(f"folders has {str(place)!r}, which is no folder; name another", field="folders")
        world = installed_world()
        self.bundled = (world.root() / "teacher").resolve() if world else None
        self.bundled_students = tuple(world.STUDENTS) if world else ()
        self.allowed = {"", AUTO, NONE, *self.bundled_students, *named}
        self.teacher_config = teacher_config
        self.closed = False
        # read once: reading takes as long as a network call
        self._read_teacher = cache(lambda named: read_teacher(named, teacher_config if Path(named).is_file() else ""))
        self._read_student = cache(lambda place, named, changed: resolve_student(read_folder(place), named, {}))
        self._loaded = LoadedModels(**options)
        # one queue for all visitors, and one thread, since torch keeps further threads for each that computes
        self._queue = ThreadPoolExecutor(1)

    def check(self, field: str, named: str) -> str:
        """Return what a person chose or typed: a path below the folders, or a name that is allowed.

        Raises:
            UserError: a path outside of the folders, links followed, or a missing one.
        """
        if named in self.allowed:
            return named
        path = Path(named).resolve()
        if not any(path.is_relative_to(place) for place in self.places):
            raise UserError(f"{field} = {named!r} lies outside of the page's folders; name its folder at the start")
        if not path.exists():
            raise UserError(f"{field} = {named!r} does not exist; choose one of the menu")
        return str(path)

    def menus(self, teacher: PipelineFolder) -> tuple[list[Choice], list[Choice], list[Choice]]:
        """Return what there is to choose: teachers, students of a teacher, and runs, the newest one first."""
        base = teacher.fingerprint(teacher.network)
        found = [one for one in find_models(self.places) if one.base in ("", base)]
        own = [(f"bundled {name}", name) for name in self.bundled_students if teacher.path.resolve() == self.bundled]
        bundled = [("bundled teacher", "")] if self.bundled else []
        kinds = "teacher", "lora", "run"
        teachers, students, runs = ([self._labelled(one.path) for one in found if one.kind == kind] for kind in kinds)
        runs.sort(key=lambda run: (Path(run[1]) / "log.jsonl").stat().st_mtime, reverse=True)
        return [*bundled, *teachers], [("the teacher itself", NONE), *own, *students], runs

    def _labelled(self, path: Path) -> Choice:
        """Return the entry of a path, labelled by the part below its folder."""
        inner = next(path.relative_to(place) for place in self.places if path.is_relative_to(place))
        return str(inner) if inner.parts else path.name, str(path)

    def teacher(self, named: str) -> PipelineFolder:
        """Read a teacher's folder.

        Raises:
            UserError: outside of the folders, or no teacher.
        """
        return self._read_teacher(self.check("teacher", named))

    def student(self, teacher: PipelineFolder, lora: str) -> ResolvedStudent:
        """Resolve a student with its own settings.

        Raises:
            UserError: outside of the folders, or no student of this teacher.
        """
        named = self.check("lora", lora)
        changed = Path(named).stat().st_mtime if Path(named).exists() else 0.0
        return self._read_student(teacher.path, named, changed)

    def as_text(self, request: Request) -> tuple[str, str]:
        """Return a request as a command, and as code for diffusers."""
        folder = self.teacher(request.teacher)
        student, own, _ = self.student(folder, request.lora)
        what = request.prompt, request.seed, request.settings, request.negative_prompt
        names: dict[str, Any] = {"teacher": request.teacher, "student": student.path if student else NONE}
        names |= {"teacher_config": self.teacher_config} if Path(request.teacher).is_file() else {}
        code = as_code(*what, folder=folder, student=student, sampling=own.model_copy(update=request.settings))
        return as_command(*what, **names), code

    def preload(self, teacher: str, lora: str) -> None:
        """Load a model in the background.

        Raises:
            UserError: as `teacher` and `student`.
        """
        folder = self.teacher(teacher)
        self._queue.submit(self._loaded.get, folder, self.student(folder, lora).lora)

    def draw(self, request: Request, on_call: Callable[[], object] = lambda: None) -> Drawn:
        """Draw a picture, after those that were asked for before.

        Args:
            on_call: called after each network call; an exception in it ends the drawing.

        Raises:
            UserError: as `TextToImage.draw`; models outside of the folders.
        """
        return self._queue.submit(self._draw, request, on_call).result()

    def _draw(self, request: Request, on_call: Callable[[], object]) -> Drawn:
        def check(*_: int) -> None:
            if self.closed:
                raise InterruptedError
            on_call()

        folder = self.teacher(request.teacher)
        model = self._loaded.get(folder, self.student(folder, request.lora).lora)
        begun = time.perf_counter()
        given: dict[str, Any] = {"negative_prompt": request.negative_prompt, **request.settings}
        (picture,) = model.draw(request.prompt, request.seed, **given, on_call=check)
        seconds = time.perf_counter() - begun
        sampling = model.sampling_with(**request.settings)
        evaluations = sampling.steps * (1 + (sampling.omega > 0 and not folder.takes_guidance))
        text = model.png_text(request.prompt, request.seed, **given)
        return Drawn(request, picture, seconds, evaluations, text)
