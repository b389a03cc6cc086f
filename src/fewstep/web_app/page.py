"""The page: live typing, the teacher beside the student, sheets, a run that trains, a gallery."""

from __future__ import annotations

import html
import json
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from fewstep.common.config import as_pair
from fewstep.common.errors import UserError
from fewstep.inference.image_grid import labelled_grid, save_image
from fewstep.inference.picture_files import next_number, numbered
from fewstep.students.resolve import AUTO, NONE, teacher_sampling
from fewstep.training.run_log import read_run
from fewstep.web_app.models import Drawn, Models, Request
from fewstep.web_app.snippets import as_code, as_command

CSS = """
.gradio-container {max-width: 1400px !important}
.picture img {width: 100% !important; height: 100% !important; object-fit: contain; image-rendering: pixelated}
.line {min-height: 1.5em; font-variant-numeric: tabular-nums}
.line p {margin: 0}
.error {color: #dc2626}
"""
COPY = "(text) => {navigator.clipboard?.writeText(text)}"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none fetched
SHOWN = 60
"""Pictures of the gallery."""
TILE = 192
"""Largest side of a picture in a sheet, in pixels."""
STEPS, GAMMAS = [1, 2, 3, 4, 6, 8], [0.0, 0.2, 0.3, 0.5, 0.8, 1.0]
"""What a sheet offers."""


class SupersededError(Exception):
    """A newer drawing has begun."""


@dataclass
class Session:
    """One visitor: the number of drawings that were begun, and the last picture."""

    number: int = 0
    drawn: Drawn | None = None


def line(text: str, kind: str = "") -> str:
    """Return a line of HTML of any text."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def guarded(outputs: int, work: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """Return a handler that shows an error in its last output and leaves the others as they are.

    Args:
        outputs: number of outputs.
        work: returns a tuple of them, or yields several.
    """

    def run(*arguments: Any) -> Iterator[Any]:
        kept = [gr.skip()] * (outputs - 1)
        try:
            result = work(*arguments)
            yield from result if isinstance(result, Iterator) else [result]
        except SupersededError:
            yield (*kept, gr.skip())
        except UserError as error:
            yield (*kept, line(" ".join(str(error).split()), "error"))
        except Exception as error:  # the page goes on; the terminal gets the traceback
            traceback.print_exception(error, file=sys.stderr)
            yield (*kept, line(" ".join(f"{type(error).__name__}: {error}".split()), "error"))

    return run


def summary(drawn: Drawn) -> str:
    """Return what a picture took."""
    return f"{drawn.evaluations} network evaluations in {drawn.seconds:.2f} s"


class Page:
    """Handlers of the page, each for the values of its inputs; the last output is a line of text.

    Args:
        models: what is drawn with.
        kept: folder of the gallery.
    """

    def __init__(self, models: Models, kept: Path) -> None:
        self.models = models
        self.kept = kept

    def defaults(self, teacher: str, lora: str) -> tuple[Any, ...]:
        """Return menus and settings for a teacher and student, from the student's file."""
        folder = self.models.teacher(teacher)
        teachers, students, runs = self.models.folders.menus(folder)
        student, own, _ = self.models.student(folder, lora)
        if lora == AUTO:
            lora = student.path.name if student else NONE
        side, shown = folder.picture_size, teacher_sampling(folder)
        width, height = own.size or (side, side)
        sizes = [f"{width}x{height}", f"{side * 3 // 2}x{side}", f"{side}x{side * 3 // 2}"]
        kind = f"{student.record.get('method', 'unknown method')}" if student else "teacher"
        return (
            gr.update(choices=teachers),
            gr.update(choices=students, value=lora),
            gr.update(choices=students),
            gr.update(choices=runs),
            gr.update(value=own.steps, minimum=own.calls_a_step, maximum=max(8, own.steps), step=own.calls_a_step),
            gr.update(value=own.gamma, interactive=own.sampler == "sss"),
            own.omega,
            gr.update(choices=sizes, value=sizes[0]),
            shown.steps,
            shown.omega,
            line(f"{kind}: {own.steps} steps by {own.sampler}, {width}x{height}"),
        )

    def request(self, *values: Any) -> Request:
        """Return a request by the values of `inputs`."""
        prompt, teacher, lora, seed, steps, gamma, omega, size = values
        folder = self.models.teacher(teacher)
        own = self.models.student(folder, lora).sampling
        pair = as_pair(size)
        if not isinstance(pair, tuple):
            raise UserError(f"size = {size!r} must be WIDTHxHEIGHT in pixels")
        side = folder.picture_size
        return Request(
            *(prompt, teacher, lora, int(seed or 0), int(steps)),
            gamma=float(gamma) if own.sampler == "sss" else None,
            omega=float(omega) if omega != own.omega else None,
            size=pair if pair != (own.size or (side, side)) else None,
        )

    def draw(self, session: Session, locked: bool, *values: Any) -> tuple[Any, ...]:
        """Draw what is typed now."""
        session.number += 1
        if not values[0].strip():
            return gr.skip(), gr.skip(), line("type a prompt")
        request = self.request(*values)
        if not locked:
            request = replace(request, seed=random.randrange(2**31))
        session.drawn = drawn = self.models.draw(request)
        return request.seed, drawn.picture, line(summary(drawn))

    def compare(self, session: Session, wanted: bool, steps: float, omega: float) -> tuple[Any, ...]:
        """Draw the teacher's picture of the same prompt and seed; stop where a newer drawing begins."""
        student, number = session.drawn, session.number
        if not wanted or student is None:
            return gr.skip(), line("")

        def check() -> None:
            if session.number != number:
                raise SupersededError

        request = replace(student.request, lora=NONE, steps=int(steps), gamma=None, omega=float(omega))
        teacher = self.models.draw(request, check)
        return (student.picture, teacher.picture), line(f"student: {summary(student)} | teacher: {summary(teacher)}")

    def sheet(self, steps: list[int], gammas: list[float], students: list[str], *values: Any) -> Iterator[Any]:
        """Draw a row for each student or gamma and a column for each number of steps, and show it row by row."""
        base = self.request(*values)
        changes: list[tuple[str, dict[str, Any]]] = [(f"gamma {gamma:g}", {"gamma": gamma}) for gamma in gammas]
        if students:
            changes = [(Path(name).name, {"lora": name, "gamma": None, "omega": None}) for name in students]
        done: list[tuple[str, np.ndarray]] = []
        for name, change in changes:
            row = [self.models.draw(replace(base, steps=count, **change)).picture for count in steps]
            for picture in row:
                picture.thumbnail((TILE, TILE))
            done.append((name, np.stack([np.asarray(picture) for picture in row])))
            grid = labelled_grid(done, [f"{count} steps" for count in steps], max(1, TILE // row[0].width))
            yield grid, line(f"{len(done)} of {len(changes)} rows")

    def watch(self, folder: str | None) -> tuple[Any, ...]:
        """Return curves, the newest grid and the state of a run."""
        if not folder:
            return (*[gr.skip()] * 3, line("choose a run folder"))
        run = read_run(Path(self.models.folders.check("run", folder)))
        curves = [pd.DataFrame(rows, columns=["step", "figure", "value"]) for rows in (run.losses, run.quality)]
        best = ", ".join(f"{name} {value:.4g}" for name, value in run.best.items())
        left = f", {run.rate:.2f} s a step" if run.rate else ""
        grid = Image.open(run.grid).convert("RGB") if run.grid else None
        return *curves, grid, line(f"step {run.step} of {run.steps}{left}" + (f"; best: {best}" if best else ""))

    def keep(self, session: Session) -> tuple[Any, ...]:
        """Write the picture with its settings into the gallery."""
        drawn = self.last(session)
        path = numbered(self.kept, next_number(self.kept), "png")
        save_image(drawn.picture, path, drawn.text)
        return self.gallery(), line(f"kept as {path}")

    def last(self, session: Session) -> Drawn:
        """Return the last picture.

        Raises:
            UserError: there is none.
        """
        if session.drawn is None:
            raise UserError("there is no picture yet; type a prompt", field="prompt")
        return session.drawn

    def gallery(self) -> list[str]:
        """Return the newest pictures of the gallery."""
        return [str(path) for path in sorted(self.kept.glob("*.png"), reverse=True)[:SHOWN]]

    def restore(self, event: gr.SelectData) -> tuple[Any, ...]:
        """Return the settings inside a picture of the gallery."""
        with Image.open(self.kept / Path(event.value["image"]["path"]).name) as picture:
            found = json.loads(picture.text["fewstep"])  # type: ignore[attr-defined]
        sampling, size = found["sampling"], "{}x{}".format(*found["size"])
        values = found["prompt"], found["seed"], sampling["steps"], sampling["gamma"], sampling["omega"], size
        return *values, line(f"{found['prompt']} | {found['student'] or 'no student'} on {found['teacher']}")

    def copy(self, as_text: Callable[[Models, Request], str], session: Session) -> tuple[Any, ...]:
        """Return the last picture as text."""
        text = as_text(self.models, self.last(session).request)
        return gr.update(value=text, visible=True), line("copied")


def build(models: Models, kept: Path, teacher: str, lora: str, prompt: str) -> gr.Blocks:
    """Return the page.

    Args:
        models: what is drawn with.
        kept: folder of the gallery.
        teacher, lora, prompt: the first ones.
    """
    page = Page(models, kept)
    named: dict[str, Any] = {"allow_custom_value": True, "filterable": True}
    text_line: dict[str, Any] = {"elem_classes": "line", "padding": False}
    shown: dict[str, Any] = {"format": "png", "interactive": False}
    with gr.Blocks(title="fewstep", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        session = gr.State(Session())
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                text = gr.Textbox(prompt, label="prompt", lines=2, autofocus=True, elem_id="prompt")
                base = gr.Dropdown(
                    [(teacher or "bundled teacher", teacher)],
                    value=teacher,
                    label="teacher",
                    elem_id="teacher",
                    **named,
                )
                student = gr.Dropdown([lora], value=lora, label="student", elem_id="student", **named)
                about = gr.HTML(elem_id="about", **text_line)
                steps = gr.Slider(1, 8, 4, step=1, label="steps", elem_id="steps", buttons=[])
                gamma = gr.Slider(0, 1, 0.3, step=0.05, label="gamma", elem_id="gamma", buttons=[])
                omega = gr.Slider(0, 15, 0, step=0.5, label="guidance (omega)", buttons=[])
                with gr.Row():
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=100, elem_id="seed")
                    size = gr.Dropdown(label="size", min_width=120, elem_id="size", **named)
                lock = gr.Checkbox(True, label="keep the seed", elem_id="lock")
            with gr.Column(scale=5), gr.Tabs() as tabs:
                with gr.Tab("Draw"):
                    with gr.Row():
                        picture = gr.Image(
                            label="picture", height=480, elem_classes="picture", elem_id="picture", **shown
                        )
                        pair = gr.ImageSlider(
                            label="student | teacher",
                            max_height=480,
                            visible=False,
                            elem_classes="picture",
                            elem_id="pair",
                            **shown,
                        )
                    status = gr.HTML(elem_id="status", **text_line)
                    beside = gr.Checkbox(label="teacher beside student", elem_id="beside", container=False)
                    with gr.Group(visible=False) as own:
                        with gr.Row():
                            more = gr.Slider(1, 50, 25, step=1, label="the teacher's steps", elem_id="more", buttons=[])
                            strong = gr.Slider(0, 15, 2.5, step=0.5, label="the teacher's guidance (omega)", buttons=[])
                        times = gr.HTML(elem_id="times", elem_classes="line")
                    with gr.Row():
                        again = gr.Button("new seed", elem_id="again")
                        keep = gr.Button("keep in gallery", elem_id="keep")
                        command = gr.Button("copy as command", elem_id="command")
                        code = gr.Button("copy as diffusers code", elem_id="code")
                    copied = gr.Code(label="copied", visible=False, interactive=False, elem_id="copied")
                with gr.Tab("Sheet"):
                    columns = gr.CheckboxGroup(STEPS, value=[1, 2, 4, 8], label="steps")
                    rows = gr.CheckboxGroup(GAMMAS, value=[0.0, 0.3, 1.0], label="gamma")
                    several = gr.Dropdown(label="or several students, one a row", multiselect=True, elem_id="several")
                    start = gr.Button("draw the sheet", elem_id="sheet")
                    progress = gr.HTML(elem_id="progress", **text_line)
                    tiles = gr.Image(label="sheet", elem_id="tiles", **shown)
                with gr.Tab("Run"):
                    run = gr.Dropdown(label="run folder", elem_id="run", **named)
                    state = gr.HTML(elem_id="state", **text_line)
                    with gr.Row():
                        loss = gr.LinePlot(x="step", y="value", color="figure", title="loss", height=260)
                        quality = gr.LinePlot(x="step", y="value", color="figure", title="quality", height=260)
                    grid = gr.Image(label="newest grid", elem_id="grid", **shown)
                    timer = gr.Timer(2, active=False)
                with gr.Tab("Gallery"):
                    pictures = gr.Gallery(
                        page.gallery, label=str(kept), columns=6, elem_id="gallery", interactive=False
                    )
                    inside = gr.HTML(elem_id="inside", **text_line)
        inputs = [text, base, student, seed, steps, gamma, omega, size]
        few: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        drawing: dict[str, Any] = {**few, "inputs": [session, lock, *inputs], "outputs": [seed, picture, status]}
        comparing: dict[str, Any] = {**few, "inputs": [session, beside, more, strong], "outputs": [pair, times]}
        draw, compare = guarded(3, page.draw), guarded(2, page.compare)
        typed = [each.input for each in (text, seed, steps, gamma, omega, size)]
        gr.on(typed, draw, trigger_mode="always_last", **drawing).then(compare, **comparing)
        renewed = {**drawing, "inputs": [session, gr.State(False), *inputs]}
        again.click(draw, **renewed).then(compare, **comparing)
        beside.change(lambda on: [gr.update(visible=on)] * 2, beside, [pair, own], **few)
        gr.on([beside.input, more.input, strong.input], compare, trigger_mode="always_last", **comparing)
        settings = [base, student, several, run, steps, gamma, omega, size, more, strong, about]
        for trigger in (blocks.load, base.input, student.input):
            chosen = trigger(guarded(len(settings), page.defaults), [base, student], settings, **few)
            chosen.then(draw, **drawing).then(compare, **comparing)
        start.click(guarded(2, page.sheet), [columns, rows, several, *inputs], [tiles, progress], **few)
        watched: dict[str, Any] = {**few, "inputs": run, "outputs": [loss, quality, grid, state]}
        gr.on([timer.tick, run.input], guarded(4, page.watch), **watched)
        tabs.select(watching, None, timer, **few)
        keep.click(guarded(2, page.keep), session, [pictures, status], **few)
        restored = [text, seed, steps, gamma, omega, size, inside]
        pictures.select(guarded(7, page.restore), None, restored, **few).then(draw, **drawing)
        for button, as_text in ((command, as_command), (code, as_code)):
            show = guarded(2, partial(page.copy, as_text))
            button.click(show, session, [copied, status], **few).then(None, copied, js=COPY)
    return blocks


def watching(event: gr.SelectData) -> gr.Timer:
    """Run the timer while the tab of runs is open."""
    return gr.Timer(active=event.value == "Run")
