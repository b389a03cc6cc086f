"""A set that a teacher draws from prompts alone: what is in it, that it survives, and that it is read back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.backbones.base import Backbone, load_backbone
from fewstep.backbones.sd import StableDiffusion
from fewstep.commands import app as cli
from fewstep.common.errors import UserError
from fewstep.common.files import read_json, write_json
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.samplers import picture_noise
from fewstep.diffusion.solver import ddim, guided_output, step_from_stored
from fewstep.distillation.synthesis.planning import sample_bytes
from fewstep.distillation.synthesis.reader import Synthesis
from fewstep.distillation.synthesis.record import open_set
from fewstep.distillation.synthesis.settings import resolve_synthesis
from fewstep.distillation.trajectory import teacher_ode
from fewstep.inference.generator import image_generator_of
from fewstep.methods.config import ConsistencyConfig

SUPPORT = Path(__file__).resolve().parents[1] / "support"

PROMPTS = ["a red disc", "a blue ring", "a red disc", "a green bar"]
TRAJECTORIES = ["each=2", "grid=5", "shard=3", "batch=2", "guidance.low=1", "empty_prompts=0.3", "device=cpu", "seed=3"]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "requested.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> Backbone:
    return load_backbone(tiny_pipeline)


@pytest.fixture
def make(tiny_pipeline: Path, prompt_file: Path, tmp_path: Path) -> Callable[..., Synthesis]:
    """Draw a set and read it."""

    def run(*overrides: str, out: str = "set", kind: str = "trajectories") -> Synthesis:
        words = [*TRAJECTORIES, *overrides]
        folder = fewstep.synthesize(prompt_file, out=tmp_path / out, teacher=tiny_pipeline, kind=kind, overrides=words)
        return fewstep.read_synthesis(folder)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set but the lock, which names the last process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def conditions(found: Synthesis, items: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    rows, last = found.rows(items), torch.full((len(items),), -1)
    return tuple({name: states[r].float() for name, states in found.table.items()} for r in (rows, last))  # type: ignore[return-value]


# ---- what is in it


def test_samples_are_the_prompts_in_their_order(make: Callable[..., Synthesis]) -> None:
    found = make("guidance.high=4")
    every = torch.arange(len(found))
    assert len(found) == 8
    assert found.prompts == ["a red disc", "a blue ring", "a green bar"]
    wanted = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2])
    empty = found.rows(every) == 3
    assert 0 < int(empty.sum()) < 8, "a share of empty prompts"
    assert torch.equal(found.rows(every)[~empty], wanted[~empty])
    assert found.seeds(every).tolist() == [3 * 1_000_003 + i for i in range(8)]
    omega = found.omega(every)
    assert len(omega.unique()) == 8
    assert 1 <= float(omega.min()) < float(omega.max()) <= 4
    assert found.times.tolist() == [0, 199, 399, 599, 799, 999]
    assert found.plan.prediction == "eps"


def test_text_states_are_the_encoders_own(make: Callable[..., Synthesis], backbone: Backbone) -> None:
    found = make()
    states = backbone.encode([*found.prompts, ""])["text"].half()
    assert torch.equal(found.table["text"], states)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["lcm", "none"])
@pytest.mark.parametrize(("solver", "end"), [("ddim", "index0"), ("heun", "clean")])
def test_trajectories_of_a_set_equal_those_of_a_run(
    make: Callable[..., Synthesis], backbone: Backbone, guidance: str, solver: str, end: str
) -> None:
    """The same points to the last bit, at the same batches."""
    found = make("dtype=fp32", f"guidance.convention={guidance}", f"solver={solver}", f"end={end}")
    method = ConsistencyConfig.model_validate(
        {"grid": 5, "end": end, "solver": solver, "guidance": {"convention": guidance}}
    )
    for batch in ([0, 1], [2], [3, 4], [5], [6, 7]):
        items = torch.tensor(batch)
        condition, null_condition = conditions(found, items)
        noise, _ = picture_noise(found.seeds(items).tolist(), backbone.latent_shape)
        points = teacher_ode(method, image_generator_of(backbone).denoiser).points(
            condition, null_condition, found.omega(items), noise
        )
        for index in range(6):
            assert torch.equal(found.points(items, index), points[:, index]), (batch, index)
        assert torch.equal(found.latents(items), points[:, 0])


@pytest.mark.parametrize(("solver", "end"), [("ddim", "clean"), ("heun", "index0"), ("dpmpp_2s", "clean")])
def test_latents_are_what_sampling_draws(
    make: Callable[..., Synthesis], backbone: Backbone, solver: str, end: str
) -> None:
    """To the last bit what `sample` draws from the same seeds, and the same end points in both kinds of set."""
    words = ("dtype=fp32", "guidance.high=1", f"solver={solver}", f"end={end}", "empty_prompts=0")
    found = make(*words, kind="latents")
    calls = 2 if solver != "ddim" else 1
    sampling = Sampling(sampler=solver, steps=5 * calls, omega=1, grid=5, end=end)  # type: ignore[arg-type]
    items = torch.tensor([3, 4])
    condition, _ = conditions(found, items)
    null = {"text": found.table["text"][-1:].float()}
    seeds = found.seeds(items).tolist()
    drawn = draw_latents(
        image_generator_of(backbone).denoiser, condition, null, sampling, seeds, backbone.latent_shape, "base"
    )
    assert torch.equal(found.latents(items), drawn)
    assert torch.equal(make(*words, out="whole").latents(range(8)), found.latents(range(8)))


def test_another_shard_or_batch_means_the_same_samples(make: Callable[..., Synthesis]) -> None:
    one, other = make("dtype=fp32"), make("dtype=fp32", "shard=64", "batch=5", out="other")
    assert [len(one.manifest.shards), len(other.manifest.shards)] == [3, 1]
    for name in ("rows", "seeds", "omega"):
        assert torch.equal(getattr(one, name)(range(8)), getattr(other, name)(range(8)))
    for index in range(6):  # a random network with guidance makes rounding grow from step to step
        a, b = (found.points(range(8), index) for found in (one, other))
        assert float((a - b).norm()) < 1e-3 * float(a.norm())


# ---- any guidance later


@pytest.mark.parametrize("guidance", ["lcm", "none"])
def test_a_stored_step_under_another_omega_is_the_online_one(
    make: Callable[..., Synthesis], backbone: Backbone, guidance: str
) -> None:
    found = make("dtype=fp32", f"guidance.convention={guidance}")
    denoiser = image_generator_of(backbone).denoiser
    items, index = torch.tensor([6, 1, 4]), torch.tensor([5, 1, 3])
    omega = torch.tensor([0.0, 11.5, 3.25], dtype=torch.float64)
    t, s = found.times[index], found.times[index - 1]
    condition, null_condition = conditions(found, items)
    x_t = found.points(items, index)
    online = denoiser.guided(x_t, t, condition, null_condition, omega, "base")
    x_s = ddim(lambda x, when: online, denoiser.path, x_t, t, s)
    with_prompt, without = found.predictions(items, index)
    stored = step_from_stored(denoiser.path, found.plan.prediction, x_t, with_prompt, without, omega, t, s)
    torch.testing.assert_close(stored, x_s, rtol=0, atol=1e-6 * float(x_s.abs().max()) + 1e-6)
    assert float((guided_output(with_prompt, without, omega) - online.eps).norm()) < 1e-5 * float(online.eps.norm())
    # under its own guidance it is the next point of the trajectory
    own = step_from_stored(denoiser.path, "eps", x_t, with_prompt, without, found.omega(items), t, s)
    torch.testing.assert_close(own, found.points(items, index - 1), rtol=1e-6, atol=1e-6)
    assert float((stored - own).abs().max()) > 1e-3
    if guidance == "none":  # its two outputs are of two calls
        return
    items, omega = torch.tensor([3, 4]), torch.tensor([9.0, 0.5], dtype=torch.float64)  # a batch of the trajectory
    condition, null_condition = conditions(found, items)
    t = found.times[[4, 4]]
    x_t = found.points(items, 4)
    online = denoiser.guided(x_t, t, condition, null_condition, omega, "base")
    assert torch.equal(guided_output(*found.predictions(items, 4), omega), online.eps)
    stored = step_from_stored(denoiser.path, "eps", x_t, *found.predictions(items, 4), omega, t, found.times[[0, 2]])
    assert torch.equal(stored, ddim(lambda x, when: online, denoiser.path, x_t, t, found.times[[0, 2]]))


def test_half_precision_rounds_and_no_more(make: Callable[..., Synthesis]) -> None:
    """Points stored in fp16 are the fp32 trajectory, rounded: it is not computed in fp16."""
    half, whole = make(), make("dtype=fp32", out="whole")
    for index in range(6):
        assert torch.equal(half.points(range(8), index), whole.points(range(8), index).half().float())


def test_the_cost_is_what_is_paid(
    make: Callable[..., Synthesis], tiny_pipeline: Path, prompt_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    calls = 0
    plain = StableDiffusion.call

    def counting(self: Any, network: Any, x: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += len(x)
        return plain(self, network, x, *more, **options)

    monkeypatch.setattr(StableDiffusion, "call", counting)
    cases = [
        ("latents", "ddim", "index0", "lcm", 10),
        ("latents", "heun", "clean", "none", 9),
        ("trajectories", "heun", "clean", "lcm", 18),
        ("trajectories", "ddim", "index0", "none", 10),
        ("trajectories", "ddim", "index0", "lcm 0", 10),  # a scale at which no one is guided
    ]
    for number, (kind, solver, end, guidance, evaluations) in enumerate(cases):
        convention, *scale = guidance.split()
        words = [*TRAJECTORIES, f"solver={solver}", f"end={end}", f"guidance.convention={convention}"]
        words += [f"guidance.{side}={value}" for value in scale for side in ("low", "high")]
        out = tmp_path / str(number)
        cost = fewstep.synthesis_cost(prompt_file, out=out, teacher=tiny_pipeline, kind=kind, overrides=words)
        assert (cost.samples, cost.shards, cost.evaluations) == (8, 3, evaluations)
        assert not out.exists()
        calls = 0
        fewstep.synthesize(prompt_file, out=out, teacher=tiny_pipeline, kind=kind, overrides=words)
        assert calls == 8 * evaluations, cases[number]
        files = [path.stat().st_size for path in out.glob("shard-*")]
        assert 0 < sum(files) - 8 * cost.sample_bytes < 3 * 1024, "headers"


def test_the_documented_sizes() -> None:
    """The arithmetic of docs/guide/synthesis.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "synthesis.md").read_text(encoding="utf-8")
    settings = {kind: resolve_synthesis("grid=50", kind=kind) for kind in ("latents", "trajectories")}
    for name, shape in {"SDXL": (4, 128, 128), "Stable Diffusion": (4, 64, 64), "bundled": (4, 16, 16)}.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name}")]
        cells = [cell.strip() for cell in row.split("|")]
        size = [sample_bytes(config, shape) for config in settings.values()]
        assert cells[3] == f"{size[0] / 1024:.0f} KiB"
        assert cells[4] == f"{size[1] / 2**20:.2f} MiB"


# ---- read back


def test_samples_are_read_by_number(make: Callable[..., Synthesis]) -> None:
    from fewstep.common.tensors import load_tensors

    found = make()
    shards = [load_tensors(found.folder / note.file) for note in found.manifest.shards]
    whole = {name: torch.cat([shard[name] for shard in shards]).float() for name in shards[0]}
    items, index = torch.tensor([7, 0, 3, 3, 5]), torch.tensor([5, 0, 2, 1, 4])
    assert torch.equal(found.latents(items), whole["latents"][items])
    assert torch.equal(found.points(items, index), whole["points"][items, index])
    later = index.clamp(min=1)
    for name, values in zip(("with_prompt", "without_prompt"), found.predictions(items, later), strict=True):
        assert torch.equal(values, whole[name][items, later - 1])
    assert found.points([], 0).shape == (0, 4, 8, 8)
    own = Synthesis(open_set(found.folder), torch.float16).points(items, index)
    assert own.dtype == torch.float16
    assert torch.equal(own.float(), found.points(items, index))
    assert np.isfinite(found.latents(range(8)).numpy()).all()
    with pytest.raises(IndexError, match=r"item \[8\] is not within 0 \.\. 7"):
        found.latents([8])
    with pytest.raises(IndexError, match=r"item \[-1\]"):
        found.omega([-1])
    with pytest.raises(IndexError, match=r"index .* is not within 1 \.\. 5"):
        found.predictions([0, 1], 0)
    with pytest.raises(IndexError, match=r"index .* is not within 0 \.\. 5"):
        found.points([0], 6)
    with pytest.raises(UserError, match="end points alone"):
        make(out="ends", kind="latents").points([0], 0)


def test_the_teacher_that_drew_it_is_known(make: Callable[..., Synthesis], tiny_pipeline: Path, tmp_path: Path) -> None:
    from fewstep.backbones.pipeline_folder import read_folder

    found = make(kind="latents")
    found.check_teacher(read_folder(tiny_pipeline))
    shutil.copytree(tiny_pipeline, tmp_path / "elsewhere")
    found.check_teacher(read_folder(tmp_path / "elsewhere"))
    change = tmp_path / "elsewhere" / "scheduler" / "scheduler_config.json"
    write_json(change, {**read_json(change), "beta_end": 0.013})
    with pytest.raises(UserError, match="was drawn with another teacher"):
        found.check_teacher(read_folder(tmp_path / "elsewhere"))


def test_a_broken_set_is_not_read(make: Callable[..., Synthesis], tmp_path: Path) -> None:
    found = make(kind="latents")
    found.verify(quiet=True)
    shard = found.folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is broken"):
        fewstep.read_synthesis(found.folder).verify(quiet=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"shard-00001\.safetensors has {len(whole) - 1} bytes, not {len(whole)}"):
        fewstep.read_synthesis(found.folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is missing"):
        fewstep.read_synthesis(found.folder)
    record = read_json(found.folder / "synthesis.json")
    for change, words in (
        ({"plan": {**record["plan"], "format": 2}}, "is of format 2; this version reads format 1"),
        ({"plan": {**record["plan"], "lines": 5}}, "shards are not 4 of 3 samples, 10 in all"),
        ({"shards": record["shards"][:-1]}, "shards are not 3 of 3 samples, 8 in all"),
        ({"more": 1}, "unknown key more"),
    ):
        write_json(found.folder / "synthesis.json", record | change)
        with pytest.raises(UserError, match=words):
            fewstep.read_synthesis(found.folder)
    (found.folder / "synthesis.json").unlink()
    with pytest.raises(UserError, match=r"is not a synthesised set: it holds no synthesis\.json"):
        fewstep.read_synthesis(found.folder)


# ---- gone on with


def test_broken_files_are_noticed_and_made_again(
    make: Callable[..., Synthesis], capfd: pytest.CaptureFixture[str]
) -> None:
    found = make(kind="latents")
    before = contents(found.folder)
    assert make(kind="latents").key == found.key
    shard = found.folder / "shard-00001.safetensors"
    shard.write_bytes(bytes(len(before[shard.name])))
    (found.folder / "shard-00002.safetensors").unlink()
    (found.folder / "conditions.safetensors").write_bytes(b"")
    capfd.readouterr()
    make(kind="latents")
    printed = capfd.readouterr().err
    assert "shard-00001.safetensors is broken or unfinished" in printed
    assert "there    1 of 3 shards already" in printed
    assert contents(found.folder) == before


@pytest.mark.parametrize("name", ["conditions.safetensors", "shard-00002.safetensors"])
def test_while_it_is_mended_a_set_is_not_finished(
    make: Callable[..., Synthesis], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from fewstep.distillation.synthesis import shards, synthesize

    found = make(kind="latents")
    before = contents(found.folder)
    (found.folder / name).write_bytes(b"")
    refused = []

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        def save(path: Path, *more: Any) -> None:
            with pytest.raises(UserError, match="is not finished"):
                fewstep.read_synthesis(found.folder)
            refused.append(path.name)
            write(path, *more)

        return save

    for place, writer in ((shards, "save_tensors"), (synthesize, "write_rows")):
        monkeypatch.setattr(place, writer, watched(getattr(place, writer)))
    make(kind="latents")
    assert [written.split(".")[1] for written in refused] == [name.split(".")[0]], "that file alone"
    assert contents(found.folder) == before


def test_a_shard_of_another_set_is_drawn_again(make: Callable[..., Synthesis]) -> None:
    found, other = make(kind="latents"), make("seed=4", kind="latents", out="other")
    before = contents(found.folder)
    shutil.copy(other.folder / "shard-00000.safetensors", found.folder)
    make(kind="latents")
    assert contents(found.folder) == before


def test_numbers_that_do_not_fit_are_refused(
    make: Callable[..., Synthesis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.distillation.synthesis import synthesize

    plain = synthesize.image_generator_of

    def loud(backbone: Backbone) -> Any:
        image_generator = plain(backbone)

        def call(x: torch.Tensor, *more: Any) -> torch.Tensor:
            return 1e6 * image_generator.denoiser.call(x, *more)

        denoiser = Denoiser(call, image_generator.denoiser.path, image_generator.denoiser.prediction)
        return type(image_generator)(backbone, denoiser, image_generator.sampling)

    monkeypatch.setattr(synthesize, "image_generator_of", loud)
    with pytest.raises(UserError, match=r"of sample 0 is not finite under dtype = 'fp16'"):
        make()
    with pytest.raises(UserError, match="is not finished: run its `fewstep synthesize` again"):
        fewstep.read_synthesis(tmp_path / "set")


@pytest.fixture(scope="module")
def launches(
    tiny_pipeline: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Every launch of `synthesis_harness`: the folder, and its report."""
    folder = tmp_path_factory.mktemp("launches")
    words = ["--prompts", str(prompt_file), "--teacher", str(tiny_pipeline), "--kind", "trajectories"]
    settings = [word for setting in [*TRAJECTORIES, "shard=2"] for word in ("-s", setting)]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "synthesis_harness.py"), str(folder), *words, *settings],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "random"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_many_instants_it_ends_with_the_same_bytes(launches: tuple[Path, dict[str, Any]]) -> None:
    """After every kind of rename, inside writes, inside the last removal, and at moments of no meaning."""
    folder, record = launches
    assert record["peace"] == [0], (folder / "peace.log").read_text()[-2000:]
    *killed, last = record["fire"]
    assert len(killed) >= 6
    assert set(killed) == {-9}
    assert last == 0, (folder / "fire.log").read_text()[-2000:]
    assert record["moments"], record
    assert record["moment"] == [-9, 0]
    whole = contents(folder / "peace")
    assert len(whole) == 7
    assert contents(folder / "fire") == whole
    assert contents(folder / "moment") == whole


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_draw_what_one_does(launches: tuple[Path, dict[str, Any]]) -> None:
    folder, record = launches
    assert record["two"] == [0, 0], (folder / "two-1.log").read_text()[-2000:]
    assert contents(folder / "two") == contents(folder / "peace")
    assert (folder / "two-0.did").read_text().split() == ["encode", "encode"], "the prompts, and the empty one"
    assert not (folder / "two-1.did").exists()


@pytest.mark.slow
def test_one_process_goes_on_where_one_of_two_was_killed(launches: tuple[Path, dict[str, Any]]) -> None:
    folder, record = launches
    assert record["cut"][1] == -9
    assert record["cut"][0] not in (0, None)
    assert 2 <= len(record["cut-found"]) < 4
    assert record["cut-resumed"] == [0]
    assert contents(folder / "cut") == contents(folder / "peace")


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all(launches: tuple[Path, dict[str, Any]]) -> None:
    folder, record = launches
    assert record["failed"] == [2, 2]
    assert "fewstep: the disk is full" in (folder / "failed-1.log").read_text()
    assert "another process of this launch failed" in (folder / "failed-0.log").read_text()


# ---- refused


@pytest.fixture
def refused(
    tiny_pipeline: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command, which must exit with 2 and one line; returns it."""

    def run(*words: str, prompts: Path = prompt_file, teacher: Path = tiny_pipeline, out: str = "new") -> str:
        place = tmp_path / out
        before = contents(place)
        capsys.readouterr()
        changes = [word for change in words for word in ("-s", change)]
        fixed = ["--prompts", str(prompts), "--out", str(place), "--teacher", str(teacher)]
        with pytest.raises(SystemExit) as stop:
            cli.main(["synthesize", *fixed, *changes])
        line = capsys.readouterr().err
        assert stop.value.code == 2
        assert line.startswith("fewstep: ")
        assert line.count("\n") == 1, line
        assert contents(place) == before
        return line

    return run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("kind=latent", "kind = 'latent'"),
        ("grids=4", "unknown key grids"),
        ("grid=0", "grid = 0"),
        ("grid=60", "grid = 60"),
        ("grid=[500,300,999]", "grid = [500, 300, 999]: must rise"),
        ("grid=[300,500]", "grid = [300.0, 500.0]"),
        ("grid=[0,999] end=index0", "end = 'index0'"),
        ("grid=1000 kind=trajectories", "end = 'index0'"),
        ("guidance.high=1", "high = 1"),
        ("shard=0", "shard = 0"),
        ("dtype=bf16", "dtype = 'bf16'"),
        ("precision=fp16", "precision = 'fp16'"),
        ("each=1000000000000", "GiB free: room for "),
    ],
)
def test_a_wrong_setting_is_named(refused: Callable[..., str], change: str, words: str) -> None:
    assert words in refused("device=cpu", *change.split())


def test_latents_end_clean_and_trajectories_where_jumps_do() -> None:
    assert [resolve_synthesis((), kind=kind).end for kind in ("latents", "trajectories")] == ["clean", "index0"]
    assert resolve_synthesis("end=clean", kind="trajectories").end == "clean"
    assert resolve_synthesis("end=index0", kind="latents").end == "index0"


def test_another_set_is_refused(
    make: Callable[..., Synthesis], refused: Callable[..., str], tiny_pipeline: Path, tmp_path: Path
) -> None:
    make(kind="latents")
    assert "holds a set with another settings.seed (3, now 5)" in refused(*TRAJECTORIES, "seed=5", out="set")
    assert "another settings.guidance.high (7.0, now 9.0)" in refused(*TRAJECTORIES, "guidance.high=9", out="set")
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("\n".join(PROMPTS[::-1]))
    assert "holds a set with another prompts (" in refused(*TRAJECTORIES, prompts=fewer, out="set")
    shutil.copytree(tiny_pipeline, tmp_path / "elsewhere")
    change = tmp_path / "elsewhere" / "scheduler" / "scheduler_config.json"
    write_json(change, {**read_json(change), "beta_end": 0.013})
    assert "another teacher (" in refused(*TRAJECTORIES, teacher=tmp_path / "elsewhere", out="set")
    assert "another precision ('fp32', now 'bf16')" in refused(*TRAJECTORIES, "precision=bf16", out="set")


def test_the_teacher_is_kept_in_the_type_it_computes_in(
    make: Callable[..., Synthesis], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that was drawn with whole weights under bf16 is not gone on with: its samples are not quite the same."""
    from fewstep.distillation.synthesis import synthesize

    plain, kept = synthesize.image_generator_of, list[torch.dtype]()

    def noted(backbone: Backbone) -> Any:
        kept.extend({weight.dtype for weight in backbone.network.parameters()})
        return plain(backbone)

    monkeypatch.setattr(synthesize, "image_generator_of", noted)
    drawn = {name: make(f"precision={name}", kind="latents", out=name) for name in ("fp32", "bf16")}
    assert kept == [torch.float32, torch.bfloat16]
    distance = (drawn["bf16"].latents(range(8)) - drawn["fp32"].latents(range(8))).norm()
    assert 0 < float(distance) < 0.1 * float(drawn["fp32"].latents(range(8)).norm())
    for name, found in drawn.items():
        manifest = read_json(found.folder / "synthesis.json")
        assert manifest["plan"].pop("weights") == name
        write_json(found.folder / "synthesis.json", manifest)
    make("precision=fp32", kind="latents", out="fp32")
    assert "another weights ('fp32', now 'bf16')" in refused(*TRAJECTORIES, "precision=bf16", out="bf16")


def test_files_of_others_are_not_written_over(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    own = tmp_path / "new" / "prompts.txt"
    own.write_text("a red disc\na red disc\n")
    assert "holds prompts.txt" in refused(prompts=own)


def test_refusals_are_light(make: Callable[..., Synthesis], tiny_pipeline: Path, prompt_file: Path) -> None:
    """Another set, a broken one, wrong settings: refused without torch."""
    found = make(kind="latents")
    (found.folder / "shard-00001.safetensors").unlink()
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "import fewstep\n"
        "from fewstep.common.errors import UserError\n"
        "prompts, out, teacher = sys.argv[1:]\n"
        "for act in (\n"
        "    lambda: fewstep.synthesize(prompts, out=out, teacher=teacher, overrides='seed=9'),\n"
        "    lambda: fewstep.synthesize(prompts, out=out + '-new', teacher=teacher, overrides='grid=60'),\n"
        "    lambda: fewstep.synthesize(out, out=out, teacher=teacher),\n"
        "    lambda: fewstep.read_synthesis(out),\n"
        "    lambda: fewstep.read_synthesis(teacher),\n"
        "):\n"
        "    try:\n"
        "        act()\n"
        "    except UserError as error:\n"
        "        print(error)\n"
        "print(fewstep.synthesis_cost(prompts, out=out + '-new', teacher=teacher).samples)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(prompt_file), str(found.folder), str(tiny_pipeline)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 7, lines
    assert "another settings.kind" not in lines[0]
    assert "another settings." in lines[0]
    assert "is missing" in lines[3]
    assert lines[-2:] == ["4", "False"]
