"""The `fewstep` command: its verbs in groups, and how it ends.

Everything heavy is imported inside the verbs, so that help and refusals are quick.
"""

from __future__ import annotations

from fewstep.training import stopping

BEFORE_IMPORTS = stopping.install_handlers(stopping.end_at_once)
"""Handlers before the imports below, which take half a second."""

import os
import signal
import sys
from importlib import metadata

from cyclopts import App, CycloptsError, Group, Parameter

from fewstep.commands.distill import distill, ending, estimate
from fewstep.commands.draw_folder import draw_folder
from fewstep.commands.evaluate import evaluate
from fewstep.commands.evaluate import report as measured
from fewstep.commands.export import export_as
from fewstep.commands.export import report as exported
from fewstep.commands.init import init, next_steps
from fewstep.commands.recipes import recipes
from fewstep.commands.renamed import current
from fewstep.commands.report import report
from fewstep.commands.sample import sample
from fewstep.commands.synthesize import synthesis_cost, synthesize
from fewstep.commands.train_adapter import train_adapter
from fewstep.commands.train_latent_lpips import rank_correlations, train_latent_lpips
from fewstep.commands.train_style import style_cost, train_style
from fewstep.commands.verb import add, nothing, shown
from fewstep.commands.web_app import app as web_app
from fewstep.common import light_imports
from fewstep.common.defaults import installed_world
from fewstep.common.errors import UserError
from fewstep.common.files import os_reason
from fewstep.common.threads import limit_spinning

DISTIL, USE, EVALUATE, OTHER = (
    Group(title, sort_key=place) for place, title in enumerate(("Distil", "Use", "Evaluate", "Data and other"))
)
"""Headings of the command's help."""
app = App(
    "fewstep",
    help="Distil a text-to-image diffusion model into one that needs 2 to 8 network evaluations; sample, measure it."
    '\n\nExample: fewstep sample "three frogs on yellow" --out frogs.png\n\n'
    "Example: fewstep init --model sdxl --memory 24 --teacher PIPELINE --pictures pictures/",
    help_format="plaintext",
    version=lambda: metadata.version("fewstep"),
    group_commands=OTHER,
    default_parameter=Parameter(allow_repeating=True),  # the last one counts; values of --set add up
    suppress_keyboard_interrupt=False,
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)
add(app, init, DISTIL, show=next_steps)
add(app, distill, DISTIL, show=ending, estimate=estimate)
add(app, synthesize, DISTIL, estimate=synthesis_cost)
add(app, train_latent_lpips, DISTIL, show=rank_correlations)
add(app, train_adapter, DISTIL)
add(app, train_style, DISTIL, estimate=style_cost)
add(app, sample, USE)
add(app, web_app, USE, show=nothing)
add(app, export_as, USE, name="export", show=exported)
add(app, evaluate, EVALUATE, show=measured)
add(app, draw_folder, EVALUATE)
add(app, report, EVALUATE)
add(app, recipes, OTHER, show=shown)
app.register_install_completion_command(group=OTHER, help="Install completion of verbs and options in this shell.")
bundled = installed_world()
studies = App("world", help="Studies and trainings of the bundled world.", group=OTHER, group_commands="Commands")
if bundled is not None:
    bundled.add_commands(app, studies)
    app.command(studies)


def one_line(error: object) -> str:
    """Return an error's message as one line."""
    return " ".join(str(error).split())


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of too little GPU or main memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def machine_error(error: Exception) -> str:
    """Return a line for an error of the machine: too little memory, a disk that is full or disconnected.

    Raises:
        Exception: `error`, if it is another one.
    """
    if out_of_memory(error):
        remedy = "free some, or, to distil, run again with a larger loop.accumulate or student.checkpointing=true"
        return f"out of memory ({one_line(error)[:200]}); {remedy}"
    reason = os_reason(error)
    if reason is None:
        raise error
    file = getattr(error, "filename", None)
    return f"{f'{file}: ' if file else ''}{reason}; complete files were kept"


def stopped(error: KeyboardInterrupt) -> str:
    """Return a line for work that a signal stopped, naming the folder that it can be resumed from, if there is one."""
    if str(error):
        return str(error)
    return "; ".join(["stopped", *getattr(error, "__notes__", [])[:1]])


def run(arguments: list[str]) -> None:
    """Parse a command line and run its verb.

    Raises:
        UserError: an unknown verb or option, or any error of the verb.
    """
    try:
        app(current(arguments, [name for name in studies if not name.startswith("-")]))
    except CycloptsError as error:
        field = error.argument.name.lstrip("-") if error.argument else ""
        raise UserError(f"{one_line(error)} (see --help)", field=field.replace("-", "_")) from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command: a UserError is one line and exit code 2, a signal one line and 128 + its number."""
    light_imports.in_command = arguments is None
    try:
        with stopping.stoppable():
            _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        if arguments is None:  # a signal while the interpreter ends leaves no traceback
            stopping.install_handlers(signal.SIG_DFL)


def _main(arguments: list[str]) -> None:
    limit_spinning()
    try:
        run(arguments)
        sys.exit(0)
    except UserError as error:
        print(f"fewstep: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fewstep: {stopped(error)}", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the interpreter's last flush)
        sys.exit(1)
    except Exception as error:
        print(f"fewstep: {machine_error(error)}", file=sys.stderr)
        sys.exit(2)


stopping.restore_handlers(BEFORE_IMPORTS)

if __name__ == "__main__":
    main()
