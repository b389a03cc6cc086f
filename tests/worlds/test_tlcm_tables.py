"""TLCM's tables: their students and rows on the bundled settings, and a whole table on a tiny world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.distillation.config import DistillConfig
from fewstep.methods.cost import step_cost
from fewstep_worlds.report.results import load_results
from fewstep_worlds.studies import api, tlcm
from fewstep_worlds.studies.settings import TlcmConfig
from support.sticker_world import PROMPTS

# ---- the tables' students


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Students that are recorded and not trained."""
    made: dict[str, DistillConfig] = {}

    def distill(config: DistillConfig, out: Path, *, cache: Path, shared: Path) -> Path:
        made[out.name] = config
        return out / "student" / "pytorch_lora_weights.safetensors"

    monkeypatch.setattr(tlcm, "distill", distill)
    settings = tlcm.tlcm_settings()
    settings = settings.model_copy(update={"sampling": settings.sampling.model_copy(update={"spacing": "grid"})})
    return SimpleNamespace(students=tlcm.Students(settings, 2, tmp_path / "seed-2"), made=made)


def test_rows_of_the_ablation_add_one_ingredient_each(records: Any) -> None:
    places = {label: records.students.student(label) for label in (*tlcm.LADDER, tlcm.CONTROL)}
    made = records.made
    single, segments, perceptual = (
        made[f"0-{name}"].method for name in ("lcd-single-step-z", "mlcd-single-step-z", "perceptual-distance")
    )
    assert (single.segments, single.rollout, single.distance) == (1, 1, "l2")
    assert (segments.segments, segments.rollout, segments.distance) == (8, 1, "l2")
    assert (perceptual.segments, perceptual.rollout, perceptual.distance, perceptual.weight) == (
        8, 1, "latent_lpips", "x0",
    )  # fmt: skip
    plain = {"distance": "l2"}
    assert segments.model_copy(update={"segments": 1}) == single, "one ingredient each"
    assert perceptual.model_copy(update=plain) == segments
    whole = made["tlcm"]
    assert whole.each_stage()[0].method.model_copy(update={"rollout": 1}) == perceptual
    assert whole.each_stage()[0].method.rollout == 8
    stages = [places[label].parent.name for label in tlcm.STAGES]
    assert stages == ["1-segments", "2-joined", "3-preference", "4-matching"]
    everywhere = made["0-lcd-over-all-times"]
    joined = whole.each_stage()[1].method
    assert everywhere.student.start == str(places["MLCD, multistep z"])
    assert (everywhere.method.grid, everywhere.method.k) == (1000, 125)
    assert everywhere.method.model_copy(update={"grid": 8, "k": 1}) == joined
    matched = made["0-matching"]
    assert matched.student.start == str(places["+ preference"])
    assert matched.method.adversarial.weight == 0
    assert matched.method.matching == whole.each_stage()[3].method.matching
    control = made["0-preference-trained-on"]
    assert control.student.start == str(places["+ preference"])
    assert (control.method.matching.weight, control.method.adversarial.weight) == (0, 0)
    before = whole.each_stage()[2].method
    unused = {name: getattr(before, name) for name in ("matching", "adversarial")}
    assert control.method.model_copy(update=unused) == before, "as the stage before"
    updates = [config.loop.steps // config.method.student_every for config in (control, matched)]
    own = whole.each_stage()[3]
    assert updates == [own.loop.steps // own.method.student_every] * 2, "as many of the student's as with matching"
    seeds = [stage.loop.seed for stage in whole.each_stage()]
    assert seeds[0] == whole.loop.seed == 2
    assert [made[f"0-{name}"].loop.seed for name in ("lcd-single-step-z", "lcd-over-all-times", "matching")] == [
        seeds[0], seeds[1], seeds[3],
    ]  # fmt: skip
    assert all(not config.stages for name, config in made.items() if name != "tlcm")


def test_rows_of_the_teachers_steps_differ_in_them_alone(records: Any) -> None:
    for p in (1, 4):
        records.students.student(f"p = {p}")
    one, four = records.made["0-p-1"], records.made["0-p-4"]
    assert (one.method.substeps, four.method.substeps) == (1, 4)
    assert one.method.model_copy(update={"substeps": 4}) == four.method
    assert records.students.student("p = 3") == records.students.student("+ improved LCD"), (
        "the recipe's own p is not trained twice"
    )
    without = records.students.student("TLCM without preference")
    config = records.made["0-tlcm-without-preference"]
    assert without.name == "student"
    assert config.student.start.endswith("2-joined/student")
    assert config.method.reward.weight == 0
    kept = config.method.model_copy(update={"reward": records.students.stage("matching").method.reward})
    assert kept == records.students.stage("matching").method


def test_lcm_and_tcd_take_as_many_evaluations(records: Any) -> None:
    """As many whole steps as TLCM's evaluations pay for."""
    for recipe, lr in tlcm.RATES.items():
        records.students.student(recipe)
        config = records.made[recipe]
        a_step = step_cost(config.method) * config.loop.batch
        assert 0 <= records.students.evaluations - config.loop.steps * a_step < a_step
        assert config.optim.lr == lr
        assert config.data.source == "stickers"
    assert records.students.config.data.source == "captions"


def test_a_finished_run_of_other_settings_is_not_taken(records: Any) -> None:
    place = records.students.out / "tlcm"
    (place / "student").mkdir(parents=True)
    config = records.students.config
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e-5})})
    for settings in (config, other):
        (place / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        if settings is config:
            assert records.students.student(tlcm.FINAL) == place / "student"
            assert not records.made, "nor trained again"
            continue
        with pytest.raises(UserError, match=r"holds a run with another optim\.lr"):
            records.students.student(tlcm.FINAL)


def test_a_table_has_its_rows(records: Any) -> None:
    config = validate(TlcmConfig, {"steps": [2, 3]})
    drawn = [(entry.method, entry.sampling.steps) for entry in tlcm.entries_of(config, 1, records.students)]
    assert drawn == [
        *((name, n) for name in ("TLCM", "TLCM without preference") for n in (2, 3)), ("TLCM, the paper's times", 3),
        ("LCM", 4), ("TCD", 4), ("TCD, gamma 1", 4), ("DDIM", 2), ("DDIM", 3), ("DDIM", 4),
    ]  # fmt: skip
    spacing = {entry.method: entry.sampling.spacing for entry in tlcm.entries_of(config, 1, records.students)}
    assert (spacing["TLCM"], spacing["TLCM, the paper's times"]) == ("grid", "tlcm"), "at 2 calls both lists are one"
    assert tlcm.times_of(records.students.config.sampling, 3).tolist() == [999, 749, 374]
    ladder = tlcm.entries_of(config, 2, records.students)
    labels = [*tlcm.LADDER, tlcm.CONTROL]
    assert [entry.method for entry in ladder[: len(labels)]] == labels
    assert {entry.sampling.gamma for entry in ladder[: len(labels)]} == {1.0}
    assert [(entry.method, entry.sampling.gamma) for entry in ladder[len(labels) :]] == [
        (f"{label}, gamma 0", 0.0) for label in ("MLCD, single-step z", "+ perceptual distance", "MLCD, multistep z")
    ]
    assert [entry.method for entry in tlcm.entries_of(config, 3, records.students)] == [
        "p = 1",
        "p = 2",
        "p = 3",
        "p = 4",
    ]


@pytest.mark.parametrize("table", [1, 2, 3])
def test_gains_are_between_rows_of_the_table(table: int, records: Any) -> None:
    config = validate(TlcmConfig, {"table": table})
    drawn = {(entry.method, entry.sampling.steps) for entry in tlcm.entries_of(config, table, records.students)}
    pairs = tlcm.compared(config, 1.0)
    assert {place for pair in pairs for place in pair} <= drawn | {("teacher", 25)}
    if table == 2:
        assert pairs[3:6] == [
            (("+ LCD over all times", 4), ("MLCD, multistep z", 4)), (("+ improved LCD", 4), ("MLCD, multistep z", 4)),
            (("+ improved LCD", 4), ("+ LCD over all times", 4)),
        ]  # fmt: skip
        assert (("+ matching", 4), (tlcm.CONTROL, 4)) in pairs
        assert len(pairs) == len(tlcm.LADDER) + 1
    if table == 1:
        assert (("TLCM", 3), ("teacher", 25)) in pairs
        assert (("TLCM", 4), ("TCD, gamma 1", 4)) in pairs


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"table": 4}, "table"),
        ({"steps": [3, 2]}, "steps"),
        ({"steps": [2, 20]}, "steps"),
        ({"seeds": [1, 1]}, "seeds"),
    ],
)
def test_illegal_tables_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        validate(TlcmConfig, changes)
    assert error.value.field == field


# ---- a whole table

TINY = """
method: {k: 60, guidance: {convention: imagen, low: 3.0, high: 3.0}}
student: {rank: 2, alpha: 2, targets: [to_q, conv1]}
data: {captions: 1}
loop: {steps: 8, batch: 2, precision: fp32}
latent_lpips: {network: {widths: [8], blocks: [1]}, pairs: {groups: 16, steps: 2}, loop: {steps: 2, batch: 4}}
stages:
  - {name: segments, share: 2, sampling: {steps: 8, gamma: 0.0}}
  - name: joined
    share: 2
    method: &joined {grid: 8, k: 1, substeps: 3, segments: 1, start: student, student_steps: 4, weight: none}
  - {name: preference, share: 2, method: {<<: *joined, reward: {weight: 1.0}}}
  - {name: matching, share: 2, method: {<<: *joined, reward: {weight: 1.0}, matching: {weight: 1.0, every: 2}}}
"""


@pytest.mark.slow
def test_a_table_is_trained_measured_and_resumed(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_world / "tlcm.yaml").write_text(TINY, encoding="utf-8")
    words = ["seeds=[0]", "p=[1, 3]", "teacher_steps=4"]
    table = api.tlcm(table=3, out=tmp_path / "tables", overrides=words)
    results = load_results(tmp_path / "tables" / "table-3.json")
    rows = {(row.method, row.steps): row for row in results.rows}
    assert set(rows) == {("teacher", 4), ("p = 1", 4), ("p = 3", 4)}
    assert results.of("prompt") == ["scene accuracy", "preference"]
    assert all(len(row.scores["preference"]) == PROMPTS for row in results.rows)
    scores = [np.array(rows[f"p = {p}", 4].scores["preference"]) for p in (3, 1)]
    text = table.read_text(encoding="utf-8")
    assert f"{(scores[0] - scores[1]).mean():+.4f}" in text, "the difference between the rows, prompt by prompt"
    monkeypatch.setattr(tlcm, "distill", lambda *_, **__: pytest.fail("trained again"))
    assert api.tlcm(table=3, out=tmp_path / "tables", overrides=words).read_text(encoding="utf-8") == text


# ---- prompts of the reward


def test_prompts_are_prepared_once_or_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores either way; a set that does not fit into memory is prepared batch by batch."""
    from fewstep.distillation import frozen_networks as reward

    requests: list[list[str]] = []

    class Scorer:
        def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
            requests.append(list(prompts))
            return {"n": torch.tensor([[float(len(prompt))] for prompt in prompts])}

        def score(self, pictures: Tensor, prepared: Any) -> Tensor:
            return pictures.mean((1, 2, 3)) * prepared["n"][:, 0]

    backbone: Any = SimpleNamespace(decode=lambda x: x * 2, folder=SimpleNamespace(scale=1))
    prompts = ["a", "bb", "cccc"]
    x0 = torch.ones(2, 3, 4, 4)
    which = (torch.tensor([0, 2]), torch.tensor([1, 1]))
    whole, count = reward.make_reward(backbone, Scorer(), prompts)  # type: ignore[arg-type]
    assert count == 3
    assert requests == [["a"], prompts]
    found = [scores.tolist() for scores in whole(x0, which)]
    assert found == [[2.0, 8.0], [4.0, 4.0]]
    monkeypatch.setattr(reward, "MOST_HELD", 8)
    requests.clear()
    lazy, _ = reward.make_reward(backbone, Scorer(), prompts)  # type: ignore[arg-type]
    assert [scores.tolist() for scores in lazy(x0, which)] == found
    assert requests == [["a"], ["a", "cccc"], ["bb", "bb"]]
    with pytest.raises(UserError, match="at least 2"):
        reward.make_reward(backbone, Scorer(), ["a"])  # type: ignore[arg-type]
