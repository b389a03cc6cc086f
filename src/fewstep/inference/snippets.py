"""One picture as a command, and as code for diffusers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.pipeline_writer import read_record
from fewstep.backbones.scheduler_config import is_flow
from fewstep.diffusion.config import Sampling
from fewstep.inference.pipeline import call_settings
from fewstep.students.lora_header import LoraHeader


def as_command(
    prompt: str,
    seed: int,
    settings: Mapping[str, Any],
    negative_prompt: str = "",
    *,
    teacher: Path | str,
    student: Path | str,
    teacher_config: Path | str = "",
) -> str:
    """Return the `fewstep sample` command that draws a picture, quoted for a shell.

    Args:
        settings: sampling settings by name, as of `TextToImage.draw`.
        teacher, student, teacher_config: arguments of the command; an empty one is left out.
    """
    words = ["fewstep", "sample", prompt, "--seed", str(seed)]
    named = {"teacher": str(teacher), "teacher-config": str(teacher_config), "lora": str(student)}
    for name, value in named.items():
        words += [f"--{name}", value] if value else []
    words += [f"--negative-prompt={negative_prompt}"] if negative_prompt else []
    for name, value in settings.items():
        words += ["-s", f"{name}={'x'.join(map(str, value)) if name == 'size' else value}"]
    return shlex.join([*words, "--out", "picture.png"])


def as_code(
    prompt: str,
    seed: int,
    settings: Mapping[str, Any],
    negative_prompt: str = "",
    *,
    folder: PipelineFolder,
    student: LoraHeader | None,
    sampling: Sampling,
) -> str:
    """Return Python code that draws a picture with diffusers, up to rounding; with fewstep where diffusers cannot.

    Args:
        settings: sampling settings by name, as of `TextToImage.draw`.
        sampling: the student's or teacher's own with those changes.
    """
    made = _pipeline_lines(folder, student, sampling)
    if not made:
        changes = _keywords({**settings, **({"negative_prompt": negative_prompt} if negative_prompt else {})})
        loaded = f"fewstep.load({str(folder.path)!r}, {str(student.path) if student else None!r})"
        return f"import fewstep\n\n(picture,) = {loaded}.draw({prompt!r}, {seed}{changes})\n"
    scale = folder.family.unguided + sampling.omega
    if student and student.sampling and "omega" not in settings and not sampling.extra_conditioning:
        scale = call_settings(student.file)[folder.family.guided]  # of a network that takes it as an input
    arguments: dict[str, Any] = {
        "num_inference_steps": sampling.steps // sampling.calls_a_step,
        folder.family.guided: scale,
    }
    if sampling.size:
        arguments |= {"width": sampling.size[0], "height": sampling.size[1]}
    lines = ["import diffusers", "import fewstep", "import torch", "", *made]
    if negative_prompt and sampling.omega:
        arguments["negative_prompt"] = negative_prompt
    elif negative_prompt:
        lines.append(f"fewstep.lead_away(pipe, {negative_prompt!r})")
    lines.append(f"generator = torch.Generator().manual_seed({seed})")
    if is_flow(folder.noise):  # its pipelines pass no generator to the scheduler
        lines.append("pipe.scheduler.generator = generator")
    lines += [
        "picture = pipe(",
        f"    prompt={prompt!r},",
        *(f"    {name}={value!r}," for name, value in arguments.items()),
    ]
    return "\n".join([*lines, "    generator=generator,", ").images[0]", ""])


def _pipeline_lines(folder: PipelineFolder, student: LoraHeader | None, sampling: Sampling) -> list[str]:
    """Return the lines that make `pipe`; none for a solver, whose scheduler in diffusers takes other times."""
    if sampling.sampler not in ("sss", "lcm"):
        return []
    lines = [f"pipe = diffusers.{folder.pipeline}.from_pretrained({str(folder.path)!r})"]
    place = str(student.file) if student else str(folder.path)
    given: dict[str, Any] = {"gamma": sampling.gamma} if sampling.sampler == "sss" else {}
    if folder.extra_inputs(sampling.extra_conditioning):
        return [*lines, f"fewstep.attach(pipe, {place!r}{_keywords(given)})"]
    if student is not None:
        names = f"{str(student.file.parent)!r}, weight_name={student.file.name!r}"
        lines.append(f"pipe.load_lora_weights({names})")
    if student.sampling if student else read_record(folder.path):
        made = f"fewstep.scheduler_for({place!r}, pipe.scheduler.config{_keywords(given)})"
    else:
        given |= {"grid": sampling.grid, "spacing": sampling.spacing, "end": sampling.end, "jump": sampling.step_jump}
        kind = "SSSScheduler" if "gamma" in given else "ConsistencyScheduler"
        made = f"fewstep.{kind}.from_config(pipe.scheduler.config{_keywords(given)})"
    return [*lines, f"pipe.scheduler = {made}"]


def _keywords(given: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in given.items())
