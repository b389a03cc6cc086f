"""The verb `app` before anything is served."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from fewstep.commands.web_app import app
from fewstep.common.errors import UserError


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradio(name: str, *rest: Any) -> Any:
        return None if name == "gradio" else find_spec(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", without_gradio)
    with pytest.raises(UserError) as error:
        app()
    assert "[app]" in str(error.value)
