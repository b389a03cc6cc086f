"""One self-contained page: pictures, Table 1, curves, paired differences, claims and how it was all measured."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame
from PIL import Image

from fewstep.common.files import write_text
from fewstep.evaluation.metric import Pictures
from fewstep_worlds.report.claims import CLOSED, TCD, claims
from fewstep_worlds.report.curves import draw_curves, gamma_curves, step_curves
from fewstep_worlds.report.frame import compared, headline, tidy
from fewstep_worlds.report.results import Results
from fewstep_worlds.report.tables import (
    WORDS,
    StepTable,
    decimals,
    gains,
    measured_counts,
    step_table,
    table_blocks,
)


@dataclass(frozen=True)
class Column:
    """A network's pictures in a sheet.

    Attributes:
        method: its name.
        cost: steps and network evaluations of a picture.
        pictures: uint8 [P, H, W, 3].
    """

    method: str
    cost: str
    pictures: Pictures


@dataclass(frozen=True)
class Sheet:
    """Pictures of the same prompts and noise: a row a prompt, a column a network."""

    title: str
    prompts: Sequence[str]
    columns: Sequence[Column]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Return each prompt with its pictures as data URLs of lossless WebP."""
        rows = zip(self.prompts, *(column.pictures for column in self.columns), strict=True)
        return [(prompt, [_url(picture) for picture in pictures]) for prompt, *pictures in rows]


def write_report(
    path: Path | str, results: Results, sheets: Sequence[Sheet], *, command: str = "", closed: float = CLOSED
) -> Path:
    """Write the report. It loads no network, no script and no other file.

    Args:
        sheets: the first one is shown at the top, large.
        command: how to draw a prompt of one's own; empty to leave it out.
        closed: as for `claims`.

    Raises:
        UserError: the place cannot be written to.
    """
    from jinja2 import Environment, StrictUndefined

    steps = measured_counts(results)
    blocks = table_blocks(results)
    tables = {by: [_html_table(step_table(results, names, steps, by)) for names in blocks] for by in WORDS}
    frame = compared(tidy(results, "nfe"))
    page = resources.files("fewstep_worlds.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(page).render(
        results=results,
        sheets=[(sheet, sheet.rows()) for sheet in sheets],
        command=command,
        tables=tables,
        notes=_row_notes(frame),
        curves={by: _embedded(results, step_curves(results, by), word) for by, word in WORDS.items()},
        sweep=_embedded(results, gamma_curves(results), "gamma"),
        differences=_differences(results, frame, steps),
        claims=[claim for claim in claims(results, closed) if claim.held is not None],
        scale=as_html(_scale(results)) if results.scale else "",
        identities=[identity for name in results.metrics for identity in results.identities(name)],
    )
    write_text(path, text)
    return Path(path)


def as_html(cells: DataFrame) -> Any:
    """Return a table as HTML markup. Labels are escaped; cells must be markup already."""
    from markupsafe import Markup, escape

    shown = cells.rename(index=escape, columns=escape).replace("", "–").rename_axis(index=None)
    with pd.option_context("display.max_colwidth", None):
        return Markup(shown.to_html(escape=False, classes="figures", border=0))


def _url(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _embedded(results: Results, points: DataFrame, against: str) -> str:
    """Return curves as a data URL of SVG; empty where there are no points."""
    if points.empty:
        return ""
    stream = io.BytesIO()
    draw_curves(results, points, stream, "svg", columns=3, against=against)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _html_table(table: StepTable) -> tuple[Any, Any, list[str]]:
    cells = as_html(table.cells.mask(table.best, "<b>" + table.cells + "</b>"))
    return cells, as_html(table.references), table.notes


def _differences(results: Results, frame: DataFrame, counts: Sequence[int]) -> Any:
    """Return the table of TCD minus each other method prompt by prompt, LCM first; empty where TCD has no scores."""
    ours = str(headline(frame, TCD))
    methods = frame[frame.scores.notna()].drop_duplicates("label").set_index("label").method
    others = sorted((label for label in methods.index if label != ours), key=lambda label: methods[label] != "LCM")
    pairs = [((ours, count), (theirs, count)) for theirs in others for count in counts]
    table = gains(frame, pairs, results.of("prompt") + results.of("teacher"))
    return as_html(table) if table.size else ""


def _scale(results: Results) -> DataFrame:
    """Return figures of detail of real, blurred and noised pictures as text."""
    values = DataFrame({row: {name: f.value for name, f in of.items()} for row, of in results.scale.items()}).T
    return values.apply(lambda column: column.map(f"{{:.{decimals(column)}f}}".format, na_action="ignore")).fillna("")


def _row_notes(frame: DataFrame) -> list[str]:
    """Return every distinct note with the methods it belongs to."""
    notes = frame[frame.note != ""].groupby("note", sort=False).label.unique()
    return [f"{', '.join(labels)}: {note}" for note, labels in notes.items()]
