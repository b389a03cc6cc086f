"""Run folders: resolved config, versions, figures, checkpoints, pictures."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from fewstep.common import core_yaml
from fewstep.common.config import Config, first_difference, read_yaml
from fewstep.common.errors import UserError
from fewstep.common.files import hold_folder, read_json, read_mapping, sweep, write_json, write_text
from fewstep.common.messages import Bar, logger
from fewstep.common.run_inputs import Content, difference
from fewstep.training.config import learning_rate
from fewstep.training.tracker import Tracker

if TYPE_CHECKING:
    from PIL import Image

Callback = Callable[[int, Mapping[str, float]], object]
"""Function of a step and its figures."""

STEP_FOLDER = re.compile(r"step-(\d{8})")
"""Name of a checkpoint's folder."""
INPUTS = "inputs.json"
"""File of the fingerprints of a run's inputs."""
PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that affect a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def record_versions(path: Path) -> None:
    """Append this process's versions to those that a run was computed with, if they differ from the last."""
    before = read_json(path) if path.is_file() else []
    if not isinstance(before, list):
        raise UserError(f"{path} holds a {type(before).__name__}; it must hold the versions of this run, [...]")
    if not before or before[-1] != versions():
        write_json(path, [*before, versions()])


class RunLog(ExitStack):
    """Log and lock of a run folder, a context manager. Only the main process writes.

    Args:
        inputs: fingerprints of the run's inputs (base, encoders, data) by name; a resumed run must have the same.
        callback: called with the figures of each step that is logged.

    Raises:
        UserError: the folder belongs to another run (`check_same_run`) or another process, or cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        title: str,
        inputs: Mapping[str, Any] | None = None,
        main: bool = True,
        quiet: bool = False,
        callback: Callback | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.title = title
        self.main = main
        self.quiet = quiet
        self._callback = callback
        self._bar: Bar | None = None
        self._shown: dict[str, float] = {}
        settings = config.model_dump(mode="json")
        kind = (settings.get("loop") or {}).get("tracker", "tensorboard")
        self._tracker = Tracker(kind, folder, settings)
        if not main:
            return
        with ExitStack() as opening:  # releases the folder if it cannot be opened
            opening.enter_context(hold_folder(folder))
            check_same_run(folder, config, inputs, later=True)
            sweep(folder)
            write_text(folder / "config.yaml", core_yaml.dump(settings))
            record_versions(folder / "versions.json")
            if inputs is not None:
                write_json(folder / INPUTS, dict(inputs))
            self.push(opening.pop_all())

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    def truncate(self, step: int) -> None:
        """Drop the log lines after `step`, which a resumed run writes again."""
        if not self.main or not self._log.exists():
            return
        lines = []
        for line in self._log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (json.JSONDecodeError, TypeError, KeyError):  # cut off by a kill
                continue
        write_text(self._log, "".join(line + "\n" for line in lines))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Append figures to log.jsonl, pass them to tracker and callback, and show loss and quality in the bar."""
        if not self.main:
            return
        line = {"step": step, "time": round(time.time(), 1), **{k: float(f"{v:.8g}") for k, v in figures.items()}}
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._tracker.figures(step, figures)
        losses = [value for name, value in figures.items() if name.endswith("/loss")]
        if losses:
            self._shown["loss"] = losses[0]  # of the first update
        self._shown |= {k.partition("/")[2]: v for k, v in figures.items() if k.startswith("validation/")}
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{k} {v:.4g}" for k, v in self._shown.items()), refresh=False)
        if self._callback is not None:
            self._callback(step, figures)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Pass a grid of pictures to the tracker."""
        if self.main:
            self._tracker.picture(step, "validation/grid", picture)

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[Bar]:
        """Yield a progress bar over steps on stderr."""
        silent = self.quiet or not self.main
        if not silent and 0 < done < total:
            logger.info(f"{self.title} goes on from step {done}")
        try:
            with Bar(total=total, initial=done, desc=self.title, unit="step", disable=silent, mininterval=1.0) as bar:
                self._bar = bar
                yield bar
        finally:
            self._bar = None
            self._tracker.close()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name))


def last_step(folder: Path) -> int:
    """Return the step of the newest checkpoint below `folder`; 0 if there is none."""
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def check_same_run(
    folder: Path, config: Config, inputs: Mapping[str, Any] | None = None, *, whole: bool = True, later: bool = False
) -> None:
    """Refuse a run folder that holds another run.

    Files and folders are compared by the fingerprints of their content among the inputs, not by their paths.

    Some settings may differ: how often it logs, saves and validates; accumulation, processes, sharding and compilation,
    which change rounding alone; and the number of steps, if the learning rate, grid and terms of all steps so far stay
    the same. Keys that an older version lacked count as defaults.

    Args:
        inputs: fingerprints of the run's inputs by name; None while they are not computed yet.
        whole: whether these are all inputs.
        later: inputs are compared by a later call. Otherwise, without inputs, paths are compared.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    old: Any = read_yaml(path, type(config))
    with suppress(ValidationError):  # configs of another kind of run, or of another version, are compared unparsed
        known = type(config).model_validate(old)
        _check_length(folder, known, config)
        old = known.model_dump(mode="json")
    old, new = _step_settings(old), _step_settings(config.model_dump(mode="json"))
    if inputs is not None or later:
        old, new = _without_contents(old, type(config)), _without_contents(new, type(config))
    if old != new:
        raise UserError(
            f"run folder {folder} holds a run with another {first_difference(old, new)}; "
            "give the same config to resume it, or another --out",
            field="out",
        )
    if inputs is not None and (folder / INPUTS).exists():
        changed = difference(read_mapping(folder / INPUTS), inputs, whole=whole)
        if changed:
            raise UserError(f"run folder {folder} holds a run on {changed}; give another --out", field="out")


def _without_contents(config: Any, model: type[BaseModel]) -> Any:
    """Return a config without the fields that name files and folders (`Content`)."""
    if not isinstance(config, Mapping):
        return config
    kept = {}
    for name, value in config.items():
        field = model.model_fields.get(name)
        if field is not None and any(isinstance(mark, Content) for mark in field.metadata):
            continue
        nested = core_yaml.model_of(field.annotation) if field is not None else None
        kept[name] = _without_contents(value, nested) if nested else value
    return kept


def _check_length(folder: Path, old: Any, new: Any) -> None:
    """Refuse another number of steps if it would have changed the steps that are done."""
    if not hasattr(old, "loop") or not hasattr(old, "optim"):
        return
    before, after = old.loop.steps, new.loop.steps
    done = last_step(folder / "checkpoints")
    if any(learning_rate(old.optim, i, before) != learning_rate(old.optim, i, after) for i in range(done)):
        raise UserError(
            f"run folder {folder} holds {done} steps of a run with loop.steps = {before}: under optim.decay = "
            f"{old.optim.decay!r} another length ({after}) means other learning rates; give {before}, or another --out",
            field="loop.steps",
        )
    phase = getattr(getattr(old, "method", None), "phase", None)
    if phase and any(phase(i, before) != phase(i, after) for i in range(done)):
        raise UserError(
            f"run folder {folder} holds {done} steps of a run with loop.steps = {before}: another length ({after}) "
            f"moves the growth of its grid, or its critic's start, within them; give {before}, or another --out",
            field="loop.steps",
        )


SCHEDULE = ("steps", "log_every", "save_every", "keep", "validate_every", "tracker")
"""Settings of the loop that do not change a step (`steps`: see `_check_length`)."""
EXECUTION = ("accumulate", "shard", "compile")
"""Settings of the loop that change the rounding of a step alone."""


def _step_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that affect the steps."""
    free = [*SCHEDULE, *EXECUTION]
    method = config.get("method")
    if isinstance(method, Mapping) and method.get("balance") == "gradient":  # it is taken over micro-batches
        free.remove("accumulate")

    def kept(part: Any, names: Sequence[str]) -> Any:
        return {k: v for k, v in part.items() if k not in names} if isinstance(part, Mapping) else part

    stages = config.get("stages")
    result = {
        **config,
        "student": kept(config.get("student"), ["checkpointing", "offload"]),
        "validation": kept(config.get("validation"), ["alarms"]),
    }
    if stages:  # which depend on the number of steps
        free.remove("steps")
        own = [{**stage, "loop": kept(stage.get("loop"), free)} for stage in stages if isinstance(stage, Mapping)]
        result["stages"] = own
    return {**result, "loop": kept(config.get("loop"), free)}
