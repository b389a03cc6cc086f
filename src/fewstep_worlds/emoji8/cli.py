"""The command's verbs of the bundled world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.commands.options import Overrides, app, echo_figures, say


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder; a demo that was stopped goes on from it.")] = Path("demo"),
    overrides: Overrides = None,
) -> None:
    """Distil LCM and TCD from the bundled teacher, compare them with it, write report.html. Budgeted at ten minutes.

    Example: fewstep demo --out demo -s steps=200
    """
    from fewstep_worlds.emoji8 import api

    path = api.demo(out=out, overrides=overrides or [])
    say(f"wrote {path}: open it in a browser")


@app.command()
def benchmark(
    out: Annotated[Path, typer.Option(help="Folder; a benchmark that was stopped goes on.")] = Path("runs/benchmark"),
    overrides: Overrides = None,
) -> None:
    """The TCD paper's Table 1 and gamma figures on the bundled world, three seeds. Takes hours on a CPU."""
    from fewstep_worlds.emoji8 import api

    say(f"wrote {api.benchmark(out=out, overrides=overrides or [])}")


@app.command()
def family(
    out: Annotated[Path, typer.Option(help="Folder; a run that was stopped goes on.")] = Path("runs/family"),
    overrides: Overrides = None,
) -> None:
    """Every recipe on the bundled world at equal training cost, and every sampler on one student. Takes hours on a CPU.

    Example: fewstep family -s "recipes=[tcd, tcd-2, tcd-s]"
    """
    from fewstep_worlds.emoji8 import api

    say(f"wrote {api.family(out=out, overrides=overrides or [])}")


@app.command()
def teacher_card(
    out: Annotated[Path, typer.Option(help="Folder for card.json, card.md and samples.webp.")] = Path("runs/card"),
    teacher: Annotated[str, typer.Option(help="Pipeline folder; empty for the bundled teacher.")] = "",
    omega: Annotated[float | None, typer.Option(help="Guidance; empty for what the teacher brings along.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of guided DDIM.")] = 50,
    n: Annotated[int, typer.Option(help="Seen prompts to draw.")] = 1000,
) -> None:
    """Measure a teacher of the bundled world: right concepts, copies, unseen words, white backgrounds."""
    from fewstep_worlds.emoji8 import api

    echo_figures(api.teacher_card(out=out, teacher=teacher, omega=omega, steps=steps, n=n))
    say(f"wrote {out / 'card.md'}")


@app.command()
def train_scorer(
    out: Annotated[Path, typer.Option(help="Run folder; a stopped run is resumed from it.")] = Path("runs/scorer"),
    overrides: Overrides = None,
) -> None:
    """Train the bundled world's prompt-agreement scorer from Emoji-8."""
    from fewstep_worlds.emoji8 import api

    say(f"wrote {api.train_scorer(out=out, overrides=overrides or [])}")


@app.command()
def train_reward(
    out: Annotated[Path, typer.Option(help="Run folder; a stopped run is resumed from it.")] = Path("runs/reward"),
    overrides: Overrides = None,
) -> None:
    """Train the bundled world's preference scorer from Emoji-8: what students may be trained by."""
    from fewstep_worlds.emoji8 import api

    say(f"wrote {api.train_reward(out=out, overrides=overrides or [])}")


@app.command()
def train_teacher(
    out: Annotated[Path, typer.Option(help="Run folder; a run that was stopped is resumed from it.")] = Path(
        "runs/teacher"
    ),
    target: Annotated[Path, typer.Option(help="Pipeline folder to write.")] = Path("runs/teacher/pipeline"),
    config: Annotated[Path | None, typer.Option(help="YAML file of the teacher's recipe.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train the teacher on Emoji-8: autoencoder, denoiser, the decoder once more. Takes hours on a CPU."""
    from fewstep_worlds.emoji8 import api

    say(f"wrote {api.train_teacher(out=out, target=target, config=config, overrides=overrides or [])}")


@app.command()
def tlcm(
    table: Annotated[int, typer.Option(help="1: beside the teacher, LCM and TCD; 2: each ingredient; 3: p.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder, one for all tables; a stopped run goes on.")] = Path("runs/tables"),
    overrides: Overrides = None,
) -> None:
    """A table of the TLCM paper on the bundled world: its students, from prompts alone, and their figures. Takes hours.

    Example: fewstep tlcm --table 2 -s "seeds=[0]"
    """
    from fewstep_worlds.emoji8 import api

    path = api.tlcm(table=table, out=out, overrides=overrides or [])
    say(path.read_text(encoding="utf-8"))
    say(f"wrote {path}")


@app.command()
def versatility(
    out: Annotated[Path, typer.Option(help="Folder; a run that was stopped goes on.")] = Path("runs/versatility"),
    overrides: Overrides = None,
) -> None:
    """A community checkpoint, a style LoRA, ControlNets, an IP-Adapter, img2img, inpainting: what do students keep?

    Each add-on is made on the base, and then used with students that never saw it. Takes hours on a CPU.

    Example: fewstep versatility -s tlcm=runs/tlcm/student
    """
    from fewstep_worlds.emoji8 import api

    path = api.versatility(out=out, overrides=overrides or [])
    say(path.read_text(encoding="utf-8"))
    say(f"wrote {path}, cells.json and figure.webp beside it")


@app.command()
def chinese(
    out: Annotated[Path, typer.Option(help="Folder; a run that was stopped goes on.")] = Path("runs/chinese"),
    overrides: Overrides = None,
) -> None:
    """Concepts whose Chinese the adapter never saw, asked for in Chinese and in English, by student and teacher.

    Example: fewstep chinese -s lora=runs/tlcm/student -s steps=3
    """
    from fewstep_worlds.emoji8 import api

    path = api.chinese(out=out, overrides=overrides or [])
    say(path.read_text(encoding="utf-8"))
    say(f"wrote {path}, chinese.json and chinese.webp beside it")
