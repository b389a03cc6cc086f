"""fewstep: distil a text-to-image diffusion model into one that needs 2 to 8 network calls."""

from __future__ import annotations

TYPE_CHECKING = False  # not typing's own: its import takes as long as all of the interpreter's start
if TYPE_CHECKING:  # type checkers and editors see the verbs; `import fewstep` stays light
    from typing import Any

    from fewstep.commands.distill import distill, estimate, evaluate, playground, sample
    from fewstep.commands.synthesize import export_as, read_synthesis, synthesis_cost, synthesize, train_adapter, train_perceptual
    from fewstep.common.errors import UserError
    from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler
    from fewstep.inference.pipeline import call_settings, scheduler_for
    from fewstep.inference.attach import attach
    from fewstep_worlds.emoji8.api import (
        benchmark,
        chinese,
        demo,
        family,
        teacher_card,
        tlcm,
        train_reward,
        train_scorer,
        train_teacher,
        versatility,
    )

__all__ = [
    "ConsistencyScheduler",
    "SSSScheduler",
    "UserError",
    "attach",
    "benchmark",
    "call_settings",
    "chinese",
    "demo",
    "distill",
    "estimate",
    "evaluate",
    "export_as",
    "family",
    "playground",
    "read_synthesis",
    "sample",
    "scheduler_for",
    "synthesis_cost",
    "synthesize",
    "teacher_card",
    "tlcm",
    "train_adapter",
    "train_perceptual",
    "train_reward",
    "train_scorer",
    "train_teacher",
    "versatility",
]
__version__ = "0.1.0"

_PLACES = {
    "UserError": "fewstep.common.errors",
    "attach": "fewstep.inference.attach",
    "ConsistencyScheduler": "fewstep.inference.schedulers.few_step",
    "SSSScheduler": "fewstep.inference.schedulers.few_step",
    "call_settings": "fewstep.inference.pipeline",
    "scheduler_for": "fewstep.inference.pipeline",
}
"""What is no verb, and where it is."""


def __getattr__(name: str) -> Any:
    """The verbs and what goes into pipelines, imported at first use."""
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    if name in __all__:
        from fewstep.commands import distill as api
        from fewstep.commands import synthesize as api_tools
        from fewstep_worlds.emoji8 import api as world

        return next(getattr(place, name) for place in (api, api_tools, world) if hasattr(place, name))
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
