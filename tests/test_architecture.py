"""The import contract of pyproject.toml, and the names that modules had before they moved into packages."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from fewstep.common.renamed_modules import RENAMED

ROOT = Path(__file__).resolve().parents[1]


def test_packages_import_only_packages_below_them() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_an_old_name_is_the_module(name: str) -> None:
    assert importlib.import_module(name) is importlib.import_module(RENAMED[name])


def test_the_old_command_runs() -> None:
    runs = [
        subprocess.run([sys.executable, "-m", name, "recipes"], capture_output=True, text=True, timeout=120)
        for name in ("fewstep.cli", "fewstep")
    ]
    assert [run.returncode for run in runs] == [0, 0]
    assert runs[0].stdout == runs[1].stdout
