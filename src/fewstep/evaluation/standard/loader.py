"""Loads the networks of standard metrics, each once, and what the metrics share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from fewstep.evaluation.features import Features
from fewstep.evaluation.metric import TO_TEACHER, Metric
from fewstep.evaluation.standard.registry import Chosen, Column

T = TypeVar("T")


@dataclass
class Loader:
    """Where networks run and features are kept.

    Attributes:
        device: of the networks; they run in fp32.
        cache: folder of features; None for memory alone.
    """

    device: torch.device
    cache: Path | None = None
    _loaded: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned for this key first."""
        if key not in self._loaded:
            self._loaded[key] = make()
        return cast(T, self._loaded[key])


@dataclass(frozen=True)
class Loaded:
    """The chosen metrics, ready to measure.

    Attributes:
        metrics: of single pictures, and distances from real pictures.
        to_teacher: distances from the teacher's pictures.
        diversity: features that diversity is measured by; None where it was not chosen.
        columns: name of a figure -> its column.
    """

    metrics: list[Metric]
    to_teacher: list[Metric]
    diversity: Features | None
    columns: dict[str, Column]


DIVERSITY = "diversity-Inception"


def load_metrics(chosen: Iterable[Chosen], loader: Loader) -> Loaded:
    """Load the networks of the chosen metrics.

    Raises:
        UserError: weights that do not fit their network.
    """
    found = Loaded([], [], None, {})
    diversity: Features | None = None
    for each in chosen:
        module, _, function = each.metric.build.rpartition(".")
        built = getattr(import_module(f"fewstep.evaluation.standard.{module}"), function)(loader, each.models)
        if each.metric.of == "noises":
            diversity, name = built, DIVERSITY
        else:
            (found.to_teacher if each.to_teacher else found.metrics).append(built)
            name = built.identity.name + TO_TEACHER * each.to_teacher
        found.columns[name] = Column(each.column.heading or name, each.column.metric, each.column.factor)
    return Loaded(found.metrics, found.to_teacher, diversity, found.columns)
