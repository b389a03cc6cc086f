"""`python -m fewstep_worlds.stickers`: the trainings of sticker scenes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli_options import Overrides, say
from fewstep.config import parse_overrides, validate
from fewstep.errors import UserError
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


@app.command()
def reader(out: Out = Path("runs/stickers/reader"), overrides: Overrides = None) -> None:
    """Train the reader; `out`/final is the finished one."""
    from fewstep_worlds.stickers.settings import ReaderConfig

    config = validate(ReaderConfig, parse_overrides(overrides or []))

    from fewstep.device import pick_device
    from fewstep.training.launch import make_accelerator
    from fewstep_worlds.stickers.reader import save_reader, train_reader

    save_reader(train_reader(config, out, make_accelerator(config.loop.precision, pick_device("auto"))), out / "final")
    say(f"wrote {out / 'final'}")


@app.command()
def teacher(
    target: Annotated[Path, typer.Option(help="Folder for the pipeline, new.")],
    out: Out = Path("runs/stickers/teacher"),
    overrides: Overrides = None,
) -> None:
    """Train the teacher on the latents of a finished autoencoder (-s autoencoder=FOLDER); write its pipeline."""
    from fewstep.checks import check_target
    from fewstep_worlds.stickers.settings import TeacherConfig

    config = validate(TeacherConfig, parse_overrides(overrides or []))
    check_target(target, out)

    from fewstep.device import pick_device
    from fewstep.training.launch import make_accelerator
    from fewstep_worlds.stickers.teacher import train_teacher

    train_teacher(config, out, target, make_accelerator(config.loop.precision, pick_device("auto")))
    say(f"wrote {target}")


if __name__ == "__main__":
    wait_briefly()
    try:
        app()
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(2)
