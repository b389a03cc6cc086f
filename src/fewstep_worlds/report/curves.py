"""Curves of figures against steps and against gamma."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from pandas import DataFrame

from fewstep.evaluation.metric import ARROWS
from fewstep_worlds.report.claims import COMPLEXITY, TEACHER, TEACHER_STEPS
from fewstep_worlds.report.frame import compared, means, swept, tidy
from fewstep_worlds.report.results import By, Results
from fewstep_worlds.report.tables import STEPS, better_of

USUAL = ("TCD", "LCM", "DDIM", "Euler", "DPM-Solver++(2S)")
"""Methods that have the same colour in every figure."""
COLOURS = ("#1f6feb", "#d9730d", "#2e9e5b", "#b8309a", "#7a5af0", "#0b8fa3", "#b4531f", "#6b7280")
MARKERS = ("o", "s", "^", "x", "D", "v", "P", "*")
DASHED = "Euler"
"""Its line covers another method's, which must stay visible beneath."""
LOG_RATIO = 8
"""Ratio of the largest to the smallest figure from which the vertical axis is logarithmic."""
FAR_BELOW = 0.1
"""On a logarithmic axis, reference lines below this share of the smallest figure are left out."""
INK, GRID = "#333333", "#e0e0e0"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fewstep", "font.family": "DejaVu Sans"}


def step_curves(results: Results, by: By) -> DataFrame:
    """Return the points of figures against a count: metric, series, x, value, low, high.

    The teacher at its full steps is a reference line, not a curve.
    """
    table = means(compared(tidy(results, by))).reset_index()
    few = table.groupby("label").steps.transform("min") < TEACHER_STEPS
    return table[few & table["count"].isin(STEPS)].rename(columns={"label": "series", "count": "x"})


def gamma_curves(results: Results) -> DataFrame:
    """Return the points of FD, KID, complexity and prompts against gamma, a series a step count."""
    frame = tidy(results, "steps")
    table = means(frame[frame.method == swept(frame)]).reset_index()
    shown = [*results.of("quality", "real"), *results.of("prompt"), COMPLEXITY]
    table = table[table.metric.isin(shown) & table.steps.isin(STEPS)].sort_values(["steps", "gamma"])
    return table.assign(series=[f"{steps} steps" for steps in table.steps], x=table.gamma)


def draw_curves(
    results: Results, points: DataFrame, place: Path | IO[bytes], kind: str, *, columns: int = 2, against: str
) -> None:
    """Draw a panel a metric and one legend.

    Args:
        points: of `step_curves` or `gamma_curves`.
        place: where the picture is written.
        kind: "svg", "png" or "webp".
        columns: panels beside each other.
        against: name of the horizontal axis; all but "gamma" are logarithmic and have the teacher's figure as a line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    metrics = [name for name in results.metrics if name in set(points.metric)]
    columns = min(len(metrics), columns)
    rows = -(-len(metrics) // columns)
    with rc_context(STYLE):
        canvas: Any = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        by_steps = against != "gamma"
        frame = tidy(results, "steps")
        ends = frame[(frame.method == TEACHER) & (frame.steps == TEACHER_STEPS)]
        teacher = ends.groupby("metric").value.mean() if by_steps else {}
        names = points.series.drop_duplicates().tolist()
        styles = {name: USUAL.index(name) for name in names if name in USUAL}
        free = [number for number in range(len(COLOURS)) if number not in styles.values()]
        styles |= {name: free[i % len(free)] for i, name in enumerate(n for n in names if n not in styles)}
        for ax, metric in zip(axes, metrics):
            heights = {"real pictures": results.floor(metric), "teacher": teacher.get(metric)}
            _panel(ax, points[points.metric == metric], heights, styles, log=by_steps)
            ax.set_title(metric + ARROWS[better_of(results, metric)], fontsize=10, color=INK, parse_math=False)
            ax.set_xlabel(against, color=INK, fontsize=9)
        for ax in axes[len(metrics) :]:
            ax.set_visible(False)
        entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
        canvas.legend(
            entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 4), frameon=False, fontsize=9
        )
        # without its date, equal results give equal files
        canvas.savefig(
            place, format=kind, dpi=160, facecolor="white", metadata={"Date": None} if kind == "svg" else None
        )


def _panel(ax: Any, points: DataFrame, heights: dict[str, float | None], styles: dict[str, int], *, log: bool) -> None:
    from matplotlib import ticker

    for name, own in points.groupby("series", sort=False):
        number, dashed = styles[name], name == DASHED
        ax.plot(
            own.x, own.value, color=COLOURS[number], marker=MARKERS[number], markersize=4, linewidth=1.6,
            linestyle=(0, (4, 3)) if dashed else "-", zorder=4 if dashed else 3, label=name,
        )  # fmt: skip
        ax.fill_between(own.x, own.low, own.high, color=COLOURS[number], alpha=0.14, linewidth=0, zorder=2)
    lowest, plain = points.value.min(), ticker.FuncFormatter(lambda value, _: f"{value:g}")
    logarithmic = lowest > 0 and points.value.max() / lowest >= LOG_RATIO
    for label, height in heights.items():
        if height is not None and not (logarithmic and height < FAR_BELOW * lowest):
            ax.axhline(height, color=INK, linewidth=1.1, linestyle="--" if label == "teacher" else ":", label=label)
    if logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        ax.yaxis.set_major_formatter(plain)
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    if log:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.xaxis.set_major_locator(ticker.FixedLocator(sorted(set(points.x))))
    ax.xaxis.set_major_formatter(plain)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.tick_params(colors=INK, labelsize=8.5, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
