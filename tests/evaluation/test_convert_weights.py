"""The tool that converts published pickles of metrics' networks."""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.evaluation.standard.registry import find_model


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = spec_from_file_location("convert_weights", Path(__file__).parents[2] / "tools" / "convert_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["convert_weights"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pickle_is_converted_after_its_hash_was_compared(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"layers.0.weight": torch.randn(3, 2), "layers.0.bias": torch.randn(3)}
    file = tmp_path / "published.pt"
    torch.save({"state_dict": state, "optimizer": {}}, file)
    with pytest.raises(UserError, match="which is not that of aesthetic: 21dd590f3ccdc646"):
        tool.convert("aesthetic", file, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
    known = tool.Pickle("aesthetic", "here", key="state_dict")
    monkeypatch.setattr(tool, "KNOWN", {sha256(file): known})
    with pytest.raises(UserError, match="not that of ic9600"):
        tool.convert("ic9600", file, tmp_path / "weights")
    target = tool.convert("aesthetic", file, tmp_path / "weights")
    written = load_file(target)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())
    first = target.read_bytes()
    assert tool.convert("aesthetic", file, tmp_path / "weights").read_bytes() == first, "the same bytes again"
    found = find_model("aesthetic", "", tmp_path / "weights")
    assert found.files.weights == (target,)
    assert found.model == f"published.pt, sha256 {sha256(file)[:16]}"


def test_a_pickle_that_runs_code_is_not_opened(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    file = tmp_path / "published.pt"
    torch.save({"layers.0.weight": Runs()}, file)
    monkeypatch.setattr(tool, "KNOWN", {sha256(file): tool.Pickle("aesthetic", "here")})
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        tool.convert("aesthetic", file, tmp_path / "weights")
    assert not (tmp_path / "ran").exists()
