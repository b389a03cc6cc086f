"""The playground's figure and table: jumps, errors and samples of each student beside the exact teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from fewstep.common.files import atomic_write
from fewstep.diffusion.schedule import Path as NoisePath
from fewstep.methods.cost import step_calls
from fewstep_worlds.common.tables import markdown
from fewstep_worlds.plane.mixture import times_of
from fewstep_worlds.plane.train import PlaneFigures, PlaneRun, draw_points, landing_end

STARTS = 48
"""Trajectories in a panel."""
STOPS = 6
"""Landings between noise and the end point."""
LIMIT = 2.4
INK, FAINT, WRONG = "#333333", "#b8bcc4", "#c2410c"


def scaled(path: NoisePath, x: Tensor, t: Tensor) -> Tensor:
    """Return points scaled to the size of data, so that every path fits one frame."""
    return x / (path.alpha(t).square() + path.sigma(t).square()).sqrt()[:, None]


def _frame(axes: Any, title: str) -> None:
    axes.set_xlim(-LIMIT, LIMIT)
    axes.set_ylim(-LIMIT, LIMIT)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=INK)
    for side in axes.spines.values():
        side.set_color("#dddddd")


@torch.no_grad()
def _trajectories(axes: Any, run: PlaneRun) -> None:
    """Draw exact trajectories in grey, and the student's jumps from noise to several landings."""
    teacher, path = run.teacher, run.teacher.path
    x = teacher.sample(STARTS, path.noisiest, torch.Generator().manual_seed(3))
    t, end = times_of(path.noisiest, x), landing_end(run)
    stops = torch.linspace(path.noisiest, end, 40, dtype=torch.float64)
    points = [scaled(path, teacher.flow(x, t, times_of(float(s), x)), times_of(float(s), x)) for s in stops]
    lines = torch.stack(points)
    axes.plot(lines[:, :, 0].numpy(), lines[:, :, 1].numpy(), color=FAINT, linewidth=0.7, zorder=1)
    jump = run.jump_fn(count=len(x))
    only_end = run.config.sampling.step_jump in ("skip", "cm_skip")
    shares = [1.0] if only_end else [(i + 1) / STOPS for i in range(STOPS)]
    for share in shares:
        s = times_of(path.noisiest + share * (end - path.noisiest), x)
        landed = scaled(path, jump(x.float(), t, s).double(), s)
        axes.scatter(landed[:, 0], landed[:, 1], s=7, zorder=2, color=_shade(share), linewidths=0)
    _frame(axes, "exact paths; jumps by s")


def _shade(share: float) -> tuple[float, float, float]:
    """Return a colour from light to dark blue as s approaches the end point."""
    return 0.75 - 0.7 * share, 0.85 - 0.55 * share, 1.0 - 0.25 * share


@torch.no_grad()
def _errors(axes: Any, run: PlaneRun, measured: PlaneFigures) -> None:
    """Draw the errors of one jump to the end point: exact points in grey, the student's in blue."""
    teacher, path = run.teacher, run.teacher.path
    x = teacher.sample(160, path.noisiest, torch.Generator().manual_seed(4))
    t, s = times_of(path.noisiest, x), times_of(landing_end(run), x)
    landed, exact = run.jump_fn(count=len(x))(x.float(), t, s).double(), teacher.flow(x, t, s)
    both = torch.stack([exact, landed])
    axes.plot(both[:, :, 0].numpy(), both[:, :, 1].numpy(), color=WRONG, linewidth=0.6, zorder=1)
    axes.scatter(exact[:, 0], exact[:, 1], s=6, color=FAINT, zorder=2, linewidths=0)
    axes.scatter(landed[:, 0], landed[:, 1], s=6, color=_shade(1), zorder=3, linewidths=0)
    _frame(axes, f"one jump: rms error {measured.to_end:.3f}")


def _samples(axes: Any, run: PlaneRun, measured: PlaneFigures, steps: int) -> None:
    gamma, energy = measured.best(steps)
    points = draw_points(run, steps * run.config.sampling.calls_a_step, gamma)[:1500]
    centres = run.teacher.means
    axes.scatter(centres[:, 0], centres[:, 1], s=90, color="#e8eaee", zorder=1, linewidths=0)
    axes.scatter(points[:, 0], points[:, 1], s=1.5, color=_shade(1), alpha=0.5, zorder=2, linewidths=0)
    setting = "" if gamma is None else f", gamma {gamma:g}"
    _frame(axes, f"{steps} step{'s' if steps > 1 else ''}{setting}: {energy:.4f}")


def step_counts(runs: Sequence[tuple[PlaneRun, PlaneFigures]]) -> list[int]:
    """Return the step counts that any of the runs is measured at, rising."""
    return sorted({count for run, _ in runs for count in run.config.steps})


def draw_figure(runs: Sequence[tuple[PlaneRun, PlaneFigures]], path: Path) -> Path:
    """Draw one row a student: its jumps, its errors, and its samples at each measured step count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = step_counts(runs)
    columns = 2 + len(steps)
    figure, rows = pyplot.subplots(
        len(runs), columns, figsize=(2.3 * columns, 2.65 * len(runs) + 0.5), squeeze=False, layout="constrained"
    )
    for axes, (run, measured) in zip(rows, runs, strict=True):
        _trajectories(axes[0], run)
        axes[0].set_ylabel(run.config.recipe, fontsize=13, color=INK)
        _errors(axes[1], run, measured)
        for place, count in zip(axes[2:], steps, strict=True):
            if count in run.config.steps:
                _samples(place, run, measured, count)
            else:
                place.set_axis_off()
    floor = runs[0][1].floor
    figure.suptitle(
        f"Squared energy distance to the exact end marginal (exact samples of as many points: {floor:.4f})",
        fontsize=10,
        color=INK,
    )
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix("."), dpi=110, facecolor="white")
    pyplot.close(figure)
    return path


def table(recipes: Sequence[Sequence[tuple[PlaneRun, PlaneFigures]]]) -> str:
    """Return the figures of every gamma, recall in brackets, the jump errors and the calls of a training step.

    Args:
        recipes: for each recipe, its trainings of one or more seeds: figures are means, with standard deviations.
    """
    steps = step_counts([run for runs in recipes for run in runs])
    columns = [f"{n} step{'s' if n > 1 else ''}" for n in steps]
    rows = []
    for runs in recipes:
        config, measured = runs[0][0].config, [figures for _, figures in runs]
        calls = step_calls(config.method)
        roles = ("student", "target", "teacher", *(("fake",) if "fake" in calls else ()))
        cost = " + ".join(f"{calls.get(role, 0):.3g}" for role in roles)
        to_end, between = (mean(getattr(figures, name) for figures in measured) for name in ("to_end", "between"))
        for gamma in measured[0].gammas:
            cells = [_cell(measured, (n, gamma)) if n in config.steps else "" for n in steps]
            errors = [f"{to_end:.3f}", f"{between:.3f}", cost, f"{config.optim.lr:g}", f"{config.loop.steps}"]
            rows.append([config.recipe, "" if gamma is None else f"{gamma:g}", *cells, *errors])
    head = ["recipe", "gamma", *columns, "one jump to the end", "trained jumps", "calls a step", "lr", "training steps"]
    return markdown(head, rows, left=2)


def _cell(measured: Sequence[PlaneFigures], key: tuple[int, float | None]) -> str:
    energies = [figures.energy[key] for figures in measured]
    spread = f" ± {stdev(energies):.4f}" if len(energies) > 1 else ""
    return f"{mean(energies):.4f}{spread} ({mean(figures.recall[key] for figures in measured):.2g})"
