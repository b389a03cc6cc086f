"""Stage lists: recipes run one after another, each from the weights of the one before. Light."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, Field, field_validator

from fewstep.common.config import Config, merge, validate
from fewstep.common.errors import UserError
from fewstep.methods.recipes import read_recipe

if TYPE_CHECKING:
    from fewstep.methods.config import ConsistencyConfig
    from fewstep.training.config import LoopConfig


class Stage(Config):
    """One stage: its share of the steps, and its changes to the recipe."""

    name: str = Field(min_length=1, description="name in logs and folders")
    recipe: str = Field(
        "", description="recipe whose method, sampling and optimiser replace the run's; empty for the run's own"
    )
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


class StagedConfig(Config):
    """A config with a list of stages."""

    if TYPE_CHECKING:  # fields of the subclasses, in their own order
        loop: LoopConfig
        method: ConsistencyConfig
        stages: tuple[Stage, ...]

    @classmethod
    def parts_of(cls, recipe: str) -> dict[str, Any]:
        """Return what a stage takes of a recipe that it names: method, sampling, and the optimiser where it has one.

        Raises:
            UserError: no such recipe, or one with stages of its own.
        """
        given = read_recipe(recipe, cls)
        if given.get("stages"):
            raise UserError(f"stages.recipe = {recipe!r} has stages of its own; name a recipe without", field="stages")
        return {key: given[key] for key in ("method", "sampling", "optim") if key in given}

    def each_stage(self) -> list[Self]:
        """Return the whole config of each stage; itself without stages.

        Raises:
            UserError: a change names no setting, or is illegal beside the others; or a stage lacks an extra input of
                the student that it starts from.
        """
        if not self.stages:
            return [self]
        result = []
        plain = BaseModel.model_dump(self)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"stages has two named {twice!r}; names must differ", field="stages")
        lengths = split_steps(self.loop.steps, [stage.share for stage in self.stages])
        for number, (stage, steps) in enumerate(zip(self.stages, lengths, strict=True)):
            changes = {
                "method": stage.method,
                "optim": stage.optim,
                "sampling": stage.sampling,
                "loop": {"seed": stage_seed(self.loop.seed, number), **stage.loop, "steps": steps},
                "stages": (),
            }
            try:
                base = {**plain, **self._replaced(plain, stage.recipe)} if stage.recipe else plain
                result.append(validate(type(self), merge(base, changes)))
            except UserError as error:
                raise UserError(f"stage {stage.name!r}: {error}", field=error.field) from error
        for before, after in pairwise(result):
            own, kept = (config.method.extra_conditioning for config in (before, after))
            if set(own) - set(kept):
                raise UserError(
                    f"stages: method.extra_conditioning = {list(kept)} follows a student with {list(own)}; use these",
                    field="stages",
                )
        return result

    def _replaced(self, plain: Mapping[str, Any], recipe: str) -> dict[str, Any]:
        """Return a recipe's parts in place of the run's; the pictures' size and the optimiser's other settings stay."""
        parts = self.parts_of(recipe)
        size = {"size": plain["sampling"]["size"]}
        return {
            **parts,
            "sampling": {**parts.get("sampling", {}), **size},
            "optim": {**plain["optim"], **parts.get("optim", {})},
        }

    def runs(self, out: Path) -> list[tuple[str, Path, Self]]:
        """Return the runs of the stages: name, folder and whole config of each; without stages one run in `out`.

        Raises:
            UserError: as `each_stage`.
        """
        if not self.stages:
            return [("", out, self)]
        places = [out / "stages" / slug(number, stage.name) for number, stage in enumerate(self.stages, 1)]
        return list(zip((stage.name for stage in self.stages), places, self.each_stage(), strict=True))


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
