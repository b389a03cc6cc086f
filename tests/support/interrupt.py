"""Stop a run inside a given loss call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fewstep.methods import update_plan as plan


class StopError(Exception):
    """The process was killed here."""


def stopped_in_call(monkeypatch: pytest.MonkeyPatch, last: int, run: Callable[[], object]) -> None:
    """Run, and stop in the given call of the student's loss by the loop; those of an estimate do not count."""
    calls = 0
    plain = plan.consistency_loss

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += args[1].steps is not None
        if calls == last:
            raise StopError
        return plain(*args)

    with monkeypatch.context() as patched:
        patched.setattr(plan, "consistency_loss", stopping)
        with pytest.raises(StopError):
            run()
