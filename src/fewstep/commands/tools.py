"""The verbs that make what distillations use, and `export`: synthesised sets, perceptual distances, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.commands.options import Configs, Device, Overrides, Teacher, app, say


@app.command()
def synthesize(
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line.")],
    out: Annotated[Path, typer.Option(help="Folder; a set that was stopped is gone on with.")],
    teacher: Teacher = "",
    kind: Annotated[
        str | None, typer.Option(help="latents (end points; the default) or trajectories (whole walks).")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Say what it will take, and stop.")] = False,
    config: Configs = None,
) -> None:
    """Let a teacher draw latents or whole trajectories from prompts alone, for training without pictures.

    Example: fewstep synthesize --prompts prompts.txt --out runs/walks --kind trajectories -s guidance.high=14

    Writes synthesis.json (the record), prompts.txt, conditions.safetensors and shard-*.safetensors. Under torchrun each
    process draws its share. `fewstep recipes --settings` lists everything that -s can set.
    """
    from fewstep.commands import synthesize as api_tools

    asked: dict[str, Any] = {"out": out, "teacher": teacher, "kind": kind, "overrides": overrides or []}
    asked["teacher_config"] = config or ""
    if dry_run:
        say("\n".join(api_tools.synthesis_cost(prompts, **asked).lines()))
        return
    say(f"wrote {api_tools.synthesize(prompts, **asked)}")


@app.command()
def train_perceptual(
    out: Annotated[Path, typer.Option(help="Run folder; a stopped run is resumed from it.")] = Path("runs/perceptual"),
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line; empty for Emoji-8's captions.")
    ] = None,
    teacher: Teacher = "",
    device: Device = "auto",
    overrides: Overrides = None,
    config: Configs = None,
) -> None:
    """Train a distance between latents from prompts and a teacher alone, for method.distance = latent_lpips.

    Example: fewstep train-perceptual --teacher PIPELINE --prompts prompts.txt --out runs/perceptual
    """
    from fewstep.commands import train_latent_lpips as api_tools

    folder = api_tools.train_perceptual(
        out=out,
        prompts=prompts,
        teacher=teacher,
        device=device,
        overrides=overrides or [],
        teacher_config=config or "",
    )
    from fewstep.methods.latent_lpips.record import read_record

    heldout = read_record(folder)["heldout"]
    for name, value in heldout["rank_correlation"].items():
        say(f"rank correlation with pixel features, {name}: {value:.4f} (n = {heldout['n']} held-out pairs)")
    say(f"wrote {folder}")


@app.command()
def train_adapter(
    out: Annotated[Path, typer.Option(help="Run folder; a stopped run is resumed from it.")] = Path("runs/adapter"),
    pairs: Annotated[
        Path | None,
        typer.Option(help="Text pairs, .tsv (text, tab, the same in English) or .jsonl; empty for Emoji-8's Chinese."),
    ] = None,
    teacher: Teacher = "",
    overrides: Overrides = None,
    config: Configs = None,
) -> None:
    """Train an adapter from text pairs alone, with which a teacher and its students read other languages.

    Example: fewstep train-adapter --out runs/adapter; fewstep sample --adapter runs/adapter/adapter --steps 3 章鱼
    """
    from fewstep.commands import train_adapter as api_tools

    asked: dict[str, Any] = {"out": out, "pairs": pairs, "teacher": teacher, "overrides": overrides or []}
    say(f"wrote {api_tools.train_adapter(**asked, teacher_config=config or '')}")


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="LoRA file or folder, tcd (bundled), or a whole student's folder.")],
    out: Annotated[Path, typer.Option(help="New folder for the file, its model card and pictures.")],
    form: Annotated[
        str, typer.Option(help="diffusers, peft, kohya (ComfyUI too), merged (a pipeline folder) or single-file.")
    ] = "diffusers",
    teacher: Teacher = "",
    precision: Annotated[
        str | None, typer.Option(help="Of whole networks: fp32, fp16 or bf16; left out, the base's own.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A picture of the card. May be given often.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    check: Annotated[bool, typer.Option(help="Read it back as its users will, draw, and compare.")] = True,
    device: Device = "auto",
    config: Configs = None,
) -> None:
    """Write a student in the form that another tool reads, with a model card, and prove that it is read back.

    Example: fewstep export runs/tcd/student --form kohya --out exports/octopus-tcd
    """
    from fewstep.commands import export as api_tools

    path, checked = api_tools.export_as(
        student,
        form,
        out=out,
        teacher=teacher,
        precision=precision,
        prompts=prompt or [],
        seed=seed,
        check=check,
        device=device,
        teacher_config=config or "",
    )
    if checked is not None:
        say(checked.line)
    say(f"wrote {path}")
