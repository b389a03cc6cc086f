"""Curves of figures against steps and gamma: as SVG for a page in its own colours, or as one picture file."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write
from fewstep.evaluation.metric import ARROWS
from fewstep_worlds.emoji8.report.claims import TEACHER, TEACHER_STEPS
from fewstep_worlds.emoji8.report.lines import HEADLINE_GAMMA, Line, compared, lines_of, summary, swept
from fewstep_worlds.emoji8.report.results import Results
from fewstep_worlds.emoji8.report.step_table import STEPS, better_of

COLOURS = ("#1f6feb", "#d9730d", "#2e9e5b", "#b8309a", "#7a5af0", "#0b8fa3", "#b4531f", "#6b7280")
"""Of series on white; a page names its own as `--s0` to `--s7`."""
PREFERRED = {"TCD": 0, "LCM": 1, "DDIM": 2, "Euler": 3, "DPM-Solver++(2S)": 4}
"""Colours of the usual methods, so that they are the same on every page."""
MARKERS = ("o", "s", "^", "x", "D", "v", "P", "*")
DASHED = {"Euler"}
"""Drawn over another method's line, which must stay visible beneath."""
LOG_RATIO = 8
"""From this ratio of the largest to the smallest figure on, an axis is logarithmic."""
FAR_BELOW = 0.1
"""On a logarithmic axis, real pictures that get less than this share of the smallest figure are left out."""
INK, LATTICE = "#333333", "#e0e0e0"
KINDS = {".svg": "svg", ".png": "png", ".webp": "webp"}

# Colours that stand for a page's own until the SVG is written.
_PAGE_INK, _PAGE_LATTICE = "#0a0b01", "#0a0b02"
_PAGE_COLOURS = tuple(f"#0a0c{i:02x}" for i in range(len(COLOURS)))


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        label: for the legend.
        colour: number of its colour.
        points: x, y and the ends of the band around y, or None.
        dashed: whether its line is.
    """

    label: str
    colour: int
    points: tuple[tuple[float, float, float | None, float | None], ...]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A small diagram.

    Attributes:
        title: the metric with the direction that is better.
        x: what the axis along shows.
        series: its curves.
        teacher: height of the dashed line, None for none.
        floor: height of the dotted line (real pictures), None for none.
        log: whether the axis along is logarithmic.
    """

    title: str
    x: str
    series: tuple[Series, ...]
    teacher: float | None = None
    floor: float | None = None
    log: bool = False


def colours(found: Sequence[Line]) -> dict[str, int]:
    """Give each line a colour by its label; a method in several settings has one for each."""
    taken: dict[str, int] = {}
    for line in found:
        wanted = PREFERRED.get(line.method)
        if wanted is not None and wanted not in taken.values():
            taken[line.label] = wanted
    free = [i for i in range(len(COLOURS)) if i not in taken.values()] or list(range(len(COLOURS)))
    rest = [line.label for line in found if line.label not in taken]
    return taken | {label: free[i % len(free)] for i, label in enumerate(rest)}


def drawn_lines(results: Results, gamma: float = HEADLINE_GAMMA) -> tuple[Line, ...]:
    """Return the lines that have a curve: the teacher at its full steps is a height, not a curve."""
    return tuple(line for line in compared(results, gamma) if min(line.steps) < TEACHER_STEPS)


def step_panels(results: Results, metrics: Sequence[str], gamma: float = HEADLINE_GAMMA) -> list[Panel]:
    """Return a panel a metric: figure against network calls, a curve a line."""
    found = drawn_lines(results, gamma)
    palette = colours(found)
    teacher = next(iter(lines_of(results, TEACHER)), None)
    panels = []
    for metric in metrics:
        series = []
        for line in found:
            at = [(steps, summary(line, steps, metric)) for steps in line.steps]
            points = tuple((float(steps), s.mean, s.low, s.high) for steps, s in at if s)
            if points:
                series.append(Series(line.label, palette[line.label], points, line.method in DASHED))
        height = summary(teacher, TEACHER_STEPS, metric) if teacher else None
        title = metric + ARROWS[better_of(results, metric)]
        floor = results.floor(metric)
        panels.append(Panel(title, "network calls", tuple(series), height.mean if height else None, floor, True))
    return panels


def gamma_metrics(results: Results) -> list[str]:
    """Return what a sweep over gamma shows: FD, KID and detail, those that there are."""
    return [*results.of("quality", "real"), *results.of("detail")]


def gamma_panels(results: Results, metrics: Sequence[str] | None = None, steps: Sequence[int] = STEPS) -> list[Panel]:
    """Return a panel a metric: figure against gamma, a curve a step count; none for fewer than 3 gammas."""
    method = swept(results)
    options = lines_of(results, method) if method else ()
    if not options:
        return []
    panels = []
    for metric in gamma_metrics(results) if metrics is None else metrics:
        series = []
        for number, count in enumerate(steps):
            points = []
            for line in options:
                figure = summary(line, count, metric)
                gamma = next((row.gamma for row in line.at(count)), None)
                if figure and gamma is not None:
                    points.append((gamma, figure.mean, figure.low, figure.high))
            if points:
                series.append(Series(f"{count} calls", number % len(COLOURS), tuple(sorted(points))))
        title = metric + ARROWS[better_of(results, metric)]
        panels.append(Panel(title, "gamma", tuple(series), floor=results.floor(metric)))
    return panels


def gamma_figure(
    results: Results, path: Path | str, metrics: Sequence[str] | None = None, steps: Sequence[int] = STEPS
) -> Path:
    """Write figures against gamma as one picture (.svg, .png or .webp), as the TCD paper's Figures 5 and 6.

    Raises:
        UserError: another suffix, fewer than 3 gammas, or a place that cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path} must end in {', '.join(KINDS)}; the nearest is {path.with_suffix('.svg').name}")
    panels = gamma_panels(results, metrics, steps)
    if not panels:
        raise UserError("no method has 3 gammas or more at one step count; measure TCD at 0, .2, .4, .6, .8 and 1")
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(_style()):
        columns = min(len(panels), 2)
        rows = -(-len(panels) // columns)
        canvas: Any = Canvas(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels):
            _draw(ax, panel, COLOURS, INK, LATTICE)
            ax.set_title(panel.title, fontsize=10, color=INK, parse_math=False)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
        with atomic_write(path) as part:
            canvas.savefig(part, format=KINDS[path.suffix.lower()], dpi=160, facecolor="white", metadata=_plain(path))
    return path


def svg(panel: Panel, name: str) -> str:
    """Return a panel as an SVG element that takes its colours (`--s0`..., `--lattice`, currentColor) from the page.

    Args:
        name: prefix of its ids, distinct on the page; letters and digits.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(_style()):
        canvas: Any = Canvas(figsize=(3.4, 2.3), layout="constrained")
        _draw(canvas.subplots(), panel, _PAGE_COLOURS, _PAGE_INK, _PAGE_LATTICE)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(stream.getvalue(), name)


def _draw(ax: Any, panel: Panel, palette: Sequence[str], ink: str, lattice: str) -> None:
    from matplotlib import ticker

    for series in panel.series:
        x, y, low, high = zip(*series.points)
        colour = palette[series.colour]
        ax.plot(
            x,
            y,
            color=colour,
            marker=MARKERS[series.colour],
            markersize=4,
            linewidth=1.6,
            linestyle=(0, (4, 3)) if series.dashed else "-",
            zorder=4 if series.dashed else 3,
            label=series.label,
        )
        if None not in low and None not in high and len(x) > 1:
            ax.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0, zorder=2)
    heights = [y for series in panel.series for _, y, _, _ in series.points]
    lowest = min(heights, default=0.0)
    logarithmic = lowest > 0 and max(heights) / lowest >= LOG_RATIO
    for height, style, label in ((panel.teacher, "--", "teacher"), (panel.floor, ":", "real pictures")):
        if height is not None and not (logarithmic and height < FAR_BELOW * lowest):
            ax.axhline(height, color=ink, linewidth=1.1, linestyle=style, zorder=1, label=label)
    if logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    ticks = sorted({x for series in panel.series for x, _, _, _ in series.points})
    if panel.log:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    if ticks:
        ax.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel(panel.x, color=ink, fontsize=9)
    ax.grid(True, color=lattice, linewidth=0.6)
    ax.tick_params(colors=ink, labelsize=8.5, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(lattice)


def _style() -> dict[str, Any]:
    return {"svg.fonttype": "none", "svg.hashsalt": "fewstep", "font.family": "DejaVu Sans"}


def _plain(path: Path) -> dict[str, Any] | None:
    """Leave the date out where the format would write it, so that equal results give equal files."""
    return {"Date": None} if path.suffix.lower() == ".svg" else None


def _for_page(text: str, name: str) -> str:
    """Make matplotlib's SVG document an element of a page: no names of other places, distinct ids, its colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = body.replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w.-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    for number, stand_in in enumerate(_PAGE_COLOURS):
        body = body.replace(stand_in, f"var(--s{number})")
    body = body.replace(_PAGE_INK, "currentColor").replace(_PAGE_LATTICE, "var(--lattice)")
    body = re.sub(r"[ \t]*\n[ \t]*", "\n", body).strip()
    return f'<svg {box[0]} aria-hidden="true">{body}'
