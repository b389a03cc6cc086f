"""The quality watch: during training, the same prompts from the same noise, judged and shown.

A consistency loss does not track quality. Every so often the student draws the fixed prompts; a grid is written,
KID to real pictures and the distance to the teacher's end points are logged, and the best student is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.common.compilation import eagerly
from fewstep.common.defaults import world
from fewstep.common.distributed import any_process, fail_together, is_main, main_process_first, on_main_process
from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, write_json
from fewstep.data.latents import cached, keep, kept
from fewstep.data.prompts import is_prompt_file, read_prompts
from fewstep.diffusion.config import TEACHER_SAMPLING
from fewstep.diffusion.denoiser import Condition
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.precision import asked_outside
from fewstep.evaluation.features import Features
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.evaluation.teacher_distance import TeacherFeatures
from fewstep.inference.generator import ImageGenerator, image_generator_of
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.training.roles import copy_role

SHOWN = 10
"""Prompts in the grid."""
REAL = 1000
"""Real pictures that KID is taken from."""

Keep = Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]


def validation_prompts(config: DistillConfig, captions: Sequence[str]) -> list[str]:
    """The watch's fixed prompts: those of its list, then captions of the training pictures, then from the start again.

    With no list named, the bundled pictures come with one, and others are watched on their captions alone.
    """
    named = config.validation.prompts or ("validation" if config.data.source in ("emoji8", "captions") else "")
    listed: Sequence[str] = ()
    if named:
        own = world("validation.prompts") if not is_prompt_file(named) else None
        listed = own.read_prompts(named) if own else read_prompts(named, "validation.prompts")
    pool = [*listed, *dict.fromkeys(caption for caption in captions if caption.strip() and caption not in listed)]
    return [pool[i % len(pool)] for i in range(config.validation.count)]


class Validation:
    """KeyedRng and judges the student; called by the loop with (step, weights).

    Every process of a launch makes and calls it: they share out the drawing, and the main one judges and writes.

    Args:
        student: draws with the role `student`; the teacher's pictures are computed in its precision.
        parameters: the student's trainable weights; they are lent the weights to judge and get their own back.
        prompts: what it draws.
        real: pictures uint8 [N, H, W, 3] that KID is taken from, at least 10; None for the teacher's own from other
            noise.
        cache: folder that the teacher's pictures and their features are kept in; runs share it.
        keep: called with the weights and their figures whenever KID is the best so far.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: ImageGenerator,
        parameters: Mapping[str, Tensor],
        prompts: Sequence[str],
        real: np.ndarray | None,
        out: Path,
        cache: Path,
        keep: Keep,
    ) -> None:
        validation = config.validation
        self.student = student
        self.parameters = parameters
        self.out = out
        self.cache = cache
        self.keep = keep
        self.prompts = list(prompts)
        self.seeds = list(range(validation.seed, validation.seed + validation.count))
        self.features = Features(Lite0Features(), progress=False)
        # of pictures that every run on these data measures against, and no student's own
        self.kept_features = Features(self.features.network, cache / "features", progress=False)
        self.kid = KernelDistance(self.features)
        self.to_teacher = TeacherFeatures(self.features)
        self.condition = main_process_first(self._read_prompts)
        self.reference = self._teacher_pictures(config, self.seeds)
        other = [seed + validation.count for seed in self.seeds]
        self.real = self._teacher_pictures(config, other) if real is None else real
        self.best = self._best_so_far()
        student.backbone.release_encoders()  # what they are needed for is kept; checks load the autoencoder

    def _read_prompts(self) -> Condition:
        """What the network is told of the prompts; kept in the cache, for the other processes."""
        backbone = self.student.backbone
        known = json.dumps([backbone.folder.identity(*backbone.folder.family.readers), self.prompts])
        key = f"watched-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
        return cached(self.cache, key, lambda: dict(backbone.encode(self.prompts)))

    def _teacher_pictures(self, config: DistillConfig, seeds: Sequence[int]) -> np.ndarray:
        """The teacher's end points, uint8 [count, H, W, 3]; drawn once and kept in the cache."""
        sampling = TEACHER_SAMPLING.model_copy(
            update={"steps": config.validation.teacher_steps, "omega": config.method.guidance.mean_omega}
        )
        backbone = self.student.backbone
        _, narrow = asked_outside(config, backbone.device)
        decides = [backbone.folder.identity(), backbone.latent_shape, sampling.model_dump(), self.prompts, list(seeds)]
        known = json.dumps([*decides, *([narrow] if narrow else [])])
        key = f"watch-{hashlib.sha256(known.encode()).hexdigest()[:16]}"

        found = main_process_first(lambda: kept(self.cache, key))
        lacking = any_process(found is None)  # every process asks: they draw together, or none does
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
            raise UserError(f"{path} has kid = {best!r}, which is no number; remove the folder to judge anew")
        return float(best)

    @torch.no_grad()
    def __call__(self, step: int, weights: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, float]:
        """Judge the student with the given weights."""
        judged = weights["student"]
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        try:
            copy_role(judged, self.parameters)
            with eagerly():
                pictures = self.student.pictures(self.condition, self.seeds, self.student.sampling)
        finally:
            copy_role(own, self.parameters)
        self.student.backbone.release_encoders()
        return on_main_process(self._judge)(step, judged, pictures)

    def _judge(self, step: int, judged: Mapping[str, Tensor], pictures: np.ndarray) -> Mapping[str, float]:
        """Figures, grid and best student."""
        drawn, (real, wanted) = self.features(pictures), map(self.kept_features, (self.real, self.reference))
        figures = {
            "kid": self.kid.distance(drawn, real),
            "to_teacher": float(self.to_teacher.scores(drawn, wanted).mean()),
        }
        rows = [(f"step {step}", pictures[:SHOWN]), ("teacher", self.reference[:SHOWN])]
        save_image(labelled_grid(rows, self.prompts[:SHOWN]), self.out / "grids" / f"step-{step:08d}.webp")
        if figures["kid"] < self.best:
            self.best = figures["kid"]
            self.keep(judged, {"step": step, **figures})
            write_json(self.out / "best" / "figures.json", {"step": step, **figures})
        return {f"validation/{name}": value for name, value in figures.items()}
