"""The playground: its exact distance, its teacher as a network, and what recipes learn there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.diffusion.schedule import FlowMatching, expand, interpret, scaled_linear
from fewstep_worlds.plane.api import play as play_all
from fewstep_worlds.plane.api import playground
from fewstep_worlds.plane.mixture import rice_mean, ring
from fewstep_worlds.plane.network import PlaneNetwork
from fewstep_worlds.plane.settings import PathName, resolve_plane
from fewstep_worlds.plane.train import (
    PlaneFigures,
    draw_points,
    landing_end,
    learned_base,
    measure,
    noise_path,
    set_up,
    train_plane,
    training_points,
)
from support.exact import gaussian, three_modes, times_of

# a wider step of the teacher, so that a short run goes far
SHORT = [
    "method.k=5", "loop.steps=400", "loop.batch=128", "count=4000", "shown=2000", "steps=[1,4]", "gammas=[0.0]",
    "width=64", "base=exact", "optim.lr=1e-3",
]  # fmt: skip


def test_rices_mean() -> None:
    """E|d + s z| in the plane, against its two limits and a million draws."""
    far, near = torch.tensor([1e3, 0.0], dtype=torch.float64), torch.tensor([0.5, 0.7], dtype=torch.float64)
    assert rice_mean(far, near)[0].item() == pytest.approx(1e3 + 0.25 / 2e3, rel=1e-9)
    assert rice_mean(far, near)[1].item() == pytest.approx(0.7 * math.sqrt(math.pi / 2), rel=1e-12)
    z = torch.randn(1_000_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = (0.8 * z + torch.tensor([1.1, 0.0])).norm(dim=1).mean()
    found = rice_mean(torch.tensor(1.1).double(), torch.tensor(0.8).double()).item()
    assert found == pytest.approx(float(drawn), abs=2e-3)


def test_energy_distance_is_zero_for_the_distribution_itself_alone() -> None:
    """Unbiased over draws, at any time; a shift of two Gaussians has a closed form."""
    path = scaled_linear()
    mixture = three_modes(path)
    for t in (-1.0, 400.0):
        found = [mixture.energy(mixture.sample(500, t, torch.Generator().manual_seed(i)), t) for i in range(30)]
        mean, spread = sum(found) / 30, torch.tensor(found).std().item() / math.sqrt(30)
        assert abs(mean) < 3 * spread
        assert min(found) < 0 < max(found)
    one = gaussian(path, std=0.6)
    moved = one.sample(4000, -1.0, torch.Generator().manual_seed(1)) + torch.tensor([0.5, 0.0])
    std = torch.tensor(0.6 * math.sqrt(2)).double()
    wanted = 2 * rice_mean(torch.tensor(0.5).double(), std) - 2 * rice_mean(torch.tensor(0.0).double(), std)
    assert one.energy(moved, -1.0) == pytest.approx(wanted.item(), abs=0.01)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_a_fresh_network_is_the_exact_teacher(prediction: Prediction) -> None:
    path = FlowMatching() if prediction == "flow" else scaled_linear()
    mixture = ring(path)
    t = times_of(0.4 * path.noisiest, torch.empty(64))
    x = mixture.sample(64, float(t[0]), torch.Generator().manual_seed(0))
    out = PlaneNetwork(mixture, prediction, width=16)(x, t).detach()
    found = interpret(prediction, out, x, expand(path.alpha(t), x), expand(path.sigma(t), x))
    wanted = mixture.denoise(x, t)
    assert float((found.x0 - wanted.x0).abs().max()) < 1e-5
    assert float((found.eps - wanted.eps).abs().max()) < 1e-5


@pytest.mark.parametrize("path", get_args(PathName))
def test_stored_points_lie_on_exact_trajectories(path: PathName) -> None:
    play = set_up(
        resolve_plane(
            "kd", [f"path={path}", "count=100", "method.grid=8", "method.k=7", "sampling.grid=8", "steps=[1]"]
        )
    )
    points = training_points(play).double()
    noisy, end = points[:, -1], points[:, 0]
    teacher = play.teacher
    from fewstep.diffusion.grid import end_time, training_grid

    grid = training_grid(teacher.path, 8)
    middle = teacher.flow(noisy, times_of(float(grid[-1]), noisy), times_of(float(grid[3]), noisy), steps=400)
    assert float((points[:, 4] - middle).abs().max()) < 2e-3
    last = teacher.flow(
        noisy, times_of(float(grid[-1]), noisy), times_of(end_time(teacher.path, "index0"), noisy), steps=400
    )
    assert float((end - last).abs().max()) < 5e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PlaneFigures]:
    found = {}
    for recipe in ("lcm", "tcd", "tcd-s", "mcm"):
        play = train_plane(resolve_plane(recipe, SHORT), tmp_path_factory.mktemp(recipe), quiet=True)
        found[recipe] = measure(play)
    found["untrained"] = measure(set_up(resolve_plane("tcd", SHORT)))
    return found


@pytest.mark.slow
def test_recipes_learn_what_they_are_for(trained: dict[str, PlaneFigures]) -> None:
    """A network conditioned on s is far better at one step. Segments have no effect there."""
    at = {name: {steps: figures.best(steps)[1] for steps in (1, 4)} for name, figures in trained.items()}
    assert all(at[name][1] < at["untrained"][1] for name in ("lcm", "tcd", "tcd-s"))
    assert all(at[name][4] < at["untrained"][4] for name in ("lcm", "tcd", "tcd-s", "mcm"))
    assert at["tcd-s"][1] < 0.7 * at["tcd"][1]
    assert at["mcm"][1] > 2 * at["tcd"][1]
    assert at["mcm"][4] < 0.1 * at["mcm"][1]


FOLLOWERS: dict[str, dict[str, object]] = {
    **{name: {"sampler": name} for name in ("ddim", "euler", "heun", "dpm_2", "dpmpp_2s", "sde_dpmpp_2m")},
    "sss, gamma 0": {"sampler": "sss", "gamma": 0.0},
    "sss, gamma .2": {"sampler": "sss", "gamma": 0.2},
    "sss, gamma .2 in noise": {"sampler": "sss", "gamma": 0.2, "gamma_law": "noise"},
    "sss of second order": {"sampler": "sss", "gamma": 0.0, "jump": "second_order"},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", get_args(PathName))
@pytest.mark.parametrize("name", FOLLOWERS)
def test_many_small_steps_of_the_exact_network_draw_the_exact_distribution(name: str, path: str) -> None:
    """Every sampler, on every path, from where drawing starts to where it ends: 40 calls of a network that is right."""
    play = set_up(resolve_plane("tcd", [f"path={path}", "base=exact", "shown=1000"]))
    sampling = play.config.sampling.model_copy(update=FOLLOWERS[name] | {"steps": 40})
    play = replace(play, config=play.config.model_copy(update={"sampling": sampling}))
    energy = play.teacher.energy(draw_points(play, 40, sampling.gamma), landing_end(play))
    few = play.teacher.energy(draw_points(play, 4, sampling.gamma), landing_end(play))
    assert energy < 0.005
    assert few > 1.7 * energy


@pytest.mark.slow
def test_a_learned_base_is_near_the_exact_teacher(tmp_path: Path) -> None:
    """It samples as the teacher does, and is not it; a student in the plane is still trained by the exact one."""
    config = resolve_plane("tcd", ["base_steps=600", "width=64", "shown=1000"])
    weights = learned_base(config, tmp_path, quiet=True)
    fresh, base = set_up(config), set_up(config, weights)
    sampling = config.sampling.model_copy(update={"sampler": "ddim", "steps": 20})
    energies = {}
    for name, play in {"fresh": fresh, "base": base}.items():
        drawn = replace(play, config=config.model_copy(update={"sampling": sampling}))
        energies[name] = play.teacher.energy(draw_points(drawn, 20), landing_end(drawn))
    assert energies["base"] < 0.25 * energies["fresh"]
    x, t = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), times_of(500.0, torch.zeros(50, 2))
    exact = base.teacher.denoise(x.double(), t).eps
    eps = {role: base.denoiser.estimate(x, t, {}, role).eps.detach().double() for role in ("teacher", "student")}
    assert float((eps["teacher"] - exact).abs().max()) < 1e-6
    assert 1e-4 < float((eps["student"] - exact).square().mean().sqrt()) < 0.1


def test_illegal_settings_are_refused_before_the_training(tmp_path: Path) -> None:
    for words, field in (
        (["method.extra_conditioning=[s]"], "sampling.extra_conditioning"),
        (["method.distance=features"], "method.distance"),
        (["method.grid=25"], "sampling.grid"),
        (["sampling.end=clean"], "sampling.end"),
        (["gammas=[2]"], "gammas"),
        (["steps=[]"], "steps"),
        (["steps=[0,60]"], "steps"),
        (["path=flow", "prediction=eps"], "prediction"),
        (["method.guidance.convention=lcm"], "method.guidance"),
        (["sampling.omega=2"], "sampling.omega"),
        (["path=ve", "sampling.grid=25"], "sampling.grid"),
    ):
        with pytest.raises(UserError) as error:
            resolve_plane("tcd", words)
        assert error.value.field.startswith(field)
    with pytest.raises(UserError, match=r"stage '8 segments'.*segment's 5 points"):
        resolve_plane("tscd", ["method.k=6"])
    for words, message in (
        (["method.grid=77", "sampling.grid=77"], "grid = 77 must divide the 1000 training indices"),
        (
            ["method.grid=[9,99]", "sampling.grid=[9,99]", "sampling.steps=2", "steps=[1]"],
            r"grid = \[9\.0, 99\.0\] .* end at 999",
        ),
    ):
        with pytest.raises(UserError, match=message):
            play_all([resolve_plane("tcd", words)], tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_verb_draws_its_figure(tmp_path: Path) -> None:
    from PIL import Image

    words = ["base_steps=3", "count=200", "shown=200", "steps=[1,2]", "width=16", "loop.batch=16"]
    figure = playground("lcm, tcd-s", out=tmp_path / "play", seeds=2, evaluations=3 * 16 * 5, overrides=words)
    with Image.open(figure) as image:
        assert image.size[0] > 500
    figures = read_json(tmp_path / "play" / "figures.json")
    assert figures.keys() == {"lcm", "tcd-s"}
    one, other = (figures["tcd-s"][seed]["energy"] for seed in (0, 1))
    assert len(one) == 6
    assert one != other
    rows = (tmp_path / "play" / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| lcm", *["| tcd-s"] * 3]
    assert f"{(one[0]['energy'] + other[0]['energy']) / 2:.4f}" in rows[3]
    assert all(row.split(" | ")[-1].rstrip(" |") == "3" for row in rows[2:]), "three steps of 16 at 5 evaluations"
    assert all(row.split(" | ")[-2] == "0.0003" for row in rows[2:])
    with pytest.raises(UserError, match="tdc"):
        playground(["tdc"], out=tmp_path / "no")
    with pytest.raises(UserError) as error:
        playground("tcd", out=tmp_path / "no", overrides="pth=flow")
    assert error.value.field == "pth"
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_rate_is_chosen_by_a_seed_that_is_not_measured(tmp_path: Path) -> None:
    """A rate that moves nothing and one that wrecks the student lose to one that learns."""
    words = ["base=exact", "count=200", "shown=500", "steps=[2,4]", "loop.steps=60", "loop.batch=64"]
    playground("tcd", out=tmp_path, rates=[1e-9, 2e-3, 10.0], overrides=[*words, "gammas=[0]"])
    record = read_json(tmp_path / "rates" / "tcd.json")
    assert record["chosen"] == "0.002"
    assert record["seed"] == 1
    assert record["diverged"] == ["10"]
    distances = record["distances"]
    assert all(good < still for good, still in zip(distances["0.002"], distances["1e-09"], strict=True))
    measured = [row["energy"] for row in read_json(tmp_path / "figures.json")["tcd"][0]["energy"]]
    assert measured != distances["0.002"], "another seed"
    assert measured[0] < distances["1e-09"][0]
    with pytest.raises(UserError) as error:
        playground("tcd", out=tmp_path / "no", rates=[0.0])
    assert error.value.field == "rates"


def test_recall_counts_modes_with_half_of_their_weight() -> None:
    """Exact samples have all modes; of three modes of eight only these; points on one spot at most one."""
    teacher = ring(noise_path("vp"))
    generator = torch.Generator().manual_seed(0)
    assert teacher.recall(teacher.sample(4000, -1.0, generator), -1.0) == 1
    three = teacher.means[torch.arange(3000) % 3] + 0.1 * torch.randn(3000, 2, generator=generator).double()
    assert teacher.recall(three, -1.0) == 3 / 8
    assert teacher.recall(torch.zeros(100, 2).double(), -1.0) <= 1 / 8
    few = torch.cat([three, teacher.means[3].expand(180, 2)])  # a twentieth, less than half of an eighth
    assert teacher.recall(few, -1.0) == 3 / 8
