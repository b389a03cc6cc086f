"""Validation during training: the same prompts from the same noise, evaluated and shown.

A consistency loss does not track quality. Every `loop.validate_every` steps the student draws the fixed prompts; a
grid is written, KID to real pictures and the distance to the teacher's end points are logged, and the best student is
kept. A student that raises an alarm (`alarms`) does not become the best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.common.compilation import eagerly
from fewstep.common.distributed import any_process, fail_together, is_main, main_process_first, on_main_process
from fewstep.common.errors import UserError
from fewstep.common.files import read_json, read_mapping, short_digest, write_json
from fewstep.common.messages import logger
from fewstep.common.run_log import ALARMS, log_lines
from fewstep.common.tensor_cache import cached, keep, kept
from fewstep.common.tensors import load_tensors
from fewstep.diffusion.config import TEACHER_SAMPLING, Sampling
from fewstep.diffusion.denoiser import Condition
from fewstep.distillation.alarms import (
    ENOUGH,
    Alarm,
    Appearance,
    Figures,
    appearance,
    log_alarms,
    moved,
    picture_alarms,
    same_prompt,
)
from fewstep.distillation.frozen_networks import load_named_scorer
from fewstep.distillation.precision import precision_outside
from fewstep.distillation.prepare import Run
from fewstep.distillation.run_data import validation_prompts
from fewstep.distillation.save_student import export_student
from fewstep.evaluation.features import Features
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.evaluation.teacher_distance import TeacherFeatures
from fewstep.inference.generator import ImageGenerator, image_generator_of
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.scorers.reward import PreferenceScorer
from fewstep.students.lora import lora_added
from fewstep.students.lora_checks import check_lora
from fewstep.training.roles import copy_role

SHOWN = 10
"""Number of prompts in the grid."""
REAL = 1000
"""Number of real pictures for KID."""
SCORED = 32
"""Pictures that the held-out scorer takes at once."""
REPEATED = 16
"""Prompts that are drawn from two noises, for the diversity; at most a quarter of the pictures."""


def with_repeats(prompts: Sequence[str]) -> list[str]:
    """Return as many prompts, of which the last ones repeat the first, unless enough repeat others already."""
    count = min(REPEATED, len(prompts) // 4)
    repeat = len(prompts) - len(set(prompts)) < count
    return [*prompts[:-count], *prompts[:count]] if repeat else list(prompts)


@torch.no_grad()
def mean_score(scorer: PreferenceScorer, pictures: np.ndarray, prompts: Sequence[str]) -> float:
    """Return a scorer's mean over pictures, uint8 [N, H, W, 3], each with its prompt."""
    found = []
    for start in range(0, len(pictures), SCORED):
        part = torch.from_numpy(pictures[start : start + SCORED]).permute(0, 3, 1, 2).float() / 127.5 - 1
        found.append(scorer.score(part, scorer.prepare(prompts[start : start + SCORED])))
    return float(torch.cat(found).mean())


class Validation:
    """Validation of a run: draws and evaluates the student; called by the loop with (step, weights).

    Every process of a launch makes and calls it: they share the drawing, and the main one evaluates and writes. The
    teacher's pictures are drawn if the cache has none yet. Real pictures are those of the data, else the teacher's own
    from other noise.

    Args:
        out: the run folder; its best/ holds the student of the lowest KID so far.
        cache: folder of the teacher's pictures and their features, which runs share.
        show: called with the step and the grid of each validation, in the main process.
    """

    def __init__(
        self, run: Run, out: Path, cache: Path, show: Callable[[int, Image.Image], object] | None = None
    ) -> None:
        self.config = run.config
        validation = run.config.validation
        # at the training size: its pictures are compared with real ones and the teacher's
        beside = run.config.validation.beside
        self.beside = check_lora(beside, run.backbone.folder) if beside else None
        own = (self.beside.sampling or Sampling()) if self.beside else run.config.sampling
        sampling = own.model_copy(update={"size": None})
        computed, self.narrow = precision_outside(run.config, run.backbone.device)
        self.student = ImageGenerator(run.backbone, run.denoiser, sampling, "student", computed)
        self.parameters = run.student.parameters("student")
        self.out = out
        self.cache = cache
        self.show = show
        data = run.validation_data(max(REAL, validation.count))
        captions = [own[0] for own in data.captions]
        self.prompts = with_repeats(validation_prompts(run.config, run.source, captions))
        real = None if data.pictures is None else data.pictures.read(range(min(REAL, len(data))))
        self.seeds = list(range(validation.seed, validation.seed + validation.count))
        self.features = Features(Lite0Features(), progress=False)
        # of the pictures that every run on these data is compared with
        self.kept_features = Features(self.features.network, cache / "features", progress=False)
        self.kid = KernelDistance(self.features)
        self.to_teacher = TeacherFeatures(self.features)
        self.held_out = load_named_scorer(validation.scorer, torch.device("cpu")) if validation.scorer else None
        self.condition = main_process_first(self._read_prompts)
        self.reference = self._teacher_pictures(self.seeds)
        other = [seed + validation.count for seed in self.seeds]
        self.real = self._teacher_pictures(other) if real is None else real
        pairs = [places[:2] for places in same_prompt(self.prompts)]
        first = {*range(SHOWN), *(place for pair in pairs if pair[0] < SHOWN for place in pair)}
        self.first = sorted(first)  # the pictures by which a student is compared with the start
        self.start: np.ndarray | None = None
        self.raised: set[str] = set()
        self.best = self._best_so_far()
        run.backbone.release_encoders()  # text states are kept; each validation loads the autoencoder

    def _read_prompts(self) -> Condition:
        """Return the prompts' text states, from the cache if it has them."""
        backbone = self.student.backbone
        narrow = [] if backbone.text_dtype == torch.float32 else [str(backbone.text_dtype)]
        known = json.dumps([backbone.folder.identity(*backbone.folder.family.readers), self.prompts, *narrow])
        return cached(self.cache, f"watched-{short_digest(known)}", lambda: dict(backbone.encode(self.prompts)))

    def _teacher_pictures(self, seeds: Sequence[int]) -> np.ndarray:
        """Return the teacher's end points, uint8 [count, H, W, 3], drawn once and kept in the cache."""
        omega = self.config.method.guidance.mean_omega or self.config.sampling.omega
        sampling = TEACHER_SAMPLING.model_copy(update={"steps": self.config.validation.teacher_steps, "omega": omega})
        backbone = self.student.backbone
        decides = [backbone.folder.identity(), backbone.latent_shape, sampling.model_dump(), self.prompts, list(seeds)]
        known = json.dumps([*decides, *([self.narrow] if self.narrow else [])])
        key = f"watch-{short_digest(known)}"

        found = main_process_first(lambda: kept(self.cache, key, load_tensors))
        lacking = any_process(found is None)  # all processes draw together, or none does
        if found is not None and not lacking:
            return found["pictures"].numpy()
        with eagerly():
            teacher = replace(image_generator_of(backbone), precision=self.student.precision)
            drawn = teacher.pictures(self.condition, seeds, sampling, title="teacher's pictures")
        with fail_together():
            if is_main():
                keep(self.cache, key, {"pictures": torch.from_numpy(drawn)})
        return drawn

    def _best_so_far(self) -> float:
        path = self.out / "best" / "figures.json"
        if not path.is_file():
            return float("inf")
        best = read_mapping(path).get("kid")
        if not isinstance(best, int | float):
            raise UserError(f"{path} has kid = {best!r}, which must be a number; remove the folder to validate again")
        return float(best)

    @torch.no_grad()
    def __call__(self, step: int, weights: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, float]:
        """Evaluate the student with the given weights and return the figures."""
        student = weights["student"]
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        try:
            copy_role(student, self.parameters)
            pictures = self._draw(range(len(self.seeds)))
        finally:
            copy_role(own, self.parameters)
        return on_main_process(self._evaluate)(step, student, pictures)

    @torch.no_grad()
    def draw_start(self, show: bool = True) -> None:
        """Draw the student before its first step, for the alarms; `show`: write its grid, without figures."""
        if not show and not self.raises:
            return
        pictures = self._draw(self.first if self.raises else range(SHOWN))
        if is_main():
            self.start = pictures
            if show:
                self._write_grid(0, pictures)

    def _draw(self, places: Sequence[int]) -> np.ndarray:
        """Draw the prompts at these places with the student's present weights."""
        condition = {name: value[list(places)] for name, value in self.condition.items()}
        seeds = [self.seeds[place] for place in places]
        with eagerly(), lora_added(self.student.backbone.network, self.beside):
            pictures = self.student.pictures(condition, seeds, self.student.sampling)
        self.student.backbone.release_encoders()
        return pictures

    @cached_property
    def raises(self) -> bool:
        """Whether alarms are raised; a style is to look unlike its teacher."""
        return self.config.validation.alarms and not self.config.method.fine_tunes

    @cached_property
    def _start_figures(self) -> dict[str, float]:
        """The start's figures over the teacher's, of the same pictures."""
        assert self.start is not None
        prompts = [self.prompts[place] for place in self.first]
        teacher = self.reference[self.first]
        own, theirs = (appearance(each, self.features(each), prompts) for each in (self.start, teacher))
        return own.over(theirs)

    @cached_property
    def _teacher_appearance(self) -> Appearance:
        return appearance(self.reference, self.kept_features(self.reference), self.prompts)

    @cached_property
    def _teacher_kid(self) -> float:
        return self.kid.distance(*map(self.kept_features, (self.reference, self.real)))

    def _alarms(self, step: int, pictures: np.ndarray, drawn: np.ndarray, kid: float) -> tuple[Figures, list[Alarm]]:
        """Return the figures of a student's pictures against the teacher's and the start's, and the alarms.

        Args:
            drawn: features of the pictures.
            kid: of the pictures, to tell whether the student is behind the teacher.
        """
        found = appearance(pictures, drawn, self.prompts).over(self._teacher_appearance)
        begun: Figures = {}
        if self.start is not None:
            begun = self._start_figures
            found["moved"] = moved(pictures[self.first], self.start, self.reference[self.first])
        figures = {f"alarms/{name}": value for name, value in found.items()}
        if step - self.config.optim.warmup < ENOUGH:
            return figures, []
        lines = [line for line in log_lines(self.out / "log.jsonl") if line["step"] <= step]
        behind = bool(self.config.method.adversarial.weight) and kid > 2 * max(self._teacher_kid, 0.0)
        of_log = log_alarms(lines, self.config.method, behind)
        return figures, [*picture_alarms(found, begun, step / self.config.loop.steps), *of_log]

    def _record(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Warn of alarms that the validation before did not raise, and write all into the run folder."""
        path = self.out / ALARMS
        before = [each for each in read_json(path) if each["step"] < step] if path.is_file() else []
        if alarms or path.is_file():  # which may hold later steps of a run that was resumed from before them
            write_json(path, [*before, *({"step": step, **alarm.record()} for alarm in alarms)])
        for alarm in alarms:
            if alarm.name not in self.raised:
                logger.warning(f"alarm at step {step}: {alarm.line()}")
        self.raised = {alarm.name for alarm in alarms}

    def _write_grid(self, step: int, pictures: np.ndarray) -> None:
        """Write the first pictures above the teacher's."""
        rows = [(f"step {step}", pictures[:SHOWN]), ("teacher", self.reference[:SHOWN])]
        grid = labelled_grid(rows, self.prompts[:SHOWN])
        save_image(grid, self.out / "grids" / f"step-{step:08d}.webp")
        if self.show:
            self.show(step, grid)

    def _evaluate(self, step: int, student: Mapping[str, Tensor], pictures: np.ndarray) -> Mapping[str, float]:
        """Compute the figures, write the grid and keep the best student."""
        drawn, (real, teacher) = self.features(pictures), map(self.kept_features, (self.real, self.reference))
        figures = {
            "kid": self.kid.distance(drawn, real),
            "to_teacher": float(self.to_teacher.scores(drawn, teacher).mean()),
        }
        if self.held_out is not None:
            figures["held_out"] = mean_score(self.held_out, pictures, self.prompts)
        self._write_grid(step, pictures)
        logged, alarms = self._alarms(step, pictures, drawn, figures["kid"]) if self.raises else ({}, [])
        self._record(step, alarms)
        if figures["kid"] < self.best and not alarms:
            self.best = figures["kid"]
            notes = {"step": step, **figures}
            export_student(self.config, self.student.backbone, student, self.out / "best", notes)
            write_json(self.out / "best" / "figures.json", notes)
        if self.raises:
            figures["alarms"] = float(len(alarms))
        return {f"validation/{name}": value for name, value in figures.items()} | dict(logged)
