"""Train recipes in the plane beside an exact teacher."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.common.arguments import checked
from fewstep.common.extras import check_installed
from fewstep.common.files import write_json, write_text

if TYPE_CHECKING:
    from fewstep_worlds.plane.settings import PlaneConfig
    from fewstep_worlds.plane.train import PlaneFigures, PlaneRun


@checked
def playground(
    recipes: str | Sequence[str] = ("lcm", "tcd", "ctm", "pcm"),
    *,
    out: Path | str = "runs/playground",
    seeds: int = 1,
    evaluations: int | None = None,
    rates: Sequence[float] = (),
    overrides: str | Sequence[str] = (),
) -> Path:
    """Train recipes in the plane beside an exact teacher, a minute or so each, and draw what their jumps do.

    Example: fewstep world playground --recipes lcm,tcd,tcd-s --seeds 3 --evaluations 300000 -s base=exact

    Args:
        recipes: recipes, separated by commas; a row of the figure each.
        out: folder for figure.webp, table.md, figures.json and the runs; stopped runs are resumed from it.
        seeds: trainings of each recipe, with loop.seed and the numbers after it; figures are their means.
        evaluations: network evaluations of each training, a backward pass being two; sets loop.steps of each recipe.
        rates: learning rates that each recipe chooses from, by trainings of a seed that is not measured.
        overrides: setting, key=value, e.g. path=flow. May be repeated.

    Returns:
        The figure, of the first seed.

    Raises:
        UserError: an unknown recipe or key, or an illegal value, before any long work.
    """
    from fewstep.common.errors import UserError
    from fewstep.common.files import check_writable
    from fewstep_worlds.plane.settings import equal_steps, resolve_plane

    for field, value in (("seeds", seeds), ("evaluations", evaluations)):
        if value is not None and value < 1:
            raise UserError(f"{field} = {value} must be at least 1", field=field)
    if any(not 0 < rate < inf for rate in rates):
        raise UserError(f"rates = {list(rates)} must be above 0", field="rates")
    words = [overrides] if isinstance(overrides, str) else list(overrides)
    named = [recipes] if isinstance(recipes, str) else recipes
    configs = [resolve_plane(name.strip(), words) for names in named for name in names.split(",")]
    if evaluations:
        configs = [resolve_plane(c.recipe, [*words, f"loop.steps={equal_steps(c, evaluations)}"]) for c in configs]
    check_writable(Path(out))
    check_installed("playground", ("matplotlib",))

    if rates:
        configs = [choose_rate(config, rates, Path(out), config.loop.seed + seeds) for config in configs]
    return play(configs, Path(out), seeds)


def choose_rate(config: PlaneConfig, rates: Sequence[float], out: Path, seed: int) -> PlaneConfig:
    """Return the recipe with the learning rate that is best over all step counts; write rates/<recipe>.json.

    Args:
        seed: of the trainings that are compared.

    Raises:
        UserError: the recipe diverges at every rate.
    """
    from fewstep.common.errors import NotFiniteError, UserError
    from fewstep_worlds.common.tables import best_by_rank
    from fewstep_worlds.plane.train import measure, train_plane

    candidates = {
        f"{rate:g}": config.model_copy(update={"optim": config.optim.model_copy(update={"lr": rate})}) for rate in rates
    }
    loop = config.loop.model_copy(update={"seed": seed})
    distances, diverged = {}, []
    for rate, candidate in candidates.items():
        folder = out / "rates" / f"{config.recipe}-{rate}"
        try:
            run = train_plane(candidate.model_copy(update={"loop": loop}), folder, base=out / "rates" / "base")
        except NotFiniteError:
            diverged.append(rate)
            continue
        figures = measure(run)
        distances[rate] = [figures.best(steps)[1] for steps in config.steps]
    if not distances:
        raise UserError(f"rates = {diverged}: {config.recipe} diverges at all of them; give lower ones", field="rates")
    best = best_by_rank(distances)
    record = {"distances": distances, "diverged": diverged, "chosen": best, "seed": seed}
    write_json(out / "rates" / f"{config.recipe}.json", record)
    return candidates[best]


def play(recipes: Sequence[PlaneConfig], out: Path, seeds: int = 1, quiet: bool = False) -> Path:
    """Train and measure each recipe, and write figure.webp, table.md and figures.json; return the figure's path."""
    from fewstep_worlds.plane.figure import draw_figure, table
    from fewstep_worlds.plane.train import check_run, measure, train_plane

    for config in recipes:
        check_run(config)
    done: list[list[tuple[PlaneRun, PlaneFigures]]] = []
    for config in recipes:
        done.append([])
        for number in range(seeds):
            seed = config.loop.seed + number
            seeded = config.model_copy(update={"loop": config.loop.model_copy(update={"seed": seed})})
            folder = out / f"seed-{seed}" if number else out
            student = train_plane(seeded, folder / config.recipe, quiet, folder / "base")
            done[-1].append((student, measure(student)))
    figures = {runs[0][0].config.recipe: [measured.record() for _, measured in runs] for runs in done}
    write_text(out / "table.md", table(done))
    write_json(out / "figures.json", figures)
    return draw_figure([runs[0] for runs in done], out / "figure.webp")
