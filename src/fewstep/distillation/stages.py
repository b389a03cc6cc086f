"""Stage lists: recipes run one after another, each from the weights of the one before. Light."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, Field, field_validator

from fewstep.common.config import Config, merge, validate
from fewstep.common.errors import UserError


class Stage(Config):
    """One stage: its share of the steps, and its changes to the recipe."""

    name: str = Field(min_length=1, description="name in logs and folders")
    share: float = Field(gt=0, description="share of loop.steps, relative to the other stages' shares")
    method: dict[str, Any] = Field(default_factory=dict, description="changes to the method")
    optim: dict[str, Any] = Field(default_factory=dict, description="changes to the optimiser")
    loop: dict[str, Any] = Field(default_factory=dict, description="changes to the loop, without its steps")
    sampling: dict[str, Any] = Field(default_factory=dict, description="how its student is sampled in validation")

    @field_validator("loop")
    @classmethod
    def _without_steps(cls, loop: dict[str, Any]) -> dict[str, Any]:
        for name, instead in (("steps", "a stage's share"), ("precision", "loop.precision, for all stages")):
            if name in loop:
                raise ValueError(f"{name} cannot be set for a stage; use {instead}")
        return loop


ConfigT = TypeVar("ConfigT", bound=Config)


class Part(NamedTuple, Generic[ConfigT]):
    """One run of a list of stages: its name (empty without stages), its folder, its whole config."""

    name: str
    folder: Path
    config: ConfigT


def parts_of(config: ConfigT, stages: Sequence[Stage], steps: int, out: Path) -> list[Part[ConfigT]]:
    """Return the runs of a config, each with a folder of its own; a config without stages is one run in `out`.

    Raises:
        UserError: as `stage_configs`.
    """
    if not stages:
        return [Part("", out, config)]
    places = [out / "stages" / slug(number + 1, stage.name) for number, stage in enumerate(stages)]
    configs = stage_configs(config, stages, steps)
    return [Part(stage.name, place, own) for stage, place, own in zip(stages, places, configs, strict=True)]


def slug(number: int, name: str) -> str:
    """Return the folder name of a stage: its number and its name in plain letters."""
    return f"{number}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def split_steps(steps: int, shares: Sequence[float]) -> list[int]:
    """Split steps in proportion to the shares; the parts add up to `steps`.

    Raises:
        UserError: a stage would get none.
    """
    result = _split(steps, shares)
    if min(result) < 1:
        enough = round(2 * sum(shares) / min(shares)) + 1  # the smallest stage then has two
        legal = next(count for count in range(steps + 1, enough + 1) if min(_split(count, shares)) > 0)
        raise UserError(f"loop.steps = {steps} leaves a stage without steps; must be at least {legal}")
    return result


def _split(steps: int, shares: Sequence[float]) -> list[int]:
    ends = [round(done / sum(shares) * steps) for done in accumulate(shares)]
    return [end - start for start, end in pairwise([0, *ends])]


def stage_seed(seed: int, number: int) -> int:
    """Return the seed of a stage: the run's for the first one, others for the others, which draw other noise."""
    if number == 0:
        return seed
    digest = hashlib.sha256(f"{seed} stage {number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def stage_configs(config: ConfigT, stages: Sequence[Stage], steps: int) -> list[ConfigT]:
    """Return the whole config of each stage.

    Raises:
        UserError: a change names no setting, or is illegal beside the others.
    """
    result = []
    plain = BaseModel.model_dump(config)
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"stages has two named {twice!r}; names must differ", field="stages")
    for number, (stage, own) in enumerate(zip(stages, split_steps(steps, [s.share for s in stages]), strict=True)):
        changes = {
            "method": stage.method,
            "optim": stage.optim,
            "sampling": stage.sampling,
            "loop": {"seed": stage_seed(plain["loop"]["seed"], number), **stage.loop, "steps": own},
            "stages": (),
        }
        try:
            result.append(validate(type(config), merge(plain, changes)))
        except UserError as error:
            raise UserError(f"stage {stage.name!r}: {error}", field=error.field) from error
    return result
