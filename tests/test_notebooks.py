"""The notebooks run from top to bottom in an empty folder, and are stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = code_cells(path)
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "made"),
    [("quick-start", ["frogs.png", "runs/notebook/grids/step-00000020.webp"]), ("plane", ["runs/plane/figure.webp"])],
)
def test_a_notebook_runs_from_top_to_bottom(name: str, made: list[str], tmp_path: Path) -> None:
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells(REPOSITORY / "notebooks" / f"{name}.ipynb"))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / file).stat().st_size > 0 for file in made)
