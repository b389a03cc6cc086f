"""A page of several runs: the same prompts and noise by their students and their teacher, and what the runs logged."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.config import validate
from fewstep.common.files import read_json, write_text
from fewstep.common.messages import Bar
from fewstep.common.run_log import Run
from fewstep.diffusion.config import Sampling
from fewstep.inference.generator import load_image_generator
from fewstep.students.lora_header import LoraHeader
from fewstep.students.resolve import end_point_sampling

WIDEST = 256
"""Pixels a side of the page's pictures, at most."""
STYLE = """
:root { color-scheme: light dark; }
body { margin: 1.25rem; font: 16px/1.5 system-ui, "Noto Sans", sans-serif; }
table { border-collapse: collapse; margin: .75rem 0 2rem; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px 3px 0; text-align: left; vertical-align: top; font-weight: 400; }
thead th { font-weight: 600; } small { display: block; font-weight: 400; opacity: .7; }
.pictures th { max-width: 9rem; } img { display: block; border-radius: 5px; }
"""


@dataclass(frozen=True)
class Shown:
    """A run with its student.

    Attributes:
        base: pipeline that the student is drawn with: the teacher, or the student's own.
        lora: None for a whole pipeline.
        omega: mean guidance of the training; None if not recorded.
    """

    run: Run
    teacher: PipelineFolder
    base: PipelineFolder
    lora: LoraHeader | None
    sampling: Sampling
    omega: float | None

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.run.folder.absolute().name


@dataclass(frozen=True)
class Column:
    """A network whose pictures are a column."""

    name: str
    folder: PipelineFolder
    lora: LoraHeader | None
    sampling: Sampling

    @property
    def evaluations(self) -> int:
        """Network evaluations of a picture."""
        return self.sampling.steps * branches(self.folder, self.sampling)


def branches(folder: PipelineFolder, sampling: Sampling) -> int:
    """Return the network evaluations of a call: two with guidance, unless it is an input of the network."""
    return 2 if sampling.omega > 0 and not folder.takes_guidance else 1


def columns_of(shown: Sequence[Shown]) -> list[Column]:
    """Return the teacher at the first student's network evaluations, the students, and the teacher at its own steps."""
    first = shown[0]
    own = end_point_sampling(first.teacher)
    own = own.model_copy(update={"size": first.sampling.size})
    if first.omega is not None:
        own = own.model_copy(update={"omega": first.omega})
    students = [Column(one.name, one.base, one.lora, one.sampling) for one in shown]
    few = max(1, students[0].evaluations // branches(first.teacher, own))
    fewer = validate(Sampling, own.model_dump() | {"steps": few, "sampler": "ddim"})
    return [Column("teacher", first.teacher, None, fewer), *students, Column("teacher", first.teacher, None, own)]


def write_run_report(
    page: Path,
    shown: Sequence[Shown],
    prompts: Sequence[str],
    seed: int,
    *,
    device: torch.device | str,
    precision: torch.dtype = torch.float32,
    batch: int | None = None,
) -> Path:
    """Draw every column and write the page, which needs no other file.

    Args:
        seed: of the first prompt; each further prompt adds 1.
    """
    columns, sheets = columns_of(shown), []
    seeds = range(seed, seed + len(prompts))
    for column in Bar(columns, desc="drawing", unit="network", leave=False):
        generator = load_image_generator(column.folder, column.lora, device, precision=precision, batch=batch)
        sheets.append(generator.draw(prompts, seeds, column.sampling, title=None))
    heads = [f"{html.escape(column.name)}<small>{cost_line(column)}</small>" for column in columns]
    rows = [[html.escape(prompt), *map(_image, pictures)] for prompt, *pictures in zip(prompts, *sheets, strict=True)]
    body = [
        "<h1>Runs beside their teacher</h1>",
        "<p>A row is one prompt and one noise.</p>",
        _table(["", *heads], rows, "pictures"),
        "<h2>What the runs logged</h2>",
        _table(*figure_rows(shown), "figures"),
    ]
    head = f'<meta charset="utf-8"><title>fewstep report</title><style>{STYLE}</style>'
    write_text(page, f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body>\n")
    return page


def cost_line(column: Column) -> str:
    """Return a column's steps and network evaluations as text."""
    steps = f"{column.sampling.steps} step{'s' if column.sampling.steps > 1 else ''}"
    return f"{steps}, {column.evaluations} network evaluation{'s' if column.evaluations > 1 else ''}"


def figure_rows(shown: Sequence[Shown]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and rows of the table of figures: a column a run, with the last figures and the best's."""

    def facts(one: Shown) -> Iterator[tuple[str, str]]:
        run = one.run
        yield "steps", f"{run.step} of {run.steps}"
        if run.rate:
            yield "seconds a step", f"{run.rate:.3g}"
        counted = run.folder / "evaluations.json"
        if counted.is_file():
            roles = read_json(counted).get("a_sample_and_step", {})
            yield "network evaluations a sample and step", f"{sum(roles.values()):.4g}"
        yield from ((name, f"{value:.4g}") for name, value in {n: v for _, n, v in run.losses}.items())
        yield from ((f"{name}, last", f"{value:.4g}") for name, value in {n: v for _, n, v in run.quality}.items())
        numbers = {name: value for name, value in run.best.items() if isinstance(value, int | float)}
        yield from ((f"{name}, best student", f"{value:.4g}") for name, value in numbers.items())
        if run.alarms:
            yield "alarms of the last validation", "<br>".join(map(html.escape, run.alarms))

    found = [dict(facts(one)) for one in shown]
    names = dict.fromkeys(name for facts_of in found for name in facts_of)
    rows = [[html.escape(name), *(facts_of.get(name, "") for facts_of in found)] for name in names]
    return ["", *(html.escape(one.name) for one in shown)], rows


def _image(picture: np.ndarray) -> str:
    """Return a picture as an element of the page."""
    shown = Image.fromarray(picture)
    if max(shown.size) > WIDEST:
        shown.thumbnail((WIDEST, WIDEST))
    width, height = (max(1, 128 // max(shown.size)) * side for side in shown.size)
    stream = io.BytesIO()
    shown.save(stream, "WEBP", lossless=True)
    code = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{code}" width="{width}" height="{height}" alt="">'


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Return a table; its cells are markup."""
    head = "".join(f"<th>{cell}</th>" for cell in heading)
    body = "\n".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>" for first, *others in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
