"""The words that choose: one name, one meaning, everywhere. Light, so that configs can be read without torch."""

from __future__ import annotations

from typing import Literal, get_args

from fewstep.errors import UserError, nearest

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""What networks compute in; auto is bf16 where the machine is fast at it, else fp32."""
DeviceName = Literal["auto", "cpu", "cuda"]
"""Where networks run; auto is the GPU where there is one."""
Prediction = Literal["eps", "x0", "v", "flow"]
"""What a network outputs."""
End = Literal["clean", "index0"]
"""Where sampling ends: true clean data, or the least noisy index of the network (sigma = .029 on SD's schedule)."""
Spacing = Literal["grid", "trailing"]
"""How inference times are taken; see `grid.inference_times`."""
SolverName = Literal["ddim", "euler", "dpmpp_2s"]
"""One step of the probability-flow ODE; see `solver`."""
SamplerName = Literal["sss", "lcm", "ddim", "euler", "dpmpp_2s"]
"""How pictures are drawn; see `sampler`."""
Convention = Literal["lcm", "imagen"]
"""Guidance: omega in (1 + omega) eps(c) - omega eps(null), or Imagen's scale 1 + omega."""
Jump = Literal["skip", "first_order"]
"""The student's jump; see `jump`."""
SLaw = Literal["zero", "uniform"]
"""Where jumps land in training."""
Target = Literal["self", "ema"]
"""Who the student must agree with."""
DistanceName = Literal["l2", "huber"]
"""How agreement is measured; see `objectives.distance`."""

TO_TEACHER = " (to teacher)"
"""Added to the name of a distance between sets when it is taken from the teacher's pictures."""
CALLS: dict[str, int] = {"ddim": 1, "euler": 1, "dpmpp_2s": 2, "sss": 1, "lcm": 1}
"""Network calls of one step of a solver or sampler."""


def omega_of(scale: float, convention: Convention) -> float:
    """Guidance in the papers' convention: eps = (1 + omega) eps(c) - omega eps(null). Imagen's scale is 1 + omega."""
    return scale if convention == "lcm" else scale - 1.0


def check_device(name: str) -> None:
    """Refuse a device that is none, without looking for it.

    Raises:
        UserError: another name than auto, cpu, cuda.
    """
    legal = get_args(DeviceName)
    if name not in legal:
        raise UserError(f"device = {name!r} is not one of {', '.join(legal)}; the nearest is {nearest(name, legal)!r}")
