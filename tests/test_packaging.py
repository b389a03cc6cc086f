"""A wheel contains everything that its commands read, and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fewstep_worlds.common.location import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("src", "world", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of packages that holds fewstep alone, from a wheel of a copy of the sources."""
    pytest.importorskip("setuptools", minversion="77")
    place = tmp_path_factory.mktemp("wheel")
    (place / "source").mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, place / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", place, place / "source"], check=True
    )
    (wheel,) = place.glob("fewstep-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", place / "lib", wheel], check=True)
    return place / "lib"


def run(installed: Path, folder: Path, *words: str) -> str:
    """Run Python on the installed package in a folder; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT}
    environment["PYTHONPATH"] = str(installed)
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_finds_its_own_world(installed: Path, tmp_path: Path) -> None:
    found = Path(
        run(installed, tmp_path, "-c", "from fewstep_worlds.common.location import root; print(root())").strip()
    )
    assert found == installed / "fewstep_worlds" / "bundled"
    assert files(found) == files(REPOSITORY / "world")


@pytest.mark.slow
def test_an_installed_wheel_holds_the_files_of_its_packages(installed: Path) -> None:
    for package in ("fewstep", "fewstep_worlds"):
        sources = {f for f in files(REPOSITORY / "src" / package) if f.suffix not in (".pyc", ".md")}
        assert sources <= files(installed / package), sources - files(installed / package)


@pytest.mark.slow
def test_an_installed_wheel_draws_the_same_picture_as_the_checkout(installed: Path, tmp_path: Path) -> None:
    words = ["-m", "fewstep", "sample", "three frogs on yellow", "--steps", "2", "--out"]
    run(installed, tmp_path, *words, "wheel.png")
    run(REPOSITORY / "src", tmp_path, *words, "checkout.png")
    assert Image.open(tmp_path / "wheel.png").tobytes() == Image.open(tmp_path / "checkout.png").tobytes()
