"""The installed package contains the bundled world."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep_worlds.common.location import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[1]


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_built_package_finds_its_own_world(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    built, empty = tmp_path / "lib", tmp_path / "empty"
    empty.mkdir()
    steps = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=REPOSITORY, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT}
    code = "from fewstep_worlds.common.location import root; print(root())"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**environment, "PYTHONPATH": str(built)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = Path(printed.strip())
    assert found == built / "fewstep_worlds" / "bundled"
    assert files(found) == files(REPOSITORY / "world")
