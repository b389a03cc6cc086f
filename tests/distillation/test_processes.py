"""A launch of two processes does what one does, and none of them is left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).resolve().parents[1] / "support"

WORDS = [
    "student.rank=2",
    "student.targets=[to_q,conv1]",
    "optim.ema=0.8",
    "loop.log_every=3",
    "loop.validate_every=3",
    "validation.count=16",
    "validation.teacher_steps=2",
    "sampling.steps=2",
]
LAST = "step-00000006"


def figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def did(folder: Path, name: str) -> set[str]:
    path = folder / f"{name}.did"
    return set(path.read_text().split()) if path.exists() else set()


@pytest.fixture(scope="module")
def launches(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Every launch of `process_harness`: the folder, and exit codes by rank."""
    folder = tmp_path_factory.mktemp("launches")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red disc\na blue ring\n")
    done = subprocess.run(
        [
            sys.executable,
            str(SUPPORT / "process_harness.py"),
            str(folder),
            *tiny_overrides,
            *WORDS,
            f"validation.prompts={prompts}",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "random"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def printed(folder: Path, name: str) -> list[str]:
    """The lines of a rank that report an error."""
    return [line for line in (folder / f"{name}.log").read_text().splitlines() if line.startswith("fewstep:")]


ROUNDING = 1e-3
"""Relative distance that rounding alone causes; AdamW enlarges it, for it divides small gradients by their own size.

Processors differ: 1.2e-4 was met.
"""


def apart(one: Path, two: Path) -> dict[str, float]:
    """How far two adapters are from one another, relative to the first, by factor."""
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    found = {}
    for part in ("lora_A", "lora_B"):
        a, b = (torch.cat([w.flatten() for key, w in weights.items() if part in key]) for weights in (first, second))
        assert float(a.norm()) > 1e-2
        found[part] = float((a - b).norm() / a.norm())
    return found


def test_two_processes_train_what_one_does(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """The same batch, split: weights and averages to rounding, and the same figures of the whole batch."""
    folder, codes = launches
    assert codes["one"] == [0]
    assert codes["two"] == [0, 0], (folder / "two-1.log").read_text()[-2000:]
    for name in ("student", "student.ema"):
        one, two = (folder / n / "checkpoints" / LAST / f"{name}.safetensors" for n in ("one", "two"))
        for part, distance in apart(one, two).items():
            assert distance < 2e-4, (name, part)
    logs = [figures(folder / name) for name in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [3, 3, 6, 6]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()  # the bins of all four samples, not of two
        for key, value in a.items():
            loose = key.startswith("validation/")  # pictures of 8 bits
            assert b[key] == pytest.approx(value, rel=1e-2 if loose else 1e-5, abs=1e-3 if loose else 0), key
    assert sum("loss_t" in key for line in logs[0] for key in line) > 3


def test_two_processes_share_batches_of_several_shapes(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """Each batch is of one shape, also when it is split over processes; the chunks of pictures are encoded in turn.

    CTM's terms are balanced by gradients of the whole batch, and its steps are timed beforehand in both processes.
    """
    folder, codes = launches
    assert codes["wide1"] == [0], (folder / "wide1-0.log").read_text()[-2000:]
    assert codes["wide2"] == [0, 0], (folder / "wide2-1.log").read_text()[-2000:]
    parts = {
        part.relative_to(folder / "wide1"): load_file(part)["latents"]
        for part in (folder / "wide1" / "cache" / "encoded").glob("latents-*/*.safetensors")
    }
    assert len({latents.shape[2:] for latents in parts.values()}) == 3
    for name, latents in parts.items():
        assert torch.equal(load_file(folder / "wide2" / name)["latents"], latents), name
    one, two = (folder / name / "checkpoints" / LAST / "student.safetensors" for name in ("wide1", "wide2"))
    for part, distance in apart(one, two).items():
        assert distance < 2e-4, part
    encoded = [
        (folder / f"{name}.did").read_text().split().count("to_latents") for name in ("wide1-0", "wide2-0", "wide2-1")
    ]
    assert encoded == [3, 2, 1]


def test_two_processes_polish_as_one_does(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """TLCM's last stage: the student, the fake score and the critic step in their own rhythms, on split batches."""
    folder, codes = launches
    assert codes["tlcm1"] == [0], (folder / "tlcm1-0.log").read_text()[-2000:]
    assert codes["tlcm2"] == [0, 0], (folder / "tlcm2-1.log").read_text()[-2000:]
    one, two = (folder / name / "stages" / "1-polish" / "checkpoints" / LAST for name in ("tlcm1", "tlcm2"))
    for role in ("student", "fake"):
        for part, distance in apart(one / f"{role}.safetensors", two / f"{role}.safetensors").items():
            # ten network calls deep, Adam's first steps make more of rounding; a fake score that sees half the batch
            # ends > .3 away
            assert distance < 2e-3, (role, part)
    critics = [load_file(place / "critic.safetensors") for place in (one, two)]
    for name, weight in critics[0].items():
        torch.testing.assert_close(critics[1][name], weight, rtol=1e-3, atol=1e-5)


def test_the_main_process_alone_encodes_judges_and_writes(launches: tuple[Path, dict[str, list[int]]]) -> None:
    folder, _ = launches
    drawing = {"image_generator_of", "latents"}  # shared out
    assert did(folder, "two-0") == {"to_latents", "encode", "_evaluate", "export_student", "whole"} | drawing
    assert did(folder, "two-1") == {"encode", "whole"} | drawing  # the teacher's empty prompt
    assert not {"to_latents", "image_generator_of"} & did(folder, "cut-0")  # kept on disk


def test_two_processes_are_one_after_twenty_steps(launches: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = launches
    assert (codes["long1"], codes["long2"]) == ([0], [0, 0])
    one, two = (
        load_file(folder / name / "checkpoints" / "step-00000020" / "student.safetensors")
        for name in ("long1", "long2")
    )
    moved = max(float(weight.abs().max()) for key, weight in one.items() if "lora_B" in key)
    assert moved > 1e-3
    assert max(float((two[key] - weight).abs().max()) for key, weight in one.items()) < 1e-6


def test_split_weights_train_what_whole_ones_do(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """FSDP2: every weight of the network, frozen or trained, is a part of itself in each process."""
    folder, codes = launches
    assert codes["split"] == [0, 0], (folder / "split-1.log").read_text()[-2000:]
    assert "split" in did(folder, "split-0") & did(folder, "split-1")
    for name in ("student", "student.ema", "student.optimizer"):
        one, split = (folder / n / "checkpoints" / LAST / f"{name}.safetensors" for n in ("one", "split"))
        assert {k: v.shape for k, v in load_file(one).items()} == {k: v.shape for k, v in load_file(split).items()}
        if name != "student.optimizer":
            for part, distance in apart(one, split).items():
                assert distance < ROUNDING, (name, part)
    logs = [figures(folder / name) for name in ("one", "split")]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            loose = key.startswith("validation/")
            assert b[key] == pytest.approx(value, rel=1e-2 if loose else 1e-4, abs=1e-3 if loose else 0), key


def test_split_weights_polish_as_whole_ones_do(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """The fake score's gradients stay out of the student's, though both run through one split network."""
    folder, codes = launches
    assert codes["tlcm3"] == [0, 0], (folder / "tlcm3-1.log").read_text()[-2000:]
    one, split = (folder / name / "stages" / "1-polish" / "checkpoints" / LAST for name in ("tlcm1", "tlcm3"))
    for role in ("student", "fake"):
        for part, distance in apart(one / f"{role}.safetensors", split / f"{role}.safetensors").items():
            assert distance < 2e-3, (role, part)


def test_sharded_weights_roll_out_as_whole_ones_do(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """TLCM's first stage: processes with roll-outs of different lengths call the sharded network equally often."""
    folder, codes = launches
    assert codes["rollout1"] == [0], (folder / "rollout1-0.log").read_text()[-2000:]
    assert codes["rollout2"] == [0, 0], (folder / "rollout2-1.log").read_text()[-2000:]
    assert "split" in did(folder, "rollout2-0") & did(folder, "rollout2-1")
    one, two = (
        folder / name / "stages" / "1-segments" / "checkpoints" / LAST / "student.safetensors"
        for name in ("rollout1", "rollout2")
    )
    for part, distance in apart(one, two).items():
        assert distance < 2e-3, part


def test_processes_share_stored_trajectories(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """Any number of them stores the same bytes (split networks to rounding); two train what one does in two parts."""
    folder, codes = launches
    assert codes["kd1"] == [0], (folder / "kd1-0.log").read_text()[-2000:]
    files = sorted((folder / "kd1" / "cache").glob("trajectories-*"))
    assert [len(load_file(file)["points"]) for file in files] == [4, 4, 1]
    for name in ("kd2", "kd3"):
        assert codes[name] == [0, 0], (folder / f"{name}-1.log").read_text()[-2000:]
        for file in files:
            other = folder / name / "cache" / file.name
            if name == "kd2":
                assert other.read_bytes() == file.read_bytes(), file.name
            torch.testing.assert_close(load_file(other), load_file(file), rtol=2e-3, atol=2e-3)
    one, two = (folder / name / "checkpoints" / LAST / "student.safetensors" for name in ("kd1", "kd2"))
    for part, distance in apart(one, two).items():
        assert distance < 1e-6, part
    assert "split" in did(folder, "kd3-0") & did(folder, "kd3-1")


def test_sharded_weights_are_validated_in_their_gathered_dtype(
    launches: tuple[Path, dict[str, list[int]]],
) -> None:
    folder, codes = launches
    assert codes["bf16"] == [0, 0], (folder / "bf16-1.log").read_text()[-2000:]
    assert "split" in did(folder, "bf16-0") & did(folder, "bf16-1")
    assert sum("validation/kid" in line for line in figures(folder / "bf16")) == 2


def test_a_split_run_goes_on_in_one_process(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """Killed in two processes, resumed whole in one: the weights of the run that was never split."""
    folder, codes = launches
    assert codes["halved"][1] == -9
    assert codes["halved-resumed"] == [0], (folder / "halved-resumed-0.log").read_text()[-2000:]
    one, halved = (folder / name / "checkpoints" / LAST / "student.safetensors" for name in ("one", "halved"))
    for part, distance in apart(one, halved).items():
        assert distance < ROUNDING, part
    lines = [figures(folder / name)[-2] for name in ("one", "halved")]  # of steps 4 to 6: the first of them was in two
    assert lines[0].keys() == lines[1].keys()
    for key, value in lines[0].items():
        assert lines[1][key] == pytest.approx(value, rel=1e-3), key
    calls = [json.loads((folder / name / "evaluations.json").read_text()) for name in ("one", "halved")]
    assert calls[0] == calls[1]


def test_a_run_goes_on_in_split_networks(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """Killed with whole weights, resumed with split ones, in micro-batches of one."""
    folder, codes = launches
    assert codes["joined"][1] == -9
    assert codes["joined-resumed"] == [0, 0], (folder / "joined-resumed-0.log").read_text()[-2000:]
    assert "split" in did(folder, "joined-resumed-0") - did(folder, "joined-0")
    one, joined = (folder / name / "checkpoints" / LAST / "student.safetensors" for name in ("one", "joined"))
    for part, distance in apart(one, joined).items():
        assert distance < 1e-4, part


def test_full_fine_tuning_in_split_networks(launches: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = launches
    assert codes["full1"] == [0]
    assert codes["full2"] == [0, 0], (folder / "full2-1.log").read_text()[-2000:]
    assert "split" in did(folder, "full2-0") & did(folder, "full2-1")
    one, split = (load_file(folder / n / "checkpoints" / LAST / "student.safetensors") for n in ("full1", "full2"))
    start = load_file(folder / "full1" / "checkpoints" / "step-00000004" / "student.safetensors")
    moved = torch.cat([(one[key] - weight).flatten() for key, weight in start.items()]).norm()
    other = torch.cat([(split[key] - weight).flatten() for key, weight in one.items()]).norm()
    assert float(other) < 0.05 * float(moved)  # Adam's sign of gradients that are all but 0


def test_a_killed_launch_resumes_bit_for_bit(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """The second process is killed in step 5; the first ends by itself, and both go on from step 4.

    That is between two log lines, and each goes on with what it had noted itself.
    """
    folder, codes = launches
    assert codes["cut"][1] == -9
    assert codes["cut"][0] not in (0, None)
    assert codes["cut-resumed"] == [0, 0], (folder / "cut-resumed-0.log").read_text()[-2000:]
    whole, cut = (folder / name / "checkpoints" / LAST for name in ("two", "cut"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in cut.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    assert figures(folder / "two") == figures(folder / "cut")
    students = [next((folder / name / "student").glob("*.safetensors")) for name in ("two", "cut")]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_what_one_process_sees_all_refuse(launches: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = launches
    assert codes["spoilt"] == [2, 2]
    errors = [printed(folder, f"spoilt-{rank}") for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "student/extra is not finite at step 2" in errors[0][0]
    assert [path.name for path in (folder / "spoilt" / "checkpoints").iterdir()] == ["step-00000001"]


def test_when_the_main_process_fails_alone_the_others_end_too(launches: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = launches
    assert codes["failed"] == [2, 2]
    assert "the disk is full" in printed(folder, "failed-0")[0]
    assert "another process of this launch failed" in printed(folder, "failed-1")[0]


def test_two_processes_measure_what_one_does(launches: tuple[Path, dict[str, list[int]]]) -> None:
    """An odd number of prompts: a row that is drawn twice is counted once."""
    folder, codes = launches
    assert codes["judged1"] == [0], (folder / "judged1-0.log").read_text()[-2000:]
    assert codes["judged2"] == [0, 0], (folder / "judged2-1.log").read_text()[-2000:]
    one, two = (json.loads((folder / name / "figures.json").read_text()) for name in ("judged1", "judged2"))
    assert one.keys() == two.keys()
    for row, found in one.items():
        for name, figure in found.items():
            assert two[row][name]["n"] == figure["n"], name
            assert two[row][name]["value"] == pytest.approx(figure["value"], rel=1e-3, abs=1e-4), name
    assert "latents" in did(folder, "judged2-1")
    whole, halves = (
        {int(n) for n in (folder / f"{name}.read").read_text().split()} for name in ("judged1-0", "judged2-1")
    )
    assert {15, 120} <= whole
    assert {8, 60} <= halves
    assert max(halves) == 60
    assert (folder / "judged2-1.log").read_text() == ""


def test_alone_nothing_waits() -> None:
    from fewstep.common import distributed as processes

    assert (processes.world_size(), processes.is_main()) == (1, True)
    value = torch.ones(2)
    assert processes.sum_over_processes(value) is value
    assert processes.main_process_first(lambda: 3) == 3
    with pytest.raises(KeyError), processes.fail_together():
        raise KeyError


@pytest.mark.parametrize("main", [True, False])
def test_rows_come_to_the_main_process_alone_in_chunks(main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.common import distributed as processes

    rows = torch.arange(20, dtype=torch.uint8).reshape(10, 2)
    shares = [rows[:5], torch.cat([rows[5:9], rows[8:9]])]  # of 9: the last one again
    sent: list[int] = []

    def gathered(some: Tensor, received: list[Tensor] | None) -> None:
        start = sum(sent)
        sent.append(len(some))
        assert (received is not None) == main
        for share, into in zip(shares, received or (), strict=False):
            into.copy_(share[start : start + len(some)])

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "is_main", lambda: main)
    monkeypatch.setattr(processes, "MESSAGE", 8)
    monkeypatch.setattr(processes.dist, "gather", gathered)
    found = processes.gather_to_main(shares[0 if main else 1], 9)
    assert sent == [2, 2, 1]
    assert torch.equal(found, rows[:9] if main else rows[:0])


def test_gradients_are_averaged_in_messages_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their layout, and what is large where it lies: no copy of all gradients is made."""
    from fewstep.common import distributed as processes

    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (5, 2), (40, 4), (2, 3, 4, 4), (7,), (1,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1] = tensors[1].t()
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    before = [tensor.clone() for tensor in tensors]
    sent: list[Tensor] = []

    def summed_with_its_square(flat: Tensor) -> None:
        """The other process's share."""
        sent.append(flat)
        flat += flat.square()

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "MESSAGE", 64)
    monkeypatch.setattr(processes.dist, "all_reduce", summed_with_its_square)
    processes.average_over_processes(tensors)
    for tensor, was in zip(tensors, before, strict=True):
        assert torch.equal(tensor, (was + was.square()) / 2)
        assert tensor.stride() == was.stride()
    assert [flat.numel() for flat in sent] == [13, 160, 96, 8]
    assert sent[1].data_ptr() == tensors[2].data_ptr()
