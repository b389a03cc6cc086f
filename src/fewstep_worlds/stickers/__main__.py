"""`python -m fewstep_worlds.stickers`: the trainings of sticker scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli_options import Overrides, say
from fewstep.config import parse_overrides, validate
from fewstep.threads import wait_briefly

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Run folder; a stopped run is resumed from it.")]


@app.callback()
def stickers() -> None:
    """Train the networks of sticker scenes."""


@app.command()
def autoencoder(out: Out = Path("runs/stickers/autoencoder"), overrides: Overrides = None) -> None:
    """Train the autoencoder; `out`/final is the finished AutoencoderKL."""
    from fewstep_worlds.stickers.settings import AutoencoderConfig

    config = validate(AutoencoderConfig, parse_overrides(overrides or []))

    from fewstep.device import pick_device
    from fewstep.training.launch import make_accelerator
    from fewstep_worlds.stickers.autoencoder import train_autoencoder

    vae = train_autoencoder(config, out, make_accelerator(config.loop.precision, pick_device("auto")))
    vae.save_pretrained(out / "final")
    say(f"wrote {out / 'final'}")


if __name__ == "__main__":
    wait_briefly()
    app()
