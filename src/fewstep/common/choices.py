"""Legal values of settings, one meaning each; importable without torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from fewstep.common.errors import UserError, did_you_mean

BaseFormat = Literal["fp32", "bf16", "8bit", "4bit"]
"""How frozen weights are kept."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""What networks compute in; auto is bf16 where the machine is fast at it, else fp32."""
DeviceName = Literal["auto", "cpu", "cuda"]
"""Where networks run; auto is the GPU where there is one."""
Prediction = Literal["eps", "x0", "v", "flow"]
"""What a network outputs."""
End = Literal["clean", "index0"]
"""Where sampling ends: true clean data, or the least noisy index of the network (sigma = .029 on SD's schedule)."""
Spacing = Literal["grid", "trailing", "tlcm"]
"""How inference times are taken; see `diffusion.grid.inference_times`."""
SolverName = Literal["ddim", "euler", "heun", "dpm_2", "dpmpp_2s"]
"""One step of the probability-flow ODE; see `diffusion.solver`."""
SamplerName = Literal["sss", "lcm", "ddim", "euler", "heun", "dpm_2", "dpmpp_2s", "sde_dpmpp_2m"]
"""How pictures are drawn; see `diffusion.samplers`."""
GammaRule = Literal["time", "noise"]
"""What gamma is linear in: time, s = (1 - gamma) t (TCD), or the fresh noise's standard deviation (CTM)."""
Convention = Literal["lcm", "imagen", "none"]
"""Guidance: omega in (1 + omega) eps(c) - omega eps(null), Imagen's scale 1 + omega, or no guidance at all."""
Jump = Literal["skip", "cm_skip", "first_order", "second_order"]
"""The student's jump; see `diffusion.jump`."""
Form = Literal["x0", "eps"]
"""What a second-order jump blends: data or noise predictions."""
ExtraCondition = Literal["s", "w"]
"""Inputs of a network beside x_t, t and the prompt: the landing s, and the guidance omega."""
Start = Literal["data", "trajectory", "rollout", "student", "simulation", "noise"]
"""Where x_{t_n+k} comes from: noised data, a stored trajectory of the teacher, a few of its steps from noise, the
student's own samples, noised, the student's own steps from noise, down to t_{n+k}, or pure noise alone."""
Follow = Literal["teacher", "start"]
"""Whose steps lead from x_{t_n+k} to x_{t_n}: the teacher's, or those of the student that a run starts from."""
Point = Literal["solver", "path", "self", "stored", "eulerian", "lagrangian"]
"""Where x_{t_n} comes from: the teacher's solver, the same path (the same noise on the data; the stored point), the
target's own jump (shortcut models), or a step by the teacher's stored outputs. The last two are limits of neighbours:
t_n -> t_{n+k} by the teacher's step, and t_n -> s by the student's own jump; see `methods.tangent`."""
Coordinates = Literal["linear", "trig"]
"""Coordinates of the limits: rectified flow's (velocity eps - x0), or TrigFlow's (v)."""
Derivative = Literal["auto", "forward", "finite"]
"""How the limits differentiate a network: forward mode, finite differences, or what its operations allow."""
SRule = Literal["edge", "uniform", "inference", "next"]
"""Where jumps land in training; see `methods.times`."""
Compare = Literal["landing", "end"]
"""Where two jumps are compared: where they land, or pushed on to the end point by the target."""
AdversarialKind = Literal["hinge", "nonsaturating"]
"""The adversarial losses; see `methods.adversarial`."""
Weight = Literal["none", "eps", "x0", "v", "velocity", "step", "learned"]
"""Differences are divided by the landing's derivative with respect to eps (x0, v, the velocity eps - x0 of a flow); or
the loss by the step's width in noise level (iCT), or by its own mean at each time, which is learned (sCM)."""
Target = Literal["self", "ema"]
"""Weights of the target: the student's own under stop-gradient, or their moving average."""
Normaliser = Literal["dmd", "score", "none"]
"""Divisor of the gap of two scores; see `methods.distribution_matching`."""
Levels = Literal["all", "jump"]
"""Noise levels at which scores are compared: all, or those that the jump crosses, from s to t_{n+k}."""
Matched = Literal["landing", "simulation"]
"""What is matched: the jump's landing, or the end of the student's own steps from noise."""
DistanceName = Literal["l2", "huber", "huber_norm", "normalised", "adaptive", "features", "latent_lpips"]
"""Distance of two landings; see `methods.distances`."""

CALLS: dict[str, int] = {
    **{"ddim": 1, "euler": 1, "heun": 2, "dpm_2": 2, "dpmpp_2s": 2},
    **{"sss": 1, "lcm": 1, "sde_dpmpp_2m": 1},
}
"""Network calls of one step of a solver, or of a sampler with a first-order jump."""


CALLS_OF_JUMP: dict[Jump, int] = {"skip": 1, "cm_skip": 1, "first_order": 1, "second_order": 2}
"""Network calls of one jump of a student."""


def omega_of(scale: float, convention: Convention) -> float:
    """Return omega of eps = (1 + omega) eps(c) - omega eps(null), the papers' convention; 0 without guidance.

    Imagen's scale is 1 + omega.
    """
    return {"lcm": scale, "imagen": scale - 1.0, "none": 0.0}[convention]


def check_choice(field: str, name: str, legal: Collection[str]) -> None:
    """Refuse a word that is not one of the legal ones."""
    if name not in legal:
        raise UserError(f"{field} = {name!r} is not one of {', '.join(legal)}{did_you_mean(name, legal)}")


def check_device(name: str) -> None:
    """Refuse an unknown device name; the device itself need not exist."""
    check_choice("device", name, get_args(DeviceName))
