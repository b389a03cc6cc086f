"""Ctrl-C and SIGTERM: what is kept, what is printed, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.common.files import read_json
from fewstep.common.rng import KeyedRng
from fewstep.training.loss import Loss
from fewstep.training.run_folder import checkpoints, last_step
from fewstep.training.stopping import StoppedError
from fewstep.training.update import Batch
from support import tiny_pipelines
from support.small_runs import lines, run, single, weights

SUPPORT = Path(__file__).resolve().parents[1] / "support"

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def signalled(
    step: int, number: int
) -> Callable[[Callable[[Batch, KeyedRng], Loss]], Callable[[Batch, KeyedRng], Loss]]:
    """A loss that sends its own process one signal in a step, counted from 0."""
    sent = []

    def wrap(loss: Callable[[Batch, KeyedRng], Loss]) -> Callable[[Batch, KeyedRng], Loss]:
        def sending(batch: Batch, rng: KeyedRng) -> Loss:
            if rng.step == step and not sent:
                sent.append(step)
                signal.raise_signal(number)
            return loss(batch, rng)

        return sending

    return wrap


def stop_in(plan: Any, step: int, number: int) -> Any:
    from dataclasses import replace

    return [replace(update, loss=signalled(step, number)(update.loss)) for update in plan]


def without_time(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines(folder)]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("accumulate", "log_every"), [(1, 3), (2, 1)])
def test_a_signal_saves_the_step_it_comes_in(number: int, accumulate: int, log_every: int, tmp_path: Path) -> None:
    """Resumed, weights, averages and log lines are those of an uninterrupted run."""
    ends = []
    for name in ("whole", "stopped"):
        loop = {"steps": 11, "batch": 8, "accumulate": accumulate, "log_every": log_every}
        w = weights()
        if name == "stopped":
            with pytest.raises(StoppedError) as error:
                run(tmp_path / name, stop_in(single(weights(), ema=0.9), 4, number), **loop)
            assert error.value.code == 128 + number
            assert last_step(tmp_path / name / "checkpoints") == 5
        done = run(tmp_path / name, single(w, ema=0.9), **loop)
        ends.append((w.detach().clone(), done.weights["w"]["w"]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("step", [6, 12])
def test_a_quality_check_is_made_once(during: bool, step: int, tmp_path: Path) -> None:
    """A signal before or in a check saves the step; the check is made when the run is resumed, on the same weights."""
    judged: dict[str, list[tuple[int, float]]] = {"whole": [], "stopped": []}
    sent = []

    def watching(name: str) -> Any:
        def evaluate_weights(now: int, weights: Any) -> dict[str, float]:
            if during and name == "stopped" and now == step and not sent:
                sent.append(now)
                signal.raise_signal(signal.SIGINT)
            judged[name].append((now, float(weights["w"]["w"].sum())))
            return {"validation/kid": float(now)}

        return evaluate_weights

    for name in ("whole", "stopped"):
        loop = {"steps": 12, "validate_every": 6, "log_every": 5}
        if name == "stopped":
            plan = single(weights()) if during else stop_in(single(weights()), step - 1, signal.SIGTERM)
            with pytest.raises(StoppedError):
                run(tmp_path / name, plan, validate=watching(name), **loop)
            assert last_step(tmp_path / name / "checkpoints") == step
        run(tmp_path / name, single(weights()), validate=watching(name), **loop)
    assert judged["whole"] == judged["stopped"]
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "stopped")


def test_a_second_signal_goes_to_who_handled_it_before(tmp_path: Path) -> None:
    plan = single(weights())
    for _ in range(2):
        plan = stop_in(plan, 4, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as error:
        run(tmp_path, plan, steps=11)
    assert not isinstance(error.value, StoppedError)
    assert not checkpoints(tmp_path / "checkpoints")


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, tmp_path, single(weights()), steps=2).result().step == 2


def test_any_number_of_steps_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(tmp_path, stop_in(single(weights()), 2, signal.SIGINT), steps=10**15)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_a_signal_during_the_imports_is_one_line(number: int, delay: float) -> None:
    """From the command's first line on: what comes before that is the interpreter's own start."""
    script = (
        "from fewstep.training import stopping; stopping.install_handlers(stopping.end_at_once); print('.', flush=True)"
    )
    words = [sys.executable, "-c", f"{script}; from fewstep.commands import app; app.main(['sample', 'a doggy'])"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(output.strip().splitlines()) == 1
    assert "again" not in output  # nothing of it can go on


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> tuple[Path, dict[str, list[int]]]:
    """Distillations that real signals stop, and uninterrupted ones (`stop_harness.py`)."""
    folder = tmp_path_factory.mktemp("stopping")
    changes = [
        f"teacher={tiny_pipelines.sd(folder / 'sd')}", f"data.source={picture_folder}", "device=cpu",
        "student.rank=2", "student.targets=[to_q]", "loop.batch=2", "loop.steps=60", "loop.log_every=1",
        "loop.save_every=500", "loop.validate_every=null", "data.size=32",
    ]  # fmt: skip
    words = ["distill", "--recipe", "tcd", *[word for change in changes for word in ("-s", change)]]
    harness = [sys.executable, str(SUPPORT / "stop_harness.py"), str(folder), *words]
    done = subprocess.run(harness, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout)


def student(out: Path) -> bytes:
    return (out / "student" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.slow
def test_a_stopped_distillation_goes_on_bit_for_bit(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """Of two stages, stopped in each; the last line names the step that is kept, the next run the one it begins at."""
    folder, codes = launches
    assert [codes[name] for name in ("whole", "cut-1", "cut-2", "cut-3")] == [[0], [130], [143], [0]]
    output = [(folder / f"cut-{number}-0.log").read_text() for number in (1, 2, 3)]
    kept = [int(re.findall(r"checkpoint at step (\d+)", text.splitlines()[-1])[-1]) for text in output[:2]]
    assert kept[0] >= 3
    assert kept[1] >= 5
    assert f"goes on from step {kept[0]}" in output[1]
    assert f"goes on from step {kept[1]}" in output[2]
    assert not any("Traceback" in text for text in output)
    assert student(folder / "whole") == student(folder / "cut")
    for stage in ("1-one", "2-two"):
        parts = [folder / name / "stages" / stage for name in ("whole", "cut")]
        assert without_time(parts[0]) == without_time(parts[1])
        assert read_json(parts[0] / "evaluations.json") == read_json(parts[1] / "evaluations.json")


@pytest.mark.slow
def test_a_launch_is_estimated_before_it_encodes(launches: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = launches
    assert codes["announced"] == [0, 0], (folder / "announced-1.log").read_text()[-2000:]
    output = [(folder / f"announced-{rank}.log").read_text() for rank in (0, 1)]
    assert [text.count("time     ") for text in output] == [1, 0]
    assert not (folder / "announced" / "cache" / "estimate").exists()


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """The signal reaches one of two; both save one checkpoint, from which the launch goes on as in one piece."""
    folder, codes = launches
    assert codes["both"] == codes["halved-2"] == [0, 0]
    assert codes["halved-1"] == [143, 143]
    output = [(folder / f"halved-1-{rank}.log").read_text() for rank in (0, 1)]
    kept = int(re.findall(r"checkpoint at step (\d+)", output[0])[-1])
    assert 3 <= kept < 60
    assert "checkpoint at" not in output[1]
    assert f"goes on from step {kept}" in (folder / "halved-2-0.log").read_text()
    assert student(folder / "both") == student(folder / "halved")
    assert without_time(folder / "both") == without_time(folder / "halved")
