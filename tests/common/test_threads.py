"""How the command lets threads wait, and that it leaves the user's own choice alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewstep.common import threads

CHILD = """
from fewstep.common.threads import limit_spinning
limit_spinning()
import torch
torch.ones(9).sum()
print('done')
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "policy", "spins"),
    [
        ({}, "ACTIVE", "1000"),
        ({"GOMP_SPINCOUNT": "77"}, "ACTIVE", "77"),
        ({"OMP_WAIT_POLICY": "passive"}, "PASSIVE", "0"),
        ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", "30000000000"),
    ],
)
@pytest.mark.skipif(not threads.uses_gnu_openmp(), reason="GNU's OpenMP alone prints its spin count")
def test_the_runtime_follows_the_environment(settings: dict[str, str], policy: str, spins: str) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    around = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**around, **settings, "OMP_DISPLAY_ENV": "verbose"}
    found = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "done\n"
    shown = dict(
        line.strip().removeprefix("[host] ").split(" = ") for line in found.stderr.splitlines() if " = " in line
    )
    assert shown["OMP_WAIT_POLICY"].strip("'") == policy
    assert shown["GOMP_SPINCOUNT"].strip("'") == spins


def test_another_runtime_sleeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    origin = tmp_path / "torch" / "__init__.py"
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    monkeypatch.setattr(threads, "find_spec", lambda name: SimpleNamespace(origin=str(origin)))
    monkeypatch.setattr(threads.os, "environ", {})
    threads.limit_spinning()
    assert (os.environ.pop("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == ("passive", None)
    (tmp_path / "torch" / "lib" / "libgomp.so.1").touch()
    threads.limit_spinning()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("active", "1000")
