"""Lists of times: the published ones, diffusers' at every count, and errors with the limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fewstep.common.errors import UserError
from fewstep.diffusion.grid import edge_below, end_time, inference_times, previous, training_grid
from fewstep.diffusion.schedule import FlowMatching, VarianceExploding, scaled_linear

PATH = scaled_linear()

PUBLISHED = {
    1: [999],
    2: [999, 499],
    3: [999, 679, 339],
    4: [999, 759, 499, 259],
    5: [999, 799, 599, 399, 199],
    6: [999, 839, 679, 499, 339, 179],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
}


def scheduler(name: str, **settings: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **settings)


def test_training_grid_is_the_papers() -> None:
    grid = training_grid(PATH, 50)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [19 + 20 * i for i in range(50)]
    assert training_grid(PATH, 1).tolist() == [999]
    assert training_grid(PATH, 1000).tolist() == list(range(1000))
    assert training_grid(FlowMatching(), 4).tolist() == [0.25, 0.5, 0.75, 1.0]


def test_the_exploding_grid_is_edms() -> None:
    """arXiv 2206.00364, eq 5, 18 steps: (80^(1/7) + i/17 (.002^(1/7) - 80^(1/7)))^7."""
    times = training_grid(VarianceExploding(), 18).flip(0)
    wanted = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert times.tolist() == pytest.approx(wanted, rel=1e-12)
    assert times[0] == 80
    assert end_time(VarianceExploding(), "index0") == 0.002
    assert inference_times(VarianceExploding(), 18, spacing="trailing").tolist() == times.tolist()


def test_own_points() -> None:
    points = (19.0, 99.0, 499.5, 999.0)
    assert training_grid(PATH, points).tolist() == list(points)
    assert inference_times(PATH, 2, grid=points).tolist() == [999.0, 99.0]
    for wrong in ((), (19.0, 19.0), (99.0, 19.0), (19.0, 1000.0), (-1.0, 999.0), (19.0, 99.0)):
        with pytest.raises(UserError) as error:
            training_grid(PATH, wrong)
        assert error.value.field == "grid"


def test_segments_end_on_grid_points() -> None:
    """A point on an edge belongs to the segment below, whose noisiest time it is."""
    index = torch.arange(50)
    edges = edge_below(index, 50, 5)
    assert edges.tolist() == [-1] * 10 + [9] * 10 + [19] * 10 + [29] * 10 + [39] * 10
    assert edge_below(index, 50, 1).unique().tolist() == [-1]


@pytest.mark.parametrize(("steps", "times"), PUBLISHED.items())
def test_published_lists(steps: int, times: list[int]) -> None:
    assert inference_times(PATH, steps).tolist() == times


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_grid_times_equal_diffusers_at_every_count(name: str) -> None:
    for steps in range(1, 51):
        theirs = scheduler(name)
        theirs.set_timesteps(steps)
        assert inference_times(PATH, steps).tolist() == theirs.timesteps.tolist(), f"{steps} steps"


@pytest.mark.parametrize("grid", [10, 25, 40, 100, 200])
def test_grid_times_equal_diffusers_on_other_grids(grid: int) -> None:
    for steps in range(1, grid + 1):
        theirs = scheduler("TCDScheduler", original_inference_steps=grid)
        theirs.set_timesteps(steps)
        ours = inference_times(PATH, steps, grid=grid)
        # theirs floors i * (N / steps) in floating point, which falls short of a whole number now and then
        exact = np.array([i * grid // steps for i in range(steps)])
        rounded = np.floor(np.linspace(0, grid, steps, endpoint=False)).astype(int)
        right = torch.tensor(exact == rounded)
        assert torch.equal(ours[right], theirs.timesteps[right].double()), f"{steps} of {grid}"
        assert bool(right.float().mean() > 0.9)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_trailing_times_equal_diffusers(name: str) -> None:
    for steps in [*range(1, 51), 100, 250, 500, 1000]:
        theirs = scheduler(name, timestep_spacing="trailing")
        theirs.set_timesteps(steps)
        ours = inference_times(PATH, steps, spacing="trailing")
        difference = (ours - theirs.timesteps.double()).abs()
        if steps == 48:
            # 937.5, 687.5, ... : theirs adds up 1000/48 in floating point and falls below the half
            assert difference.max() == 1
            assert int((difference > 0).sum()) == 4
        else:
            assert difference.max() == 0, f"{steps} steps"


def test_inference_times_fall_from_the_noisiest_along_the_training_grid() -> None:
    allowed = set(training_grid(PATH, 50).tolist())
    for steps in range(1, 51):
        times = inference_times(PATH, steps).tolist()
        assert times[0] == 999
        assert len(times) == steps
        assert times == sorted(set(times), reverse=True)
        assert set(times) <= allowed
    assert inference_times(FlowMatching(), 4).tolist() == [1.0, 0.76, 0.5, 0.26]
    assert inference_times(FlowMatching(), 4, spacing="trailing").tolist() == [1.0, 0.75, 0.5, 0.25]
    own = inference_times(VarianceExploding(), 2, grid=[0.5, 2.0, 10.0, 80.0]).tolist()
    assert own == [80.0, 2.0]


def test_previous_is_k_points_below() -> None:
    grid = training_grid(PATH, 50)
    index = torch.arange(50)
    assert previous(grid, index, 1, 0.0).tolist() == [0.0, *grid[:-1].tolist()]
    assert previous(grid, index, 1, -1.0)[0] == -1
    assert previous(grid, torch.tensor([49, 7, 0]), 1, 0.0).tolist() == [979, 139, 0]
    assert previous(grid, torch.tensor([49, 3, 2, 0]), 3, 0.0).tolist() == [939, 19, 0, 0]
    assert previous(grid, index, 0, 0.0).tolist() == grid.tolist()
    assert previous(grid, index, 50, 0.0).tolist() == [0.0] * 50


def test_ends() -> None:
    assert end_time(PATH, "clean") == -1
    assert end_time(PATH, "index0") == 0
    assert end_time(FlowMatching(), "clean") == 0
    assert end_time(FlowMatching(), "index0") == 0.001


@pytest.mark.parametrize(
    ("count", "divisor"),
    [(48, 50), (49, 50), (60, 50), (90, 100), (999, 1000), (4000, 1000)],
)
def test_grid_errors_name_a_divisor(count: int, divisor: int) -> None:
    with pytest.raises(UserError, match=rf"grid = {count} .*e\.g\. {divisor}$"):
        training_grid(PATH, count)


def test_continuous_grid_refuses_nothing_to_do() -> None:
    with pytest.raises(UserError, match="grid = 0 "):
        training_grid(FlowMatching(), 0)


@pytest.mark.parametrize(
    ("steps", "settings", "limit"),
    [
        (0, {}, 50),
        (-2, {}, 50),
        (51, {}, 50),
        (11, {"grid": 10}, 10),
        (0, {"spacing": "trailing"}, 1000),
        (1001, {"spacing": "trailing"}, 1000),
    ],
)
def test_steps_errors_name_the_limit(steps: int, settings: dict[str, Any], limit: int) -> None:
    with pytest.raises(UserError, match=rf"steps = {steps} must be within 1 to {limit}$") as error:
        inference_times(PATH, steps, **settings)
    assert "\n" not in str(error.value)
