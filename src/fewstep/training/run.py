"""One folder per run: resolved config, versions, figures, TensorBoard, checkpoints, pictures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from tqdm import tqdm

from fewstep.config import Config, read_yaml
from fewstep.errors import UserError
from fewstep.files import atomic_write, sweep, write_json

PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Bar:
    """A progress bar with rate and time left; it shows the newest loss."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def note(self, figures: Mapping[str, float]) -> None:
        """Show the loss of the first update."""
        name = next((key for key in figures if key.endswith("/loss")), None)
        if name:
            self._bar.set_postfix_str(f"loss {figures[name]:.4g}", refresh=False)

    def step(self) -> None:
        """Count one step."""
        self._bar.update()


class RunLog:
    """Writes what a run says of itself. Only the main process writes.

    Raises:
        UserError: the folder belongs to a run with another config (length and rhythm apart), or cannot be
            written to.
    """

    def __init__(self, folder: Path, config: Config, *, title: str, main: bool = True, quiet: bool = False) -> None:
        self.folder = folder
        self.title = title
        self.main = main
        self.quiet = quiet
        self._board: Any = None
        if not main:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write run folder {folder}: {error.strerror}; choose a writable one") from error
        resolved = config.model_dump(mode="json")
        check_same_run(folder, config)
        sweep(folder)
        with atomic_write(folder / "config.yaml") as part:
            part.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
        write_json(folder / "versions.json", versions())

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    def truncate(self, step: int) -> None:
        """Drop the lines after `step`: the resumed run writes them again."""
        if not self.main or not self._log.exists():
            return
        lines = []
        for line in self._log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (json.JSONDecodeError, TypeError, KeyError):  # cut off by a kill
                continue
        with atomic_write(self._log) as part:
            part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Append figures to log.jsonl and TensorBoard."""
        if not self.main:
            return
        line = {"step": step, "time": round(time.time(), 1), **{k: float(f"{v:.8g}") for k, v in figures.items()}}
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)  # type: ignore[no-untyped-call]
        for key, value in figures.items():
            self._board.add_scalar(key, value, step)

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[Bar]:
        """A bar over steps, with rate and time left, on stderr."""
        try:
            with tqdm(
                total=total,
                initial=done,
                desc=self.title,
                unit="step",
                disable=self.quiet or not self.main,
                mininterval=1.0,
                dynamic_ncols=True,
            ) as bar:
                yield Bar(bar)
        finally:
            if self._board is not None:
                self._board.close()
                self._board = None


def check_same_run(folder: Path, config: Config) -> None:
    """Refuse a run folder that holds a run with another config; how long and how often may differ.

    Keys that the older run did not know yet count as their defaults.

    Raises:
        UserError: naming the first difference.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    old: Any = read_yaml(path)
    with suppress(ValidationError):  # one of another kind of run, or of another version, is compared as it stands
        old = type(config).model_validate(old).model_dump(mode="json")
    old, new = _without_rhythm(old), _without_rhythm(config.model_dump(mode="json"))
    if old != new:
        raise UserError(
            f"run folder {folder} holds a run with another {_first_difference(old, new)}; "
            "give the same config to resume it, or another --out"
        )


RHYTHM = ("steps", "log_every", "save_every", "keep", "watch_every")
"""Settings of the loop that do not change a step."""


def _without_rhythm(config: Mapping[str, Any]) -> dict[str, Any]:
    loop = config.get("loop")
    kept = {k: v for k, v in loop.items() if k not in RHYTHM} if isinstance(loop, Mapping) else loop
    return {**config, "loop": kept}


def _first_difference(old: Any, new: Any, prefix: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    return f"{prefix} ({old!r}, now {new!r})"
