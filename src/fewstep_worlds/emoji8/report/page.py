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
from PIL import Image

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.evaluation.metric import ARROWS, Pictures, check_pictures
from fewstep_worlds.emoji8.report import curves
from fewstep_worlds.emoji8.report.claims import TCD, claims
from fewstep_worlds.emoji8.report.lines import HEADLINE_GAMMA, Line, compared, headline, paired
from fewstep_worlds.emoji8.report.results import Results
from fewstep_worlds.emoji8.report.step_table import STEPS, better_of, decimals, step_table

TEMPLATE = "page.html.jinja"
COMMAND = 'fewstep sample "a doggy, fluent 3d style" --steps 4 --out doggy.png'
LOSSLESS = 1_200_000
"""Bytes of pictures up to which the grid is lossless."""
QUALITY = 88
"""Of the pictures of a larger grid."""
BLOCKS = 4
"""Metrics beside each other in one table."""

GridRow = tuple[str, Pictures]
"""A row's name and its pictures, uint8 [P, H, W, 3]."""


@dataclass(frozen=True)
class Difference:
    """Ours - theirs on one metric, a cell for each step count: its text, interval and "good", "bad" or ""."""

    metric: str
    cells: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Comparison:
    """Two methods prompt by prompt."""

    title: str
    rows: tuple[Difference, ...]


def write_report(
    path: Path | str,
    results: Results,
    grid: Sequence[GridRow],
    *,
    grid_prompts: Sequence[str] | None = None,
    sweep: Results | None = None,
    metrics: Sequence[str] | None = None,
    command: str = COMMAND,
    gamma: float = HEADLINE_GAMMA,
) -> Path:
    """Write the report; it needs no network, no script and no other file.

    Args:
        path: of the page.
        results: what was measured.
        grid: pictures of the same prompts and seeds, a row each: the teacher at 50 calls, every method at 4.
        grid_prompts: its columns' prompts; by default the first of `results.prompts`.
        sweep: the student at 3 gammas or more, where these are not among `results`.
        metrics: of Table 1; by default FD (else KID), agreement, detail and the distance to the teacher.
        command: how to sample with a prompt of one's own.
        gamma: at which TCD is judged, where it was measured at several.

    Raises:
        UserError: pictures and prompts that do not fit, or a place that cannot be written to.
    """
    from jinja2 import Environment, StrictUndefined

    blocks = table_blocks(results, metrics)
    shown = curves.drawn_lines(results, gamma)
    palette = curves.colours(shown)
    swept = curves.gamma_panels(sweep or results)
    columns = _columns(results, grid, grid_prompts)
    page = resources.files("fewstep_worlds.emoji8.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(page).render(
        results=results,
        columns=columns,
        grid=[(name, urls) for (name, _), urls in zip(grid, embed_grid([p for _, p in grid]))],
        command=command,
        tables=[step_table(results, names, _steps(results), gamma) for names in blocks],
        legend=[(line.label, palette[line.label], line.method in curves.DASHED) for line in shown],
        panels=_svgs(curves.step_panels(results, results.metrics, gamma), "step"),
        sweep=_svgs(swept, "gamma"),
        sweep_legend=[(s.label, s.colour, False) for s in swept[0].series] if swept else [],
        steps=_steps(results),
        comparisons=_comparisons(results, gamma),
        claims=claims(results, gamma),
        scale=_scale(results),
        identities=[identity for name in results.metrics for identity in results.identities(name)],
        notes=_row_notes(results, gamma),
    )
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def table_blocks(results: Results, metrics: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """The metrics of each table: the given ones, or those that tell the most, first; then all others."""
    first = tuple(metrics) if metrics is not None else default_metrics(results)
    others = [name for name in results.metrics if name not in first]
    return [first, *(tuple(others[i : i + BLOCKS]) for i in range(0, len(others), BLOCKS))]


def default_metrics(results: Results) -> tuple[str, ...]:
    """Return up to four metrics that tell the most: distance to real, agreement, detail, distance to the teacher."""
    groups = [results.of("quality", "real"), results.of("prompt"), results.of("detail"), results.of("teacher")]
    wanted = [name for names in groups for name in names[:1]]
    rest = [name for name in results.metrics if name not in (*wanted, *results.of("quality", "teacher"))]
    return tuple([*wanted, *rest][:BLOCKS])


def embed_grid(rows: Sequence[Pictures], limit: int = LOSSLESS) -> list[list[str]]:
    """Return every picture as a data URL of WebP, lossless while all of them together fit into `limit` bytes."""
    files = [[_webp(picture, lossless=True) for picture in pictures] for pictures in rows]
    if sum(len(data) for row in files for data in row) > limit:
        files = [[_webp(picture, lossless=False) for picture in pictures] for pictures in rows]
    return [["data:image/webp;base64," + base64.b64encode(data).decode() for data in row] for row in files]


def _webp(picture: np.ndarray, *, lossless: bool) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", lossless=lossless, quality=60 if lossless else QUALITY, method=4)
    return stream.getvalue()


def _columns(results: Results, grid: Sequence[GridRow], prompts: Sequence[str] | None) -> tuple[str, ...]:
    if not grid:
        return ()
    count = len(grid[0][1])
    columns = tuple(results.prompts[:count] if prompts is None else prompts)
    for name, pictures in grid:
        check_pictures(pictures)
        if len(pictures) != len(columns):
            raise UserError(f"row {name!r} of the grid has {len(pictures)} pictures for {len(columns)} prompts")
    return columns


def _steps(results: Results) -> tuple[int, ...]:
    """The paper's step counts that were measured; all of them if none was."""
    there = {row.steps for row in results.rows}
    return tuple(steps for steps in STEPS if steps in there) or STEPS


def _svgs(panels: Sequence[curves.Panel], name: str) -> list[tuple[str, Any]]:
    """Titles and drawings; the drawings are markup of ours, in which the user's text has no part."""
    from markupsafe import Markup

    return [(panel.title, Markup(curves.svg(panel, f"{name}{i}"))) for i, panel in enumerate(panels)]


def _comparisons(results: Results, gamma: float) -> list[Comparison]:
    """TCD minus each other method, LCM first, prompt by prompt at equal calls."""
    ours = headline(results, TCD, gamma)
    if ours is None:
        return []
    others = sorted(
        (line for line in compared(results, gamma) if line.label != ours.label), key=lambda x: x.method != "LCM"
    )
    found = []
    for theirs in others:
        rows = tuple(_difference(results, ours, theirs, name) for name in _scored(ours, theirs))
        rows = tuple(row for row in rows if any(text for text, _, _ in row.cells))
        if rows:
            found.append(Comparison(f"{ours.label} minus {theirs.label}", rows))
    return found


def _scored(ours: Line, theirs: Line) -> list[str]:
    theirs_too = {name for row in theirs.rows for name in row.scores}
    return list(dict.fromkeys(name for row in ours.rows for name in row.scores if name in theirs_too))


def _difference(results: Results, ours: Line, theirs: Line, metric: str) -> Difference:
    figures = [paired(ours, theirs, steps, metric) for steps in _steps(results)]
    widths = [f.high - f.low for f in figures if f and f.low is not None and f.high is not None]
    places = decimals(widths or [f.value for f in figures if f], 2)
    better = better_of(results, metric)
    cells = []
    for figure in figures:
        if figure is None:
            cells.append(("", "", ""))
            continue
        low, high, verdict = figure.low, figure.high, ""
        interval = "" if low is None or high is None else f"{_signed(low, places)} to {_signed(high, places)}"
        if low is not None and high is not None and better != "neither" and (low > 0 or high < 0):
            verdict = "good" if (low > 0) == (better == "higher") else "bad"
        cells.append((_signed(figure.value, places), interval, verdict))
    return Difference(metric + ARROWS[better], tuple(cells))


def _signed(value: float, places: int) -> str:
    text = f"{value:+.{places}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _scale(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heading and rows of the table of detail."""
    names = list(dict.fromkeys(name for figures in results.scale.values() for name in figures))
    places = {name: decimals([f[name].value for f in results.scale.values() if name in f]) for name in names}
    return names, [
        (row, [f"{figures[name].value:.{places[name]}f}" if name in figures else "" for name in names])
        for row, figures in results.scale.items()
    ]


def _row_notes(results: Results, gamma: float) -> list[str]:
    """Every distinct note with the rows that it is of; a method with the same note in all of them goes by its name."""
    found: dict[str, dict[str, set[int]]] = {}
    for line in compared(results, gamma):
        for row in line.rows:
            for note in filter(None, (row.calls_note, row.note)):
                found.setdefault(note, {}).setdefault(line.label, set()).add(row.steps)
    every = {line.label: set(line.steps) for line in compared(results, gamma)}
    return [
        f"{', '.join(_name(label, steps, every[label]) for label, steps in of.items())}: {note}"
        for note, of in found.items()
    ]


def _name(label: str, steps: set[int], every: set[int]) -> str:
    return label if steps == every else f"{label} at {', '.join(map(str, sorted(steps)))} calls"
