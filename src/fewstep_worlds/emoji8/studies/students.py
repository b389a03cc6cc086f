"""Students of the bundled teacher: what demo and benchmark distil, under one law for every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.diffusion.config import Sampling
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import DistillConfig, resolve
from fewstep_worlds.common.location import root

WIDER_SKIP = (
    "The papers' students skip k = 20 of 1,000 training indices, 1 point of the grid of 50; these skip the k points "
    "that the settings name, LCM and TCD alike, because in runs this short that taught both more."
)
"""What a report of students under this law must say beside the papers' claims."""
METHODS = {"lcm": "LCM", "tcd": "TCD"}
"""Recipe -> name in tables."""


def law() -> Path:
    """The YAML file that is laid over every recipe on the bundled world."""
    return root() / "distill.yaml"


def student_config(recipe: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """A recipe under the bundled world's law."""
    return resolve(recipe, law(), overrides)


def students_omega() -> float:
    """The mean guidance that every student of the bundled world learns; teacher rows stand at it."""
    return student_config("tcd").method.guidance.mean_omega


def student_sampling(recipe: str, gamma: float) -> Sampling:
    """How students of a recipe are drawn with here: the recipe's own sampling at a given gamma."""
    return resolve(recipe).sampling.model_copy(update={"gamma": gamma})


def train_student(
    recipe: str, out: Path, cache: Path, *, steps: int, batch: int, lr: float, seed: int, save_every: int
) -> Path:
    """Distil one student, or return the finished one; a stopped run goes on where it was.

    What is not an argument (samples, rank, guidance, averaging) is the same for all.
    """
    changes = [
        f"loop.steps={steps}",
        f"loop.batch={batch}",
        f"loop.seed={seed}",
        f"loop.save_every={save_every}",
        "loop.validate_every=null",  # they are measured when they are done
        f"optim.lr={lr}",
    ]
    shared = distillation.shared_cache(cache.parent)
    return distillation.distill(student_config(recipe, changes), out, cache=cache, shared=shared)
