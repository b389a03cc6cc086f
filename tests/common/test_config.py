"""Typed configuration: layers, overrides, and the one line that a mistake gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from fewstep.common import core_yaml
from fewstep.common.config import Config, dotted_keys, merge, parse_overrides, read_yaml, similar_key, validate
from fewstep.common.errors import UserError, did_you_mean
from fewstep.diffusion.config import Sampling
from fewstep.distillation.config import DistillConfig, resolve
from fewstep_worlds.stickers.settings import AutoencoderConfig


class Inner(Config):
    rate: float = Field(0.1, gt=0, lt=10)
    name: str = ""
    mode: Literal["slow", "fast"] = "slow"
    limit: float | None = None


class Outer(Config):
    inner: Inner = Inner()
    other: Inner = Inner()
    count: int = Field(3, ge=1, le=5)

    @model_validator(mode="after")
    def _even(self) -> Outer:
        if self.count == 4:
            raise ValueError("count = 4 is unlucky")
        return self


def test_merge_lays_one_mapping_over_another() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    change = {"a": {"y": {"w": 3}}, "b": [9], "c": None}
    assert merge(base, change) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [9], "c": None}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("-2.5e+3", -2500.0),
        ("0.5", 0.5),
        ("7", 7),
        ("null", None),
        ("true", True),
        ("[a, b]", ["a", "b"]),
        ("{x: 1}", {"x": 1}),
        ("infinity", "infinity"),
        ("nan", "nan"),
        ("'1e-4'", "1e-4"),
        ('"a: b # c"', "a: b # c"),
        ("", None),
        ("a=b", "a=b"),
    ],
)
def test_override_values_are_yaml(text: str, value: Any) -> None:
    assert parse_overrides([f"a.b={text}"]) == {"a": {"b": value}}


TEXTS = [
    *("list #1.txt", "2024_01", "007", "1e5", "2024-01-02", "a: b.txt", "[x] p.txt", "on", "no", "null", "~", "1:30"),
    *(
        "0x10",
        "1.10",
        "{a}",
        "a, b",
        "*",
        "&x",
        "!y",
        "%z",
        "- a",
        "| b",
        "a=b",
        "~/x",
        "@x",
        "C:\\x\\y",
        "# x",
        " a b ",
        "",
    ),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("field", ["data.source", "teacher", "validation.prompts", "student.start"])
def test_overrides_of_text_fields_are_taken_as_written(text: str, field: str) -> None:
    value: Any = parse_overrides([f"{field}={text}"], DistillConfig)
    for part in field.split("."):
        value = value[part]
    assert value == text


def test_overrides_are_read_by_the_type_of_their_field() -> None:
    """Also below named stages, whose sections are changes to the config's own; quotes as YAML has them are dropped."""
    stage = "stages.preference"
    changes = [f"{stage}.method.preference.scorer=1e5", f"{stage}.optim.lr=1e5", "student.targets=[on, 010, to_q]"]
    assert parse_overrides(changes, DistillConfig) == {
        "stages": {"preference": {"method": {"preference": {"scorer": "1e5"}}, "optim": {"lr": 1e5}}},
        "student": {"targets": ["on", "010", "to_q"]},
    }
    assert parse_overrides(["teacher='1e-4'", 'data.source="a: b # c"'], DistillConfig) == {
        "teacher": "1e-4",
        "data": {"source": "a: b # c"},
    }
    numbers = ["loop.seed=010", "loop.steps=1e3", "student.checkpointing=yes", "sampling.jump=null", "student.alpha="]
    config = resolve("tcd", None, numbers)
    assert (config.loop.seed, config.loop.steps, config.student.checkpointing) == (10, 1000, True)
    assert (config.sampling.jump, config.student.alpha) == (None, None)
    for wrong, named in [("loop.steps=1:30", "loop.steps"), ("loop.steps=2024-01-02", "loop.steps"), ("a=[1", "a=")]:
        with pytest.raises(UserError, match=named):
            resolve("tcd", None, [wrong])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_fields_of_yaml_files_stay_text(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "teacher: 2024-01-02\ndata: {source: 1e5}\nvalidation: {prompts: 1.10}\nloop: {seed: 010, save_every: 2_000}\n"
        "student: {targets: [on, 010, to_q], checkpointing: yes, start: 'a\u2028b'}\n"
        "stages:\n- {name: 007, share: 1e1, method: {preference: {scorer: 1_0}}, optim: {lr: 1e-3}}\n",
        encoding=encoding,
    )
    config = resolve("tcd", file)
    assert (config.teacher, config.data.source, config.validation.prompts) == ("2024-01-02", "1e5", "1.10")
    assert (config.loop.seed, config.loop.save_every) == (10, 2000)
    assert (config.student.targets, config.student.checkpointing) == (("on", "010", "to_q"), True)
    assert config.student.start == "a\u2028b"
    assert (config.stages[0].name, config.stages[0].method["preference"]["scorer"]) == ("007", "1_0")
    assert config.stages[0].optim == {"lr": 1e-3}


def test_a_section_without_values_keeps_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("loop:\n  # steps: 7\ndata:\nsampling: {size: null}\n")
    assert resolve("tcd", file) == resolve("tcd")
    file.write_text("loop.steps: 7\n")
    with pytest.raises(UserError, match=r"loop\.steps.*loop: \{steps: "):
        resolve("tcd", file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("yes", "no", "on", "off", "010", "1:30", "1_000", "2024-01-02", "=", "a\u0085b")],
        *[("true", True), ("False", False), ("~", None), ("null", None), ("", None)],
        *[("12", 12), ("-3", -3), ("0o17", 15), ("0x1f", 31), ("1e-3", 1e-3), (".5", 0.5), ("1.", 1.0), ("2E5", 2e5)],
        ("{<<: {x: 1, y: 2}, x: 3}", {"x": 3, "y": 2}),
    ],
)
def test_yaml_scalars_are_those_of_the_core_schema(text: str, value: Any) -> None:
    found = core_yaml.load(f"a: {text}\n")["a"]
    assert (type(found), found) == (type(value), value)


def test_text_comes_back_from_yaml_as_it_was() -> None:
    import yaml

    data = {str(i): text for i, text in enumerate([*TEXTS, "yes", "1e-3", "0o17", "a\u2028b", "x\u0085y", "a\nb"])}
    data |= {"number": 1e-5, "none": None, "true": True}
    assert core_yaml.load(core_yaml.dump(data)) == data
    assert yaml.safe_load(core_yaml.dump(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        "loop: {steps: 7}\noptim: {lr: 1}\nloop: {seed: 3}\n",
        "loop:\n  steps: 7\n  steps: 8\n",
        "loop: {steps: 7, 'steps': 7}\n",
        "stages:\n- {name: a, name: b}\n",
        "loop: {seed: !!int x}\n",
        "loop: {seed: !!timestamp x}\n",
        "teacher: !!python/object:os.x y\n",
        "teacher: !folder y\n",
        "teacher: \tx\n\ty: 3",
        "a\0b",
        "teacher: " + "[" * 5000,
    ],
)
def test_yaml_that_cannot_be_right_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml is not valid YAML"):
        resolve("tcd", file)


def test_overrides_add_up_and_the_last_wins() -> None:
    assert parse_overrides(["a.x=1", "a.y=2", "a.x=3", "b=4"]) == {"a": {"x": 3, "y": 2}, "b": 4}
    for wrong in ("a", "=1", "a..b=1", ".a=1", "a.=1"):
        with pytest.raises(UserError, match="not of the form key=value"):
            parse_overrides([wrong])
    for wrong in ("a = 1", " a=1", "a.b\t=1"):
        with pytest.raises(UserError, match="without spaces"):
            parse_overrides([wrong])
    with pytest.raises(UserError, match="is not a YAML value"):
        parse_overrides(["a=[1"])


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"cuont": 1}, "unknown key cuont; did you mean count?"),
        ({"inner": {"raet": 1}}, "unknown key inner.raet; did you mean inner.rate?"),
        ({"other": {"raet": 1}}, "unknown key other.raet; did you mean other.rate?"),
        ({"rate": 1}, "unknown key rate; did you mean inner.rate?"),
        ({"count": 0}, "count = 0 must be at least 1"),
        ({"count": 6}, "count = 6 must be at most 5"),
        ({"inner": {"rate": 0}}, "inner.rate = 0 must be above 0"),
        ({"inner": {"rate": 10}}, "inner.rate = 10 must be below 10"),
        ({"inner": {"rate": float("inf")}}, "inner.rate = inf: Input should be a finite number"),
        ({"inner": {"mode": "fsat"}}, "inner.mode = 'fsat' is not one of slow, fast; did you mean 'fast'?"),
        ({"count": "many"}, "count = 'many': Input should be a valid integer"),
        ({"inner": 3}, "inner = 3 must be a mapping"),
        ({"count": 4}, "count = 4 is unlucky"),
    ],
)
def test_a_mistake_gets_one_line(data: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        validate(Outer, data)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_a_mistake_of_a_section_does_not_print_the_section() -> None:
    class Top(Config):
        section: Outer = Outer()

    with pytest.raises(UserError) as refused:
        validate(Top, {"section": {"count": 4}})
    assert str(refused.value) == "section.count = 4 is unlucky"
    assert refused.value.field == "section.count"


def test_missing_keys_are_named() -> None:
    class Needs(Config):
        must: int

    with pytest.raises(UserError, match=r"^must is missing$"):
        validate(Needs, {})


def test_numbers_become_text_where_text_is_wanted() -> None:
    assert validate(Inner, {"name": 2024}).name == "2024"


def test_configs_are_frozen_and_list_their_keys() -> None:
    assert dotted_keys(Outer)[:3] == ["inner", "inner.rate", "inner.name"]
    assert "sampling.gamma" in dotted_keys(DistillConfig)
    assert similar_key(DistillConfig, "gama") == "; did you mean sampling.gamma?"
    assert similar_key(DistillConfig, "optim.gama") == "; did you mean sampling.gamma?"
    assert similar_key(DistillConfig, "colour") == ""
    with pytest.raises(Exception, match="frozen"):
        Outer().count = 2  # type: ignore[misc]


def test_near_spellings_alone_are_suggested() -> None:
    assert did_you_mean("dimm", ["sss", "ddim", "euler"]) == "; did you mean 'ddim'?"
    assert did_you_mean("zzz", ["a", "b"]) == ""


def test_yaml_files(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# nothing\n")
    assert read_yaml(file) == {}
    file.write_text("optim: {lr: 1e-4}\n")
    assert resolve("tcd", file).optim.lr == 1e-4
    for text, words in (
        ("- a\n", "must hold a mapping"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object:os.x {}", "not valid"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words) as refused:
            read_yaml(file)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="cannot read config"):
        read_yaml(tmp_path)


def test_layers_of_a_distillation(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  lr: 0.5\n  warmup: 7\nsampling:\n  gamma: 0.1\n")
    config = resolve("tcd", file, ["optim.lr=2e-3", "student.targets=[to_q, conv1]"])
    assert (config.optim.lr, config.optim.warmup, config.sampling.gamma) == (2e-3, 7, 0.1)
    assert config.student.targets == ("to_q", "conv1")
    assert (config.recipe, config.method.s, config.method.jump) == ("tcd", "uniform", "first_order")
    lcm = resolve("lcm")
    assert (lcm.recipe, lcm.method.s, lcm.method.jump, lcm.sampling.sampler) == ("lcm", "edge", "skip", "lcm")
    assert lcm.method.distance == "huber"


def test_a_recipe_named_anywhere_brings_its_method(tmp_path: Path) -> None:
    """A label alone would name lcm and train tcd."""
    assert resolve("tcd", None, ["recipe=lcm"]) == resolve("lcm")
    file = tmp_path / "run.yaml"
    file.write_text("recipe: lcm\nloop: {steps: 3}\n")
    config = resolve("tcd", file)
    assert (config.method.jump, config.loop.steps) == ("skip", 3)
    own = tmp_path / "own.yaml"
    own.write_text("method: {k: 2}\n")
    assert resolve(str(own)).method.k == 2


def test_a_resolved_config_resolves_to_itself(tmp_path: Path) -> None:
    import yaml

    config = resolve("lcm", None, ["optim.lr=3e-4", "student.targets=[to_q]"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert resolve("tcd", file) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 51},
        {"steps": 11, "grid": 10},
        {"steps": 102, "sampler": "dpmpp_2s"},
        {"steps": 5, "sampler": "dpmpp_2s"},
    ],
)
def test_sampling_steps_fit_their_grid(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        validate(Sampling, settings)
    assert refused.value.field == "steps"


def test_sampling_steps_that_fit() -> None:
    assert validate(Sampling, {"steps": 50}).steps == 50
    assert validate(Sampling, {"steps": 100, "sampler": "dpmpp_2s"}).steps == 100
    assert validate(Sampling, {"steps": 200, "sampler": "ddim", "spacing": "trailing"}).steps == 200


def test_training_and_sampling_share_one_grid() -> None:
    words = ["method.grid=25", "sampling.grid=25"]
    assert resolve("tcd", None, words).sampling.grid == 25
    assert resolve("tcd", None, ["method.grid=100"]).sampling.grid == 50  # every second point is trained
    with pytest.raises(UserError, match=r"sampling.grid = 50 has times.* use 25"):
        resolve("tcd", None, ["method.grid=25"])
    with pytest.raises(UserError, match=r"sampling.end = 'index0' is not the end point.* 'clean'"):
        resolve("tcd", None, ["method.end=clean"])


def test_changing_one_key_of_a_section_keeps_the_defaults_of_the_others() -> None:
    """A section's own default differs from its class's."""
    plain = AutoencoderConfig()
    changed = validate(AutoencoderConfig, parse_overrides(["loop.steps=12000", "optim.lr=1e-4"]))
    assert changed.loop == plain.loop.model_copy(update={"steps": 12000})
    assert changed.optim == plain.optim.model_copy(update={"lr": 1e-4})
    assert changed.critic_optim == plain.critic_optim


def test_one_stage_of_a_list_is_changed_by_its_name() -> None:
    usual = resolve("tlcm")
    changed = resolve("tlcm", None, ["stages.preference.optim.lr=3e-6", "stages.matching.loop.batch=2"])
    assert [stage.optim.lr for stage in changed.each_stage()] == [1e-4, 1e-5, 3e-6, 1e-5]
    assert [stage.loop.batch for stage in changed.each_stage()] == [16, 16, 8, 2]
    assert changed.stages[1] == usual.stages[1]
    for wrong in ("stages={1: 2}", "stages={joined: 2}", "stages.joined="):
        with pytest.raises(UserError, match=r"stages\.(1|joined)"):
            resolve("tlcm", None, [wrong])
    with pytest.raises(UserError, match=r"did you mean 'joined'") as refused:
        resolve("tlcm", None, ["stages.joind.optim.lr=1e-5"])
    assert refused.value.field == "stages.joind"
