"""What the command's verbs share: the app itself, options that several of them have, and how they speak."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.common.config import parse_overrides

if TYPE_CHECKING:
    from fewstep.evaluation.metric import Figure

app = typer.Typer(
    name="fewstep",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a text-to-image diffusion model into one that needs 2 to 8 network calls; sample and measure it.",
)

Teacher = Annotated[
    str, typer.Option(help="Pipeline folder, single-file checkpoint or hub id; empty for the bundled teacher.")
]
Configs = Annotated[
    Path | None, typer.Option("--config", help="Pipeline folder of a single-file teacher's kind, for its configs.")
]
Lora = Annotated[
    str,
    typer.Option(
        help="Student: tcd (bundled), a LoRA file or folder, none for the teacher itself; auto is tcd for the "
        "bundled teacher and none for another."
    ),
]
Omega = Annotated[
    float | None,
    typer.Option(help="Guidance in the papers' convention, diffusers' guidance_scale less 1; 0 for students."),
]
DrawsIn = Annotated[str, typer.Option("--precision", help="What the denoiser computes in: auto, fp32, bf16 or fp16.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile the denoiser; takes minutes, pays for many pictures.")
]
Batch = Annotated[
    int | None,
    typer.Option(help="Pictures drawn at once; left out, 16 of 512 pixels a side, at most 64 of smaller ones."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override one setting, e.g. -s optim.lr=3e-4. May be given often."),
]

Sampled = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Any other setting of sampling, e.g. -s gamma_law=noise -s jump=second_order."),
]


def drawing(overrides: list[str] | None, **options: object) -> dict[str, Any]:
    """Changes to the sampling settings: the options that were given, then -s over them."""
    from fewstep.diffusion.config import Sampling

    return {key: value for key, value in options.items() if value is not None} | parse_overrides(
        overrides or [], Sampling
    )


def say(text: str) -> None:
    """Print a line, once for all processes of a launch (`torchrun` gives each its RANK)."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)


def echo_figures(figures: Mapping[str, Figure]) -> None:
    """Print figures, a line each, with interval, n and floor: what real pictures get, or the teacher itself."""
    for name, figure in figures.items():
        interval = f" [{figure.low:.4g}, {figure.high:.4g}]" if figure.low is not None else ""
        whose = "the teacher's own" if figure.is_of("quality", "teacher") else "real pictures"
        floor = f", {whose} {figure.floor:.4g}" if figure.floor is not None else ""
        say(f"{name}: {figure.value:.4g}{interval} (n = {figure.n}{floor})")
