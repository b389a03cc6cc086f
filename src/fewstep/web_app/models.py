"""Loaded models of the page: one drawing at a time, the newest few networks in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.teachers import read_teacher, teacher_name
from fewstep.diffusion.config import Sampling
from fewstep.inference.picture_files import picture_settings, student_name
from fewstep.inference.text_to_image import TextToImage, load
from fewstep.students.resolve import AUTO, ResolvedStudent, resolve_student
from fewstep.web_app.folders import Folders

KEPT = 3
"""Networks that stay in memory."""


@dataclass(frozen=True)
class Request:
    """What a person asks for: models by name, a prompt, and settings, None for the model's own."""

    prompt: str
    teacher: str = ""
    lora: str = AUTO
    seed: int = 0
    steps: int | None = None
    gamma: float | None = None
    omega: float | None = None
    size: tuple[int, int] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are given."""
        named = {name: getattr(self, name) for name in ("steps", "gamma", "omega", "size")}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Drawn:
    """A picture.

    Attributes:
        evaluations: of the network, a guided call counts two.
        text: entries of its PNG.
    """

    request: Request
    picture: Image.Image
    seconds: float
    evaluations: int
    sampling: Sampling
    text: dict[str, str]


class Models:
    """Teachers and students, loaded when they are first drawn with."""

    def __init__(self, folders: Folders, teacher_config: str = "", device: str = "auto", precision: str = "fp32"):
        self.folders = folders
        self.teacher_config = teacher_config
        self.options = {"device": device, "precision": precision}
        self._loaded: OrderedDict[tuple[str, str, float], TextToImage] = OrderedDict()
        # one queue for all visitors, first come, first served; and one thread, as torch keeps threads for each
        self._queue = ThreadPoolExecutor(1)

    def teacher(self, named: str) -> PipelineFolder:
        """Read a teacher's folder.

        Raises:
            UserError: outside of the folders, or no teacher.
        """
        named = self.folders.check("teacher", named)
        return read_teacher(named, self.teacher_config if Path(named).is_file() else "")

    def student(self, teacher: PipelineFolder, lora: str) -> ResolvedStudent:
        """Resolve a student with its own settings.

        Raises:
            UserError: outside of the folders, or no student of this teacher.
        """
        return resolve_student(teacher, self.folders.check("lora", lora), {})

    def preload(self, teacher: str, lora: str) -> None:
        """Load a model in the background."""
        self._queue.submit(self._model, teacher, lora)

    def draw(self, request: Request, on_call: Callable[[], object] | None = None) -> Drawn:
        """Draw a picture, after those that were asked for before.

        Args:
            on_call: called after each network call; an exception in it ends the drawing.

        Raises:
            UserError: as `TextToImage.draw`; models outside of the folders.
        """
        return self._queue.submit(self._draw, request, on_call).result()

    def _draw(self, request: Request, on_call: Callable[[], object] | None) -> Drawn:
        calls = 0

        def count(done: int, _: int) -> None:
            nonlocal calls
            calls = done
            if on_call is not None:
                on_call()

        model = self._model(request.teacher, request.lora)
        begun = time.perf_counter()
        (picture,) = model.draw(request.prompt, request.seed, **request.settings, on_call=count)
        seconds = time.perf_counter() - begun
        sampling, backbone = model.sampling_with(**request.settings), model.generator.backbone
        guided = sampling.omega > 0 and not backbone.embedded_guidance
        file = model.generator.lora
        names = {"teacher": teacher_name(backbone.folder.path), "student": student_name(file) if file else ""}
        text = picture_settings(request.prompt, request.seed, sampling, picture.size, **names)
        return Drawn(request, picture, seconds, calls * (1 + guided), sampling, text)

    def _model(self, teacher: str, lora: str) -> TextToImage:
        """Return a loaded model; the network that was used the longest ago is dropped for it."""
        folder = self.teacher(teacher)
        student = self.student(folder, lora).lora
        changed = student.file.stat().st_mtime if student else 0.0  # a run writes a better student to the same file
        key = (str(folder.path), str(student.file) if student else "", changed)
        if key not in self._loaded:
            alike = next((model for (path, _, _), model in self._loaded.items() if path == key[0]), None)
            if alike is None:
                self._loaded.clear()  # another teacher's networks
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            place = student.path if student else None
            self._loaded[key] = alike.with_lora(place) if alike else load(folder.path, place, **self.options)
        self._loaded.move_to_end(key)
        return self._loaded[key]
