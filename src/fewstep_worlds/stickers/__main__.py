"""`python -m fewstep_worlds.stickers`: the trainings of sticker scenes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.options import Overrides, say
from fewstep.common.config import parse_overrides, validate
from fewstep.common.errors import UserError
from fewstep.common.threads import limit_spinning

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

    from fewstep.common.accelerator import make_accelerator
    from fewstep.common.device import pick_device
    from fewstep_worlds.stickers.autoencoder import train_autoencoder

    vae = train_autoencoder(config, out, make_accelerator(config.loop.precision, pick_device("auto")))
    vae.save_pretrained(out / "final")
    say(f"wrote {out / 'final'}")


@app.command()
def reader(out: Out = Path("runs/stickers/reader"), overrides: Overrides = None) -> None:
    """Train the reader; `out`/final is the finished one."""
    from fewstep_worlds.stickers.settings import ReaderConfig

    config = validate(ReaderConfig, parse_overrides(overrides or []))

    from fewstep.common.accelerator import make_accelerator
    from fewstep.common.device import pick_device
    from fewstep_worlds.stickers.reader import save_reader, train_reader

    save_reader(train_reader(config, out, make_accelerator(config.loop.precision, pick_device("auto"))), out / "final")
    say(f"wrote {out / 'final'}")


@app.command()
def reader_report(
    reader: Annotated[Path, typer.Option(help="Folder of a finished reader.")],
    autoencoder: Annotated[Path | None, typer.Option(help="Folder of an AutoencoderKL to judge it through.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Unseen scenes of each condition.")] = 2000,
) -> None:
    """Print how often a reader is right on unseen scenes: real, of held-out kinds, blurred, noised, autoencoded."""
    from fewstep_worlds.common.autoencoder import load_vae
    from fewstep_worlds.stickers.accuracy import as_table
    from fewstep_worlds.stickers.reader import load_reader
    from fewstep_worlds.stickers.reader_report import reader_report

    vae = load_vae(autoencoder) if autoencoder else None
    say(as_table(reader_report(load_reader(reader), n, vae)))


@app.command()
def teacher(
    target: Annotated[Path, typer.Option(help="Folder for the pipeline, new.")],
    out: Out = Path("runs/stickers/teacher"),
    overrides: Overrides = None,
) -> None:
    """Train the teacher on the latents of a finished autoencoder (-s autoencoder=FOLDER); write its pipeline."""
    from fewstep_worlds.common.target import check_target
    from fewstep_worlds.stickers.settings import TeacherConfig

    config = validate(TeacherConfig, parse_overrides(overrides or []))
    check_target(target, out)

    from fewstep.common.accelerator import make_accelerator
    from fewstep.common.device import pick_device
    from fewstep_worlds.stickers.teacher import train_teacher

    train_teacher(config, out, target, make_accelerator(config.loop.precision, pick_device("auto")))
    say(f"wrote {target}")


@app.command()
def teacher_report(
    pipeline: Annotated[Path, typer.Option(help="Pipeline folder of a teacher.")],
    reader: Annotated[Path, typer.Option(help="Folder of a finished reader.")],
    steps: Annotated[list[int], typer.Option(help="Steps of guided DDIM; others are compared with the first.")],
    omega: Annotated[list[float], typer.Option(help="Guidance, in the papers' convention.")],
    n: Annotated[int, typer.Option(min=500, help="Unseen prompts.")] = 1000,
    prompts: Annotated[str, typer.Option(help="Set of unseen prompts (prompts.SETS).")] = "open",
) -> None:
    """Print scene accuracy and FD-Lite0 of a teacher's pictures for every step count and guidance.

    Example: teacher-report --pipeline P --reader R --steps 50 --steps 4 --omega 1 --omega 2
    """
    from fewstep_worlds.stickers.accuracy import as_table
    from fewstep_worlds.stickers.reader import load_reader
    from fewstep_worlds.stickers.teacher_report import Law, teacher_report

    laws = [Law(count, guidance) for count in steps for guidance in omega]
    rows = teacher_report(pipeline, load_reader(reader), laws, n, prompts)
    say(as_table({name: row.shares for name, row in rows.items()}))
    for name, row in rows.items():
        say(f"{name}: FD-Lite0 to real scenes {row.fd_real:.2f}, to the first row's pictures {row.fd_first:.2f}")


if __name__ == "__main__":
    limit_spinning()
    try:
        app()
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(2)
