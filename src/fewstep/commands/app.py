"""The `fewstep` command: one verb each for what the library does, a thin layer over its functions.

Everything heavy is imported inside the verbs, so that help and refusals are quick.
"""

from __future__ import annotations

from fewstep.training import stopping

BEFORE_IMPORTS = stopping.install_handlers(stopping.end_at_once)
"""Handlers before the imports below, which take half a second."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from fewstep.commands.options import (
    Batch,
    Compiled,
    Configs,
    Device,
    DrawsIn,
    Lora,
    Omega,
    Overrides,
    Sampled,
    Teacher,
    app,
    drawing,
    echo_figures,
    say,
)
from fewstep.common.defaults import installed_world
from fewstep.common.errors import UserError
from fewstep.common.files import os_reason
from fewstep.common.threads import limit_spinning
from fewstep.evaluation.limits import FD_ADVISED


def settings_help(config: BaseModel, prefix: str = "") -> list[str]:
    """Every setting of a config with its value and meaning, a line each."""
    lines = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines += settings_help(value, f"{prefix}{name}.")
        else:
            lines.append(f"  {prefix}{name} = {value!r}: {field.description}")
    return lines


@app.command()
def recipes(settings: Annotated[bool, typer.Option(help="List every setting too.")] = False) -> None:
    """List the bundled recipes, and with --settings everything that a recipe or -s can set, verb by verb."""
    from fewstep.distillation.config import DistillConfig
    from fewstep.distillation.synthesis.settings import SynthesisConfig
    from fewstep.inference.multilingual.settings import AdapterConfig
    from fewstep.methods.latent_lpips.settings import LatentLpipsTrainConfig
    from fewstep.methods.recipes import names

    for name in names():
        typer.echo(name)
    if settings:
        typer.echo("\nsettings of distill (recipe < --config file < -s key=value):")
        typer.echo("\n".join(settings_help(DistillConfig())))
        verbs = {
            "synthesize": SynthesisConfig(),
            "train-perceptual": LatentLpipsTrainConfig(),
            "train-adapter": AdapterConfig(),
        }
        for verb, config in {**verbs, **(bundled.configs() if bundled else {})}.items():
            typer.echo(f"\nsettings of {verb} (-s key=value):")
            typer.echo("\n".join(settings_help(config)))


def split_configs(given: list[Path]) -> tuple[Path | None, Path | str]:
    """--config as given -> (YAML file, pipeline folder); each may be given once.

    Raises:
        UserError: two of one kind.
    """
    files, folders = ([path for path in given if path.is_dir() == kind] for kind in (False, True))
    for named in (files, folders):
        if named[1:]:
            raise UserError(f"config names {named[0]} and {named[1]}; the nearest is one YAML file and one folder")
    return (files[0] if files else None), (folders[0] if folders else "")


@app.command()
def distill(
    recipe: Annotated[str, typer.Option(help="Bundled recipe (see `fewstep recipes`) or a YAML file.")] = "tcd",
    out: Annotated[
        Path | None, typer.Option(help="Run folder, runs/<recipe> if left out; a stopped run is resumed from it.")
    ] = None,
    teacher: Teacher = "",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line: for recipes that need no pictures (tlcm).")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML file laid over the recipe; a pipeline folder is for a single-file teacher's configs."),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Say what it will take, and stop.")] = False,
) -> None:
    """Distil a teacher into a few-step student.

    Example, on the bundled teacher under the law of its own students:
    fewstep distill --recipe tcd --config world/distill.yaml --out runs/tcd -s loop.steps=300 -s optim.lr=1e-3

    Writes into the run folder: config.yaml (resolved), log.jsonl, tensorboard/, checkpoints/, grids/, best/ and
    student/ (the LoRA to use). `fewstep recipes --settings` lists everything that -s can set.
    """
    from fewstep.commands import distill as api

    place = out or Path("runs") / Path(recipe).stem
    words = [*([f"data.source={prompts}"] if prompts else []), *(overrides or [])]
    law, configs = split_configs(config or [])
    asked: dict[str, Any] = {"out": place, "teacher": teacher, "config": law, "overrides": words}
    if dry_run:
        taken = api.estimate(recipe, **asked, teacher_config=configs)
        say("\n".join(line for stage in taken for line in stage.lines()))
        return
    say(f"wrote {api.distill(recipe, **asked, teacher_config=configs)}")


@app.command()
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help='Prompts, e.g. "a doggy, fluent 3d style".')] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    lora: Lora = "auto",
    teacher: Teacher = "",
    steps: Annotated[int | None, typer.Option(help="Network calls a picture.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Stochasticity of TCD sampling, 0 to 1.")] = None,
    omega: Omega = None,
    sampler: Annotated[
        str | None, typer.Option(help="sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    count: Annotated[int, typer.Option(help="Pictures a prompt.")] = 1,
    out: Annotated[Path, typer.Option(help="Picture to write: one picture, or a sheet of them (.png, .webp).")] = Path(
        "sample.png"
    ),
    scale: Annotated[
        int | None, typer.Option(help="Whole factor of enlargement; left out, small pictures get 256 pixels.")
    ] = None,
    device: Device = "auto",
    precision: DrawsIn = "fp32",
    compiled: Compiled = False,
    batch: Batch = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder that train-adapter wrote: prompts of any of its languages.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to begin from, instead of noise.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far it is noised first, 0 to 1 (.5); all --steps are made below.")
    ] = None,
    overrides: Sampled = None,
    config: Configs = None,
) -> None:
    """Draw pictures from prompts, with the settings that the student brings along.

    Examples: fewstep sample "a doggy, fluent 3d style" --steps 4 --out doggy.png
    fewstep sample "a doggy, noto style" --image doggy.png --strength 0.7 --out noto.png
    """
    from fewstep.commands import sample as api

    path = api.sample(
        prompts or [],
        prompt_file=prompt_file,
        lora=lora,
        teacher=teacher,
        seed=seed,
        count=count,
        out=out,
        scale=scale,
        device=device,
        precision=precision,
        compile=compiled,
        batch=batch,
        settings=drawing(overrides, steps=steps, gamma=gamma, omega=omega, sampler=sampler),
        adapter=adapter,
        teacher_config=config or "",
        image=image,
        strength=strength,
    )
    say(f"wrote {path}")


@app.command()
def evaluate(
    prompt_file: Annotated[Path, typer.Option(help="Text file, one prompt a line (at least 500 for FD).")],
    lora: Lora = "auto",
    teacher: Teacher = "",
    real: Annotated[Path | None, typer.Option(help="Folder of real pictures; empty for Emoji-8.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Pipeline whose 50-step pictures are compared with; empty for a LoRA's teacher.")
    ] = None,
    reference_omega: Annotated[
        float | None, typer.Option(help="Its guidance; empty for the mean that the student was trained with.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Network calls a picture.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Stochasticity of TCD sampling, 0 to 1.")] = None,
    omega: Omega = None,
    sampler: Annotated[
        str | None, typer.Option(help="sss, lcm, ddim, euler, heun, dpm_2, dpmpp_2s or sde_dpmpp_2m.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    device: Device = "auto",
    precision: DrawsIn = "fp32",
    compiled: Compiled = False,
    batch: Batch = None,
    overrides: Sampled = None,
    out: Annotated[Path, typer.Option(help="Folder for figures.json.")] = Path("runs/evaluation"),
    config: Configs = None,
) -> None:
    """Measure a student or a teacher: FD, KID, detail, distance to the teacher; on Emoji-8 prompt agreement too.

    Example: fewstep evaluate --prompt-file prompts.txt --lora runs/tcd/student --steps 4
    """
    from fewstep.commands import evaluate as api

    figures = api.evaluate(
        prompt_file=prompt_file,
        out=out,
        lora=lora,
        teacher=teacher,
        real=real,
        reference=reference,
        reference_omega=reference_omega,
        seed=seed,
        device=device,
        precision=precision,
        compile=compiled,
        batch=batch,
        settings=drawing(overrides, steps=steps, gamma=gamma, omega=omega, sampler=sampler),
        teacher_config=config or "",
    )
    if not figures:  # another process of this launch has them
        return
    echo_figures(figures)
    fd = figures.get("FD-Lite0")
    if fd is None:
        say("FD-Lite0: left out, below 500 pictures on either side it would measure its own bias")
    elif fd.n < FD_ADVISED:
        say(f"FD-Lite0: below {FD_ADVISED} pictures its own bias shows; compare it at equal numbers only")
    if real is not None:
        say("agreement: left out, its scorer knows Emoji-8's drawings alone")
    if all(figure.floor is None or figure.is_of("quality", "teacher") for figure in figures.values()):
        say("floors: left out, they take more than twice as many real pictures as there are prompts")
    say(f"wrote {out / 'figures.json'}")


import fewstep.commands.tools  # noqa: F401  (adds its verbs)

bundled = installed_world()
if bundled is not None:
    bundled.add_commands(app)  # after this module's own verbs, so that help lists them last


def one_line(error: object) -> str:
    """An error as one line."""
    return " ".join(str(error).split())


def out_of_memory(error: BaseException) -> bool:
    """Whether a network or its data did not fit, on a GPU or in main memory."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "can't allocate memory" in told


def as_line(error: Exception) -> str:
    """A line for an error that a machine raises: too little memory, a disk that is full or has gone away.

    Raises:
        Exception: it is another one.
    """
    if out_of_memory(error):
        advice = "leave it more, or, to distil, run again with a larger loop.accumulate or student.checkpointing=true"
        return f"out of memory ({one_line(error)[:200]}); {advice}"
    reason = os_reason(error)
    if reason is None:
        raise error
    file = getattr(error, "filename", None)
    return f"{f'{file}: ' if file else ''}{reason}; what is whole was kept"


def stopped(error: KeyboardInterrupt) -> str:
    """A line for work that a signal has stopped: it can only go on where its folder was kept."""
    kept = str(error) or next(iter(getattr(error, "__notes__", [])), "")
    return f"fewstep: {kept if str(error) else '; '.join(filter(None, ['stopped', kept]))}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command; user errors are one line and exit code 2, signals one line and 128 + their number."""
    try:
        with stopping.stoppable():
            _main(arguments)
    finally:
        if arguments is None:  # a signal while the interpreter ends leaves no traceback
            stopping.install_handlers(signal.SIG_DFL)


def _main(arguments: list[str] | None) -> None:
    limit_spinning()
    usage_error: Any = typer.BadParameter.__mro__[2]  # click's base error, of the click that typer carries
    try:
        command: Any = typer.main.get_command(app)
        # not through its own main, which forgets why it was interrupted
        with command.make_context("fewstep", sys.argv[1:] if arguments is None else list(arguments)) as context:
            command.invoke(context)
        sys.exit(0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except UserError as error:
        print(f"fewstep: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `fewstep` alone
            print(error.format_message())
            sys.exit(0)
        print(f"fewstep: {one_line(error.format_message())} (see --help)", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            print(stopped(error) if isinstance(error, KeyboardInterrupt) else "fewstep: stopped", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))
    except BrokenPipeError:  # a reader that has read enough, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the interpreter's last flush)
        sys.exit(1)
    except Exception as error:
        print(f"fewstep: {as_line(error)}", file=sys.stderr)
        sys.exit(2)


stopping.restore_handlers(BEFORE_IMPORTS)

if __name__ == "__main__":
    main()
