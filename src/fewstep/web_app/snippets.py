"""A drawing as a command, and as code for diffusers."""

from __future__ import annotations

import shlex
from pathlib import Path

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.scheduler_config import is_flow
from fewstep.diffusion.config import Sampling
from fewstep.inference.pipeline import call_settings
from fewstep.students.lora_header import LoraHeader
from fewstep.web_app.models import Models, Request


def as_command(models: Models, request: Request) -> str:
    """Return the command that draws the same picture."""
    folder = models.teacher(request.teacher)
    student = models.student(folder, request.lora).lora
    words = ["fewstep", "sample", request.prompt, "--seed", str(request.seed)]
    if request.teacher:
        words += ["--teacher", request.teacher]
    if models.teacher_config and Path(request.teacher).is_file():
        words += ["--teacher-config", models.teacher_config]
    words += ["--lora", str(student.path) if student else "none"]
    for name, value in request.settings.items():
        shown = "x".join(map(str, value)) if name == "size" else f"{value:g}"
        words += ["-s", f"size={shown}"] if name == "size" else [f"--{name}", shown]
    words += ["--out", "picture.png"]
    return shlex.join(words)


def as_code(models: Models, request: Request) -> str:
    """Return code for diffusers that draws the same picture, up to rounding; for fewstep where diffusers cannot."""
    folder = models.teacher(request.teacher)
    student, own, _ = models.student(folder, request.lora)
    sampling = own.model_copy(update=request.settings)
    lines = _pipeline(folder, student, sampling)
    if not lines:
        changes = "".join(f", {name}={value!r}" for name, value in request.settings.items())
        place = str(student.path) if student else None
        load = f"fewstep.load({str(folder.path)!r}, {place!r})"
        return f"import fewstep\n\n(picture,) = {load}.draw({request.prompt!r}, {request.seed}{changes})\n"
    arguments = {"num_inference_steps": sampling.steps // sampling.calls_a_step, "guidance_scale": 1 + sampling.omega}
    if student and student.sampling and request.omega is None:
        arguments["guidance_scale"] = call_settings(student.file)["guidance_scale"]
    if sampling.size:
        arguments |= {"width": sampling.size[0], "height": sampling.size[1]}
    listed = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    begin = f"\ngenerator = torch.Generator().manual_seed({request.seed})\n"
    if is_flow(folder.noise):
        begin += "pipe.scheduler.generator = generator\n"
    call = f"picture = pipe(\n    {request.prompt!r},\n{listed}    generator=generator,\n).images[0]\n"
    return "import diffusers\nimport fewstep\nimport torch\n\n" + "\n".join(lines) + begin + call


def _pipeline(folder: PipelineFolder, student: LoraHeader | None, sampling: Sampling) -> list[str]:
    """Return the lines that make `pipe`; empty where no scheduler of diffusers draws the same."""
    lines = [f"pipe = diffusers.{folder.pipeline}.from_pretrained({str(folder.path)!r})"]
    file = student.file if student else None
    if sampling.extra_conditioning:
        return [*lines, f"fewstep.attach(pipe, {str(file or folder.path)!r}, gamma={sampling.gamma!r})"]
    if file is not None:
        lines.append(f"pipe.load_lora_weights({str(file.parent)!r}, weight_name={file.name!r})")
    if sampling.sampler not in ("sss", "lcm"):
        return []
    gamma = {"gamma": sampling.gamma} if sampling.sampler == "sss" else {}
    if student and student.sampling:
        given = "".join(f", {name}={value!r}" for name, value in gamma.items())
        return [*lines, f"pipe.scheduler = fewstep.scheduler_for({str(file)!r}, pipe.scheduler.config{given})"]
    kind = "SSSScheduler" if gamma else "ConsistencyScheduler"
    grid = {"grid": sampling.grid, "spacing": sampling.spacing, "end": sampling.end, "jump": sampling.step_jump}
    given = "".join(f", {name}={value!r}" for name, value in {**gamma, **grid}.items())
    return [*lines, f"pipe.scheduler = fewstep.{kind}.from_config(pipe.scheduler.config{given})"]
