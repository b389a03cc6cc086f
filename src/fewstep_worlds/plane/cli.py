"""The command's verb of the plane."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.options import Overrides, app, say


@app.command()
def playground(
    recipes: Annotated[str, typer.Option(help="Recipes, with commas between; a row of the figure each.")] = (
        "lcm,tcd,ctm,pcm"
    ),
    out: Annotated[Path, typer.Option(help="Folder; runs that were stopped go on.")] = Path("runs/playground"),
    overrides: Overrides = None,
) -> None:
    """Train recipes in the plane beside an exact teacher, a minute or so each, and draw what their jumps do.

    Example: fewstep playground --recipes lcm,tcd,tcd-s -s path=flow
    """
    from fewstep_worlds.plane import api

    path = api.playground(recipes, out=out, overrides=overrides or [])
    say((path.parent / "table.md").read_text(encoding="utf-8"))
    say(f"wrote {path}, table.md and figures.json beside it")
