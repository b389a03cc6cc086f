"""fewstep: distil a text-to-image diffusion model into one that needs 2 to 8 network calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors see the verbs; `import fewstep` stays light
    from fewstep.api import distill, estimate, evaluate, playground, sample
    from fewstep.api_tools import read_synthesis, synthesis_cost, synthesize, train_adapter, train_perceptual
    from fewstep.errors import UserError
    from fewstep.told_pipeline import attach
    from fewstep.world.api import (
        benchmark,
        chinese,
        demo,
        family,
        teacher_card,
        tlcm,
        train_reward,
        train_scorer,
        train_teacher,
    )

__all__ = [
    "UserError",
    "attach",
    "benchmark",
    "chinese",
    "demo",
    "distill",
    "estimate",
    "evaluate",
    "family",
    "playground",
    "read_synthesis",
    "sample",
    "synthesis_cost",
    "synthesize",
    "teacher_card",
    "tlcm",
    "train_adapter",
    "train_perceptual",
    "train_reward",
    "train_scorer",
    "train_teacher",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The verbs, imported at first use."""
    if name == "UserError":
        from fewstep.errors import UserError

        return UserError
    if name == "attach":
        from fewstep.told_pipeline import attach

        return attach
    if name in __all__:
        from fewstep import api, api_tools
        from fewstep.world import api as world

        return next(getattr(place, name) for place in (api, api_tools, world) if hasattr(place, name))
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
