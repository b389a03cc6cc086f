"""A distillation that is stopped, however, goes on as if it had not been."""

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

from fewstep.distillation.config import DistillConfig

SUPPORT = Path(__file__).resolve().parents[1] / "support"

SMALL = ["student.rank=2", "student.targets=[to_q,conv1,time_emb_proj]", "loop.steps=5", "loop.save_every=2"]


def test_versions_are_listed_in_the_order_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.common.files import read_json
    from fewstep.training import run_folder as run

    path = tmp_path / "versions.json"
    for torch_version in ("2.12", "2.12", "2.13", "2.12"):
        monkeypatch.setattr(run, "versions", lambda now=torch_version: {"torch": now})
        run.record_versions(path)
    assert [found["torch"] for found in read_json(path)] == ["2.12", "2.13", "2.12"]


def figures(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.slow
def test_how_a_step_is_computed_may_change(tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path) -> None:
    """Resumed in two micro-batches, with checkpointing: the steps of the run that was not, and not those of another."""
    from fewstep.common.errors import UserError
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve

    def go(out: str, *words: str) -> dict[str, torch.Tensor]:
        config = resolve("tcd", None, [*tiny_overrides, "student.rank=2", "loop.steps=4", *words])
        distillation.distill(config, tmp_path / out, cache=tiny_cache, quiet=True)
        return load_file(tmp_path / out / "checkpoints" / f"step-{config.loop.steps:08d}" / "student.safetensors")

    whole, before = go("whole"), go("other", "loop.steps=2")
    with pytest.raises(UserError, match=r"holds a run with another loop\.batch \(4, now 8\)"):
        go("other", "loop.batch=8", "loop.accumulate=2")
    other = go("other", "loop.accumulate=2", "student.checkpointing=true")
    assert sum(float((whole[name] - weight).abs().max()) for name, weight in before.items()) > 1e-3
    for name, weight in whole.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-6)


def test_what_may_change_in_a_run_and_its_stages(tmp_path: Path) -> None:
    import yaml

    from fewstep.common.errors import UserError
    from fewstep.distillation.config import resolve
    from fewstep.training.run_folder import check_same_run

    def check(recipe: str, before: list[str], after: list[str]) -> None:
        config = resolve(recipe, None, before)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        check_same_run(tmp_path, resolve(recipe, None, after))

    for words in (
        ["loop.accumulate=4"],
        ["loop.shard=true"],
        ["loop.compile=true"],
        ["student.checkpointing=true", "student.offload=true"],
    ):
        check("tcd", [], words)
        check("tcd", words, [])
        check("tlcm", [], words)
    check("tlcm", [], ["stages.matching.loop.accumulate=2"])
    with pytest.raises(UserError, match=r"another stages"):
        check("tlcm", [], ["stages.matching.loop.batch=8"])
    with pytest.raises(UserError, match=r"another loop\.steps"):
        check("tlcm", [], ["loop.steps=39000"])
    with pytest.raises(UserError, match=r"another loop\.accumulate \(1, now 2\)"):
        check("ctm", [], ["loop.accumulate=2"])


@pytest.mark.parametrize(
    ("recipe", "words", "before", "after", "legal"),
    [
        ("ct", ["method.grid_start=25"], 20, 24, True),  # of 50 points from step 10, and from 12: 8 steps are done
        ("ct", ["method.grid_start=25"], 20, 16, True),
        ("ct", ["method.grid_start=25"], 20, 14, False),
        ("ct", ["method.grid_start=25"], 14, 20, False),
        ("ctm", [], 20, 24, True),
        ("ctm", [], 9, 20, False),
        ("ctm", ["method.adversarial.start=0"], 14, 20, True),
        ("tcd", [], 14, 20, True),
    ],
)
def test_another_length_must_not_move_what_the_done_steps_were(
    recipe: str, words: list[str], before: int, after: int, legal: bool, tmp_path: Path
) -> None:
    """The growth of the grid and the critic's start are shares of a run."""
    import yaml

    from fewstep.common.errors import UserError
    from fewstep.distillation.config import resolve
    from fewstep.training.run_folder import check_same_run

    def of_length(steps: int) -> DistillConfig:
        return resolve(recipe, None, [*words, f"loop.steps={steps}", "optim.decay=constant"])

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(of_length(before).model_dump(mode="json")), encoding="utf-8")
    (tmp_path / "checkpoints" / "step-00000008").mkdir(parents=True)
    if legal:
        check_same_run(tmp_path, of_length(after))
    else:
        with pytest.raises(UserError, match=r"loop\.steps"):
            check_same_run(tmp_path, of_length(after))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_half_precision_learns_what_full_precision_learns(
    kind: str, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """The student is called with and without gradient in one step: autocast's kept casts must not cut it off."""
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve

    losses, moved = {}, {}
    for precision in ("fp32", "bf16"):
        words = [*tiny_overrides, "student.rank=2", f"student.kind={kind}", f"loop.precision={precision}"]
        config = resolve("tcd", None, [*words, "loop.steps=3"])
        out = distillation.distill(config, tmp_path / precision, cache=tiny_cache, quiet=True)
        file = out if out.is_file() else out / "unet" / "diffusion_pytorch_model.safetensors"
        moved[precision] = load_file(file)
        losses[precision] = [line["student/loss"] for line in figures(tmp_path / precision)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)  # bf16 rounds otherwise on every kind of CPU
    if kind == "lora":
        still = [name for name, value in moved["bf16"].items() if "lora_B" in name and not value.any()]
        assert not still
        return
    start = load_file(Path(config.teacher) / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in start.items():
        step, other = (moved[precision][name].float() - value.float() for precision in ("bf16", "fp32"))
        assert (step != 0).any() == (other != 0).any(), name


@pytest.mark.parametrize(
    ("recipe", "kind", "target"),
    [
        ("tcd", "lora", "self"),
        ("tcd", "full", "ema"),
        *(pytest.param("lcm", *values, marks=pytest.mark.slow) for values in (("lora", "ema"), ("full", "self"))),
    ],
)
def test_resuming_equals_going_on(
    recipe: str,
    kind: str,
    target: str,
    tiny_overrides: list[str],
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in step 4, after the checkpoint of step 2: weights, averages and figures bit for bit."""
    from fewstep.distillation import distill as distillation
    from fewstep.distillation.config import resolve
    from fewstep.methods import update_plan as family

    words = [*tiny_overrides, *SMALL, f"student.kind={kind}", f"method.target={target}", "optim.ema=0.8"]
    config = resolve(recipe, None, words)
    whole = distillation.distill(config, tmp_path / "whole", cache=tiny_cache, quiet=True)

    class StopError(Exception):
        pass

    def stopping(scene: Any, rng: Any, *more: Any) -> Any:
        if rng.step == 3:
            raise StopError
        return plain(scene, rng, *more)

    plain = family.consistency_loss
    with monkeypatch.context() as patched:
        patched.setattr(family, "consistency_loss", stopping)
        with pytest.raises(StopError):
            distillation.distill(config, tmp_path / "cut", cache=tiny_cache, quiet=True)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    resumed = distillation.distill(config, tmp_path / "cut", cache=tiny_cache, quiet=True)

    last = [folder / "checkpoints" / "step-00000005" for folder in (tmp_path / "whole", tmp_path / "cut")]
    names = sorted(path.name for path in last[0].iterdir())
    expected = ["state.json", *(f"student{kind}.safetensors" for kind in ("", ".ema", ".optimizer"))]
    assert names == sorted(expected + (["student.follower.safetensors"] if target == "ema" else []))
    for name in names:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")
    if kind == "lora":
        assert whole.read_bytes() == resumed.read_bytes()
        trained = load_file(whole)
        assert any(float(v.abs().max()) > 0 for n, v in trained.items() if "lora_B" in n)
    else:
        weights = [load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (whole, resumed)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("count", "steps", "spread"), [(2, 12, 2), pytest.param(10, 18, 9, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_inside_a_save(
    count: int, steps: int, spread: int, tiny_overrides: list[str], tiny_cache: Path, tmp_path: Path
) -> None:
    """kill -9 of the real command: the final LoRA equals an uninterrupted run's, byte for byte."""
    words = [
        *tiny_overrides,
        *SMALL,
        "student.targets=[to_q]",
        f"loop.steps={steps}",
        "loop.batch=2",
        "loop.keep=1",
        "optim.ema=0.9",
        "loop.validate_every=3",
        "validation.count=16",
        "validation.teacher_steps=2",
        "sampling.steps=2",
    ]
    environment = os.environ | {"PYTHONHASHSEED": "random"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kill_harness.py"), str(tmp_path), str(count), *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    kills = record["kills"]
    assert len(kills) == count, record
    assert None not in kills, record
    assert max(kills) - min(kills) >= spread, record
    assert record["saving"], record
    assert record["removing"], record
    peace, fire = (tmp_path / name for name in ("peace", "fire"))
    name = "pytorch_lora_weights.safetensors"
    assert (peace / "student" / name).read_bytes() == (fire / "student" / name).read_bytes()
    assert figures(peace) == figures(fire)
    kept = sorted(path.name for path in (peace / "best").iterdir())
    assert kept == ["figures.json", name]
    grids = [Path("grids") / f"step-{n:08d}.webp" for n in (3, steps)]
    for file in [*(Path("best") / found for found in kept), *grids]:
        assert (peace / file).read_bytes() == (fire / file).read_bytes(), file
    assert [p.name for p in (fire / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert [p.name for p in (fire / "student").iterdir()] == [name]
    assert not [p for p in fire.rglob("*") if p.name.endswith((".part", ".old", ".gone"))]
