"""Train recipes in the plane beside an exact teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.common.arguments import checked
from fewstep.common.extras import check_installed
from fewstep.common.files import atomic_write, write_json
from fewstep_worlds.plane.settings import PlaneConfig
from fewstep_worlds.plane.train import check_run, measure, train_plane


@checked
def playground(
    recipes: str | Sequence[str] = ("lcm", "tcd", "ctm", "pcm"),
    *,
    out: Path | str = "runs/playground",
    overrides: str | Sequence[str] = (),
) -> Path:
    """Train recipes in the plane beside an exact teacher, and draw what they learn; returns the figure's path.

    Args:
        recipes: names of recipes; one row of the figure each.
        out: folder for figure.webp, table.md, figures.json and the runs; a run that was stopped goes on.
        overrides: dotted changes to the playground's settings, e.g. "path=flow".

    Raises:
        UserError: an unknown recipe or key, or an illegal value, before any long work.
    """
    from fewstep.common.files import check_writable
    from fewstep_worlds.plane.settings import resolve_plane

    named = recipes.split(",") if isinstance(recipes, str) else list(recipes)
    configs = [resolve_plane(name.strip(), overrides) for name in named]
    check_writable(Path(out))
    check_installed("playground", ("matplotlib",))

    return play(configs, Path(out))


def play(recipes: Sequence[PlaneConfig], out: Path, quiet: bool = False) -> Path:
    """Train and measure each recipe, and write figure.webp, table.md and figures.json; returns the figure's path."""
    from fewstep_worlds.plane.figure import draw_figure, table

    for config in recipes:
        check_run(config)
    done = []
    for config in recipes:
        student = train_plane(config, out / config.recipe, quiet, out / "base")
        done.append((student, measure(student)))
    figures = {p.config.recipe: m.record() for p, m in done}
    with atomic_write(out / "table.md") as part:
        part.write_text(table(done), encoding="utf-8")
    write_json(out / "figures.json", figures)
    return draw_figure(done, out / "figure.webp")
