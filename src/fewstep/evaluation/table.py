"""Figures as a Markdown table that says n, seed and the real pictures' figure beside them."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.evaluation.metric import Figure

ARROWS = {"lower": " ↓", "higher": " ↑", "neither": ""}
REAL = "*real pictures*"


def number(value: float) -> str:
    """Write a value with three significant digits or more, without exponents for ordinary sizes."""
    if value and abs(value) < 0.1:
        return f"{value:.5f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def cell(figure: Figure) -> str:
    """Write a figure with its interval."""
    if figure.low is None or figure.high is None:
        return number(figure.value)
    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def table(rows: Mapping[str, Mapping[str, Figure]], first: str = "method") -> str:
    """Return a Markdown table by row and metric, with a row of real pictures and a line on each metric."""
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    if not names:
        return ""
    known = {name: [figures[name] for figures in rows.values() if name in figures] for name in names}

    def heading(name: str) -> str:
        identity = known[name][0].identity
        return name + (ARROWS[identity.better] if identity else "")

    lines = ["| " + " | ".join([first, *(heading(name) for name in names)]) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for row, figures in rows.items():
        cells = [cell(figures[name]) if name in figures else "" for name in names]
        lines.append("| " + " | ".join([_plain(row), *cells]) + " |")
    floors = {name: next((f.floor for f in known[name] if f.floor is not None), None) for name in names}
    if any(floor is not None for floor in floors.values()):
        cells = ["" if floor is None else number(floor) for floor in floors.values()]
        lines.append("| " + " | ".join([REAL, *cells]) + " |")
    lines.append("")
    for name in names:
        lines.append(_note(name, known[name]))
    return "\n".join(lines) + "\n"


def _note(name: str, figures: list[Figure]) -> str:
    counts = sorted({figure.n for figure in figures})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    identity = figures[0].identity
    if identity is None:
        return f"- {name}: n = {n}."
    unit = f", in {identity.unit}" if identity.unit else ""
    backbone = f"; {identity.backbone}" if identity.backbone != "none" else ""
    how = f"n = {n}, seed {identity.seed}; {identity.reduction}{backbone}"
    return f"- {name}: {identity.measures}{unit} ({how})."


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
