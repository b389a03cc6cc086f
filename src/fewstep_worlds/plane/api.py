"""Train recipes in the plane beside an exact teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.common.arguments import checked
from fewstep.common.extras import check_installed
from fewstep.common.files import write_json, write_text

if TYPE_CHECKING:
    from fewstep_worlds.plane.settings import PlaneConfig


@checked
def playground(
    recipes: str | Sequence[str] = ("lcm", "tcd", "ctm", "pcm"),
    *,
    out: Path | str = "runs/playground",
    overrides: str | Sequence[str] = (),
) -> Path:
    """Train recipes in the plane beside an exact teacher, a minute or so each, and draw what their jumps do.

    Example: fewstep world playground --recipes lcm,tcd,tcd-s -s path=flow

    Args:
        recipes: recipes, separated by commas; a row of the figure each.
        out: folder for figure.webp, table.md, figures.json and the runs; stopped runs are resumed from it.
        overrides: setting, key=value, e.g. path=flow. May be repeated.

    Returns:
        The figure.

    Raises:
        UserError: an unknown recipe or key, or an illegal value, before any long work.
    """
    from fewstep.common.files import check_writable
    from fewstep_worlds.plane.settings import resolve_plane

    named = [recipes] if isinstance(recipes, str) else recipes
    configs = [resolve_plane(name.strip(), overrides) for names in named for name in names.split(",")]
    check_writable(Path(out))
    check_installed("playground", ("matplotlib",))

    return play(configs, Path(out))


def play(recipes: Sequence[PlaneConfig], out: Path, quiet: bool = False) -> Path:
    """Train and measure each recipe, and write figure.webp, table.md and figures.json; return the figure's path."""
    from fewstep_worlds.plane.figure import draw_figure, table
    from fewstep_worlds.plane.train import check_run, measure, train_plane

    for config in recipes:
        check_run(config)
    done = []
    for config in recipes:
        student = train_plane(config, out / config.recipe, quiet, out / "base")
        done.append((student, measure(student)))
    figures = {p.config.recipe: m.record() for p, m in done}
    write_text(out / "table.md", table(done))
    write_json(out / "figures.json", figures)
    return draw_figure(done, out / "figure.webp")
