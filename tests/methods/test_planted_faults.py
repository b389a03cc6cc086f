"""Off-by-ones planted in t_n, in s and in k, one at a time: the family's tests must turn red."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable

import pytest

from fewstep.methods import consistency, times
from fewstep.methods.recipes import rows
from methods import test_consistency, test_recipes_exact

FAULTS = {
    "t_n one point too high": ("torch.maximum(index - k * apart, edge)", "torch.maximum(index - k * apart + 1, edge)"),
    "t_n one point too low": ("torch.maximum(index - k * apart, edge)", "torch.maximum(index - k * apart - 1, edge)"),
    "t_n below its segment": ("below = torch.maximum(index - k * apart, edge)", "below = (index - k).clamp(min=-1)"),
    "s above the edge": ("return grid_times.at(edge)\n", "return grid_times.at(edge + 1)\n"),
    "s never t_n": ("(below - edge + 1).double()", "(below - edge).double()"),
    "s never the edge": ("place = edge + (rng", "place = edge + 1 + (rng"),
    "k one too large": ("torch.full_like(index, config.k)", "torch.full_like(index, config.k + 1)"),
    "k never its largest": ("(most - least + 1)", "(most - least)"),
    "k never its smallest": ("most.clamp(max=config.k_low)", "most.clamp(max=config.k_low + 1)"),
    "t_{n+k} never pure noise": ("len(grid) // apart) + 1)", "len(grid) // apart - 1) + 1)"),
}
"""What is written in `methods/times.py`, and the fault in its place."""

CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"times of {recipe}": lambda recipe=recipe: test_recipes_exact.test_times_of_every_recipe(recipe)
        for recipe in rows()
    },
    "k": test_recipes_exact.test_k_is_drawn_where_a_smallest_is_named,
    "segments": test_recipes_exact.test_segments_land_on_their_lower_edge,
    "the grid": lambda: test_consistency.test_times_lie_on_the_grid("index0", 0.0),
    "a wider skip": test_consistency.test_a_wider_skip_and_the_end_rule,
}


def red() -> set[str]:
    """The checks that fail."""
    found = set()
    for name, check in CHECKS.items():
        try:
            check()
        except (AssertionError, IndexError, RuntimeError):
            found.add(name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not red()
    source, (right, wrong) = inspect.getsource(times), FAULTS[fault]
    assert source.count(right) == 1
    planted = types.ModuleType("planted")
    monkeypatch.setitem(__import__("sys").modules, "planted", planted)
    exec(compile(source.replace(right, wrong), "planted", "exec"), planted.__dict__)
    for module in (test_recipes_exact, test_consistency, consistency):
        monkeypatch.setattr(module, "draw_times", planted.draw_times)
    assert red()
