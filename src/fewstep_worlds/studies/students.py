"""Students of the bundled teacher under the settings that all methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.common.config import Config
from fewstep.common.defaults import world
from fewstep.diffusion.config import Sampling
from fewstep.distillation import distill as distillation
from fewstep.distillation.config import DistillConfig, resolve
from fewstep_worlds.common.tables import markdown

WIDER_SKIP = (
    "The papers' students skip k = 20 of 1,000 training indices, 1 point of the grid of 50; these skip the k points "
    "that the settings name, LCM and TCD alike, because both learn more from them in runs this short."
)
"""Caveat of every report of these students beside the papers' claims."""
METHODS = {"lcm": "LCM", "tcd": "TCD"}
"""Recipe -> name in tables."""
PARAMETERISATIONS = {"tcd-2": "TCF(2)", "tcd-s": "TCF(S+)"}
"""The same for the TCD paper's Table 2, beside TCF(1), which is TCD's."""


def shared_settings() -> Path:
    """Return the YAML file of the settings shared by all recipes on the bundled world."""
    return world().root() / "distill.yaml"


def student_config(recipe: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """Return a recipe's settings on the bundled world."""
    return resolve(recipe, shared_settings(), overrides)


def students_omega() -> float:
    """Return the mean guidance of every student of the bundled world; teacher rows use it."""
    return student_config("tcd").method.guidance.mean_omega


def student_sampling(recipe: str, gamma: float) -> Sampling:
    """Return a recipe's own sampling at a given gamma."""
    return resolve(recipe).sampling.model_copy(update={"gamma": gamma})


def train_student(
    recipe: str, out: Path, cache: Path, *, steps: int, batch: int, lr: float, seed: int, save_every: int
) -> Path:
    """Distil one student, or return the finished one; a stopped run is resumed.

    All other settings (samples, rank, guidance, averaging) are shared by all methods.
    """
    changes = [
        f"loop.steps={steps}",
        f"loop.batch={batch}",
        f"loop.seed={seed}",
        f"loop.save_every={save_every}",
        "loop.validate_every=null",  # finished students are measured
        f"optim.lr={lr}",
    ]
    shared = distillation.shared_cache(cache.parent)
    return distillation.distill(student_config(recipe, changes), out, cache=cache, shared=shared)


def override_words(config: Config, skip: Sequence[str] = ()) -> list[str]:
    """Return the settings of a study that are not defaults, as words of its command."""
    given, default = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    changed = {name: value for name, value in given.items() if value != default[name] and name not in skip}
    texts = {name: f"[{', '.join(map(str, v))}]" if isinstance(v, list) else v for name, v in changed.items()}
    return [word for name, text in texts.items() for word in ("-s", f"{name}={text}")]


def settings_table(settings: Mapping[str, str]) -> str:
    """Return what all rows share, as Markdown."""
    return markdown(["setting", ""], settings.items(), left=2)
