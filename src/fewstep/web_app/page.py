"""The page: live typing, the teacher beside the student, sheets, a run that trains, a gallery."""

from __future__ import annotations

import html
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from fewstep.common.config import as_pair
from fewstep.common.errors import UserError
from fewstep.common.run_log import read_run
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.inference.picture_files import next_number, numbered, read_settings
from fewstep.students.resolve import AUTO, NONE, teacher_sampling
from fewstep.web_app.models import Drawn, Models, Request

CSS = """
.gradio-container {max-width: 1400px !important}
.picture img {width: 100%; object-fit: contain} #picture img {height: 440px}
.line {min-height: 1.5em; font-variant-numeric: tabular-nums} .line p {margin: 0} .line .error {color: #dc2626}
"""
COPY = "(text) => {navigator.clipboard?.writeText(text)}"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none fetched
SHOWN = 60
"""Pictures of the gallery."""
TILE = 192, 192
"""Pixels that hold a picture of a sheet."""
STEPS, GAMMAS = [1, 2, 3, 4, 6, 8], [0.0, 0.2, 0.3, 0.5, 0.8, 1.0]
"""What a sheet offers."""


@dataclass
class Session:
    """One visitor: the number of drawings that were begun, and the last picture."""

    number: int = 0
    drawn: Drawn | None = None

    @property
    def last(self) -> Drawn:
        """The last picture.

        Raises:
            UserError: there is none.
        """
        if self.drawn is None:
            raise UserError("prompt is empty; type one", field="prompt")
        return self.drawn


def line(text: str, kind: str = "") -> str:
    """Return a line of HTML of any text."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def guarded(outputs: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler that shows an error in the last of its outputs and leaves the others as they are."""

    def failed(error: Exception) -> tuple[Any, ...]:
        if isinstance(error, InterruptedError):  # by a newer drawing
            return (gr.skip(),) * outputs
        if not isinstance(error, UserError):  # the page goes on; the terminal gets the traceback
            traceback.print_exception(error, file=sys.stderr)
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return (*(gr.skip(),) * (outputs - 1), line(" ".join(f"{name}{error}".split()), "error"))

    @wraps(work)  # gradio reads the arguments
    def run(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except Exception as error:
            return failed(error)

    @wraps(work)
    def stream(*arguments: Any) -> Iterator[Any]:
        try:
            yield from work(*arguments)
        except Exception as error:
            yield failed(error)

    return stream if isgeneratorfunction(work) else run


def summary(drawn: Drawn) -> str:
    """Return what a picture took."""
    return f"{drawn.evaluations} network evaluation{'s' * (drawn.evaluations > 1)} in {drawn.seconds:.2f} s"


@dataclass(frozen=True)
class Page:
    """Handlers of the page, each for the values of its inputs; the last output is a line of text.

    Attributes:
        models: what is drawn with.
        kept: folder of the gallery.
    """

    models: Models
    kept: Path

    def defaults(self, teacher: str, lora: str = AUTO) -> tuple[Any, ...]:
        """Return menus and settings for a teacher and student, from the student's file."""
        folder = self.models.teacher(teacher)
        teachers, students, runs = self.models.menus(folder)
        student, own, _ = self.models.student(folder, lora)
        side, teachers_own = folder.picture_size, teacher_sampling(folder)
        width, height = own.size or (side, side)
        sizes = [f"{width}x{height}", f"{side * 3 // 2}x{side}", f"{side}x{side * 3 // 2}"]
        value = (student.path.name if student else NONE) if lora == AUTO else lora
        kind = student.record.get("method", "a student of another tool") if student else "the teacher itself"
        menus = [gr.update(choices=each) for each in (teachers, students, students, runs)]
        steps = gr.update(value=own.steps, minimum=own.calls_a_step, maximum=max(8, own.steps), step=own.calls_a_step)
        gamma = gr.update(value=own.gamma, interactive=own.sampler == "sss")
        settings = [steps, gamma, own.omega, gr.update(choices=sizes, value=sizes[0])]
        about = line(f"{kind}: {own.steps} steps by {own.sampler}, {sizes[0]}")
        menus[1]["value"] = value
        return *menus, *settings, teachers_own.steps, teachers_own.omega, about

    def request(self, *values: Any) -> Request:
        """Return a request by the values of `inputs`."""
        prompt, teacher, lora, seed, steps, gamma, omega, size, negative = values
        folder = self.models.teacher(teacher)
        own = self.models.student(folder, lora).sampling
        pair = as_pair(size)
        if not isinstance(pair, tuple):
            raise UserError(f"size = {size!r} must be WIDTHxHEIGHT in pixels")
        changed = None if pair == (own.size or (folder.picture_size, folder.picture_size)) else pair
        gamma, omega = gamma if own.sampler == "sss" else None, omega if omega != own.omega else None
        return Request(prompt, teacher, lora, int(seed or 0), int(steps), gamma, omega, changed, negative.strip())

    def draw(self, session: Session, locked: bool, *values: Any) -> tuple[Any, ...]:
        """Draw what is typed now."""
        session.number += 1
        if not values[0].strip():
            return gr.skip(), line("type a prompt")
        request = self.request(*values)
        if not locked:
            request = replace(request, seed=random.randrange(2**31))
        session.drawn = drawn = self.models.draw(request)
        # the seed is no output: it would overwrite what is typed there meanwhile
        return drawn.picture, line(f"{summary(drawn)}, seed {request.seed}")

    def compare(self, session: Session, wanted: bool, steps: float, omega: float) -> tuple[Any, ...]:
        """Draw the teacher's picture of the same prompt and seed; stop where a newer drawing begins."""
        student, number = session.drawn, session.number
        if not wanted or student is None:
            return gr.skip(), line("")

        def check() -> None:
            if session.number != number:
                raise InterruptedError

        request = replace(student.request, lora=NONE, steps=int(steps), gamma=None, omega=omega)
        teacher = self.models.draw(request, check)
        return (student.picture, teacher.picture), line(f"student: {summary(student)} | teacher: {summary(teacher)}")

    def sheet(self, steps: list[int], gammas: list[float], students: list[str], *values: Any) -> Iterator[Any]:
        """Draw a row for each student or gamma and a column for each number of steps, and show it row by row."""
        base = self.request(*values)
        changes: list[tuple[str, dict[str, Any]]] = [(f"gamma {gamma:g}", {"gamma": gamma}) for gamma in gammas]
        if students:
            changes = [(Path(name).name, {"lora": name, "gamma": None, "omega": None}) for name in students]
        heads = [f"{count} step{'s' * (count > 1)}" for count in steps]
        done: list[tuple[str, np.ndarray]] = []
        if not steps or not changes:
            raise UserError("choose steps, and gammas or students")
        for name, change in changes:
            row = [self.models.draw(replace(base, steps=count, **change)).picture for count in steps]
            done.append((name, np.stack([np.asarray(ImageOps.contain(each, TILE)) for each in row])))
            yield labelled_grid(done, heads, 1), line(f"{len(done)} of {len(changes)} rows")

    def watch(self, folder: str | None) -> tuple[Any, ...]:
        """Return curves, the newest grid and the state of a run."""
        if not folder:
            return *[gr.skip()] * 4, line("choose a run folder")
        run = read_run(Path(self.models.check("run", folder)))
        names = [*dict.fromkeys(name for _, name, _ in run.quality), "quality", "quality"][:2]
        parts = [("loss", run.losses), *((name, [row for row in run.quality if row[1] == name]) for name in names)]
        heads = ["step", "figure", "value"]
        plots = [gr.update(value=pd.DataFrame(rows, columns=heads), title=name) for name, rows in parts]
        grid = Image.open(run.grid).convert("RGB") if run.grid else None
        return *plots, grid, line(run.state)

    def keep(self, session: Session) -> tuple[Any, ...]:
        """Write the picture with its settings into the gallery."""
        path = numbered(self.kept, next_number(self.kept), "png")
        save_image(session.last.picture, path, session.last.text)
        return self.gallery(), line(f"kept as {path}")

    def gallery(self) -> list[str]:
        """Return the newest pictures of the gallery."""
        return [str(path) for path in sorted(self.kept.glob("*.png"), reverse=True)[:SHOWN]]

    def restore(self, event: gr.SelectData) -> tuple[Any, ...]:
        """Return the settings inside a picture of the gallery."""
        found = read_settings(self.kept / Path(event.value["image"]["path"]).name)
        own, size = found["sampling"], "{}x{}".format(*found["size"])
        about = f"{found['prompt']} | {found['student'] or 'no student'} on {found['teacher']}"
        words = found["prompt"], found.get("negative_prompt", "")
        return *words, found["seed"], own["steps"], own["gamma"], own["omega"], size, line(about)

    def copy(self, form: int, session: Session) -> tuple[Any, ...]:
        """Return the last picture as a command (0) or as code (1)."""
        return gr.update(value=self.models.as_text(session.last.request)[form], visible=True), line("copied")


def watching(event: gr.SelectData) -> Any:
    """Run the timer while the tab of runs is open."""
    return gr.Timer(active=event.value == "Run")


def build(models: Models, kept: Path, teacher: str, lora: str, prompt: str) -> gr.Blocks:
    """Return the page.

    Args:
        models: what is drawn with.
        kept: folder of the gallery.
        teacher, lora, prompt: the first ones.
    """
    page = Page(models, kept)
    slider = partial(gr.Slider, buttons=[])
    menu = partial(gr.Dropdown, allow_custom_value=True)
    words = partial(gr.HTML, elem_classes="line", padding=False)
    image = partial(gr.Image, format="png", interactive=False, show_label=False, buttons=["download", "fullscreen"])
    button = partial(gr.Button, size="md", min_width=120)
    plot = partial(gr.LinePlot, x="step", y="value", color="figure", height=240, show_label=False)
    with gr.Blocks(title="fewstep", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        session = gr.State(Session())
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                text = gr.Textbox(prompt, label="prompt", lines=2, autofocus=True, elem_id="prompt")
                negative = gr.Textbox("", label="negative prompt", elem_id="negative")
                first = [(teacher or "bundled teacher", teacher)]
                base = menu(first, value=teacher, label="teacher", elem_id="teacher")
                student = menu([lora], value=lora, label="student", elem_id="student")
                about = words(elem_id="about")
                steps = slider(1, 8, 4, step=1, label="steps", elem_id="steps")
                gamma = slider(0, 1, 0.3, step=0.05, label="gamma", elem_id="gamma")
                omega = slider(0, 15, 0, step=0.5, label="guidance (omega)", elem_id="omega")
                with gr.Row():
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=100, elem_id="seed")
                    size = menu(label="size", min_width=120, elem_id="size")
                lock = gr.Checkbox(True, label="keep the seed", elem_id="lock")
            with gr.Column(scale=5), gr.Tabs() as tabs:
                with gr.Tab("Draw"):
                    with gr.Row():
                        picture = image(elem_classes="picture", elem_id="picture")
                        pair = gr.ImageSlider(label="student | teacher", format="png", visible=False, elem_id="pair")
                    status = words(elem_id="status")
                    beside = gr.Checkbox(label="teacher beside student", container=False, elem_id="beside")
                    with gr.Column(visible=False) as own:
                        with gr.Row():
                            more = slider(1, 50, 25, step=1, label="the teacher's steps", elem_id="more")
                            strong = slider(0, 15, 2.5, step=0.5, label="the teacher's guidance (omega)")
                        times = words(elem_id="times")
                    with gr.Row():
                        again, keep = button("new seed", elem_id="again"), button("keep in gallery", elem_id="keep")
                        command = button("copy as command", elem_id="command")
                        code = button("copy as diffusers code", elem_id="code")
                    copied = gr.Code(label="copied", visible=False, interactive=False, elem_id="copied")
                with gr.Tab("Sheet"):
                    columns = gr.CheckboxGroup(STEPS, value=[1, 2, 4, 8], label="steps")
                    rows = gr.CheckboxGroup(GAMMAS, value=[0.0, 0.3, 1.0], label="gamma, one a row")
                    several = gr.Dropdown(label="or students, one a row", multiselect=True, elem_id="several")
                    start = gr.Button("draw the sheet", elem_id="sheet")
                    progress = words(elem_id="progress")
                    tiles = image(elem_id="tiles")
                with gr.Tab("Run"):
                    run = menu(label="run folder", elem_id="run")
                    state = words(elem_id="state")
                    with gr.Row():
                        plots = [plot(min_width=200), plot(min_width=200), plot(min_width=200)]
                    grid = image(elem_id="grid")
                    timer = gr.Timer(2, active=False)
                with gr.Tab("Gallery"):
                    tiled: dict[str, Any] = {"columns": 6, "interactive": False, "buttons": ["download"]}
                    pictures = gr.Gallery(page.gallery, label=str(kept), elem_id="gallery", **tiled)
                    inside = words(elem_id="inside")
        inputs = [text, base, student, seed, steps, gamma, omega, size, negative]
        # gradio's own queue polls, a tenth of a second for each event; `models` has the one that counts
        few: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        newest: dict[str, Any] = {**few, "trigger_mode": "always_last"}
        draw, compare = guarded(2, page.draw), guarded(2, page.compare)
        drawn = [session, lock, *inputs], [picture, status]
        compared = [session, beside, more, strong], [pair, times]
        typed = [each.input for each in (text, negative, seed, steps, gamma, omega, size)]
        settings = [base, student, several, run, steps, gamma, omega, size, more, strong, about]
        restored = [text, negative, seed, steps, gamma, omega, size, inside]
        # another teacher begins with the student that fits it
        triggers = (blocks.load, [base, student]), (student.input, [base, student]), (base.input, base)
        defaults = guarded(len(settings), page.defaults)
        changing = [trigger(defaults, given, settings, **few) for trigger, given in triggers]
        changing.append(again.click(lambda: random.randrange(2**31), None, seed, **few))
        changing.append(pictures.select(guarded(len(restored), page.restore), None, restored, **few))
        for event in [gr.on(typed, draw, *drawn, **newest), *(each.then(draw, *drawn, **few) for each in changing)]:
            event.then(compare, *compared, **few)
        gr.on([beside.input, more.input, strong.input], compare, *compared, **newest)
        beside.change(lambda on: [gr.update(visible=on)] * 2, beside, [pair, own], **few)
        sheet = guarded(2, page.sheet)
        start.click(sheet, [columns, rows, several, *inputs], [tiles, progress], **few | {"queue": True})
        gr.on([timer.tick, run.input], guarded(5, page.watch), run, [*plots, grid, state], **few)
        tabs.select(watching, None, timer, **few)
        keep.click(guarded(2, page.keep), session, [pictures, status], **few)
        for form, copying in enumerate((command, code)):
            shown = copying.click(guarded(2, partial(page.copy, form)), session, [copied, status], **few)
            shown.then(None, copied, js=COPY)
    return blocks
