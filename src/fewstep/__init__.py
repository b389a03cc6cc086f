"""fewstep: distil a text-to-image diffusion model into one that needs 2 to 8 network calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors see the verbs; `import fewstep` stays light
    from fewstep.api import (
        distill,
        estimate,
        evaluate,
        playground,
        read_synthesis,
        sample,
        synthesis_cost,
        synthesize,
    )
    from fewstep.errors import UserError
    from fewstep.told_pipeline import attach
    from fewstep.world.api import benchmark, demo, family, teacher_card, train_scorer, train_teacher

__all__ = [
    "UserError",
    "attach",
    "benchmark",
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
        from fewstep import api
        from fewstep.world import api as world

        return getattr(api, name, None) or getattr(world, name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
