"""A student's settings, read from its file, and its sampler; needs torch alone.

The sampler is strategic stochastic sampling (TCD, arXiv 2402.19159, algorithm 4) in ComfyUI's own scale. There a model
of discrete times is x = x0 + sigma z, one of a flow x = (1 - sigma) x0 + sigma z; a jump lands at
s = (1 - gamma) t_next, and noise brings it back up to t_next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TLCM_TIMES = {
    1: (8,),
    2: (8, 4),
    3: (8, 4, 1),
    4: (8, 6, 4, 1),
    5: (8, 6, 4, 2, 1),
    6: (8, 6, 4, 3, 2, 1),
    7: (8, 6, 5, 4, 3, 2, 1),
    8: (8, 7, 6, 5, 4, 3, 2, 1),
}
"""TLCM's own times, in eighths of the path, by the number of calls."""
PACKED = ("flux", "chroma", "krea2")
"""Families whose pipelines draw a step's noise on packed latents."""
TOTAL = 1000
"""Training times of a model."""


@dataclass(frozen=True)
class Settings:
    """Inference settings of a student.

    Attributes:
        times: of the network calls, falling, in training indices (of a flow: before its shift).
        gamma: stochasticity, 0 to 1; 1 re-noises fully, as multistep consistency sampling does.
        law: what gamma is linear in: time (TCD) or noise (CTM).
        end: where the last jump lands: index0, the least noise of training, or clean.
        skip: LCM's own jump, onto clean data through its skip connection.
    """

    times: tuple[float, ...]
    gamma: float = 0.3
    law: str = "time"
    end: str = "index0"
    skip: bool = False


def grid_times(steps: int, grid: Any = 50, spacing: str = "grid", *, flow: bool = False) -> tuple[float, ...]:
    """Return the times of `steps` calls, falling, from the student's training grid.

    Raises:
        ValueError: the grid has fewer.
    """
    if spacing == "tlcm":
        if steps not in TLCM_TIMES:
            raise ValueError(f"steps = {steps} must be from 1 to 8 with TLCM's times")
        return tuple(n * TOTAL / 8 - (0 if flow else 1) for n in TLCM_TIMES[steps])
    if spacing == "trailing":
        falling = [TOTAL - i * TOTAL / steps for i in range(steps)]
        return tuple(t if flow else round(t) - 1 for t in falling)
    less = 0 if flow else 1
    points = list(grid) if isinstance(grid, (list, tuple)) else [n * TOTAL / grid - less for n in range(1, grid + 1)]
    if not 1 <= steps <= len(points):
        raise ValueError(f"steps = {steps} must be from 1 to {len(points)}")
    falling = points[::-1]
    return tuple(falling[i * len(points) // steps] for i in range(steps))


def settings_of(record: dict[str, Any], steps: int = 0, gamma: float = -1.0) -> Settings:
    """Return the settings in a student's record, with other steps or gamma if given.

    Raises:
        ValueError: another sampler or jump, or extra conditioning.
    """
    own = record.get("sampling", {})
    sampler, jump = own.get("sampler", "sss"), own.get("jump") or ""
    embedded = bool(record.get("guidance", {}).get("embedded"))
    extra = bool(own.get("extra_conditioning"))
    if sampler not in ("sss", "lcm") or jump in ("second_order", "cm_skip") or extra or embedded:
        parts = [f"sampler {sampler}"]
        parts += [f"jump {jump}"] * bool(jump) + ["extra conditioning"] * extra + ["a UNet that embeds w"] * embedded
        how = ", ".join(parts)
        raise ValueError(f"this student needs {how}, which ComfyUI lacks; draw with `fewstep sample`")
    flow = record.get("path") == "flow"
    count = steps or int(own.get("steps", 4))
    times = grid_times(count, own.get("grid", 50), own.get("spacing", "grid"), flow=flow)
    skip = sampler == "lcm" and jump in ("", "skip")
    strength = 1.0 if sampler == "lcm" else float(own.get("gamma", 0.3)) if gamma < 0 else gamma
    law = own.get("gamma_law", "time")
    if law not in ("time", "noise"):
        raise ValueError(f"gamma_law = {law!r} must be time or noise")
    return Settings(times, strength, law, "clean" if skip else own.get("end", "index0"), skip)


@dataclass(frozen=True)
class Scale:
    """A model's path in ComfyUI's own scale.

    Attributes:
        sigma_of: time (as in `Settings`) -> sigma.
        flow: x = (1 - sigma) x0 + sigma z; else x = x0 + sigma z.
    """

    sigma_of: Callable[[float], float]
    flow: bool

    def alpha(self, sigma: float) -> float:
        """Return the factor of x0."""
        return 1 - sigma if self.flow else 1.0

    def lowest(self, end: str) -> float:
        """Return sigma of the end point."""
        return 0.0 if end == "clean" else self.sigma_of(1.0 if self.flow else 0.0)

    def handed_back(self, x: torch.Tensor, end: float) -> torch.Tensor:
        """Return a latent that ComfyUI's `inverse_noise_scaling` at the last sigma turns into x."""
        return x * (1 - end) if self.flow else x

    def landing(self, settings: Settings, then: float) -> float:
        """Return sigma of a jump's landing, before noise is added up to the time `then`."""
        low = self.lowest(settings.end)
        if settings.gamma == 1:
            return low
        if settings.law == "noise":
            now = self.sigma_of(then)
            ratio = math.sqrt(1 - settings.gamma**2) * now / self.alpha(now)
            return max(low, ratio / (1 + ratio) if self.flow else ratio)
        s = (1 - settings.gamma) * then
        return max(low, self.sigma_of(s if self.flow or settings.gamma == 0 else math.floor(s + 1e-9)))


def sample(
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    settings: Settings,
    scale: Scale,
    noise: Callable[[], torch.Tensor],
    report: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda i, x, x0: None,
) -> torch.Tensor:
    """Sample from x at the first time; return the end point in the scale of the model's training.

    Args:
        denoise: (x, sigma) -> x0.
        noise: fresh standard normal noise like x.
        report: called with (number of the call, x, x0).
    """
    sigmas = [scale.sigma_of(t) for t in settings.times]
    for i, sigma in enumerate(sigmas):
        x0 = denoise(x, sigma)
        report(i, x, x0)
        eps = (x - scale.alpha(sigma) * x0) / sigma
        if settings.skip:  # LCM's c_skip and c_out, of x in the scale of training
            size = 1.0 if scale.flow else 1 / math.sqrt(1 + sigma**2)
            t = 10 * (TOTAL * sigma if scale.flow else settings.times[i])
            x0 = 0.25 / (t**2 + 0.25) * size * x + t / math.sqrt(t**2 + 0.25) * x0
        last = i + 1 == len(sigmas)
        s = scale.lowest(settings.end) if last else scale.landing(settings, settings.times[i + 1])
        x = scale.alpha(s) * x0 + s * eps
        if not last and settings.gamma > 0:
            then = sigmas[i + 1]
            ratio = scale.alpha(then) / scale.alpha(s)
            x = ratio * x + math.sqrt(max(then**2 - (ratio * s) ** 2, 0.0)) * noise()
    end = scale.lowest(settings.end)
    return x if scale.flow else x / math.sqrt(1 + end**2)


def unpacked(noise: torch.Tensor) -> torch.Tensor:
    """Rearrange noise [B, C, 2h, 2w] that was drawn as Flux's pipeline draws a step's: tokens of 2 x 2 points."""
    b, c, height, width = noise.shape
    tokens = noise.reshape(b, height // 2, width // 2, c, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(noise.shape)


def noise_after_the_first(x: torch.Tensor, seed: int, *, packed: bool = False) -> Callable[[], torch.Tensor]:
    """Return a function for each step's noise: the numbers of a CPU generator after those of the initial latent.

    Args:
        packed: rearrange each step's noise as Flux's latents are packed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    torch.randn(x.shape, generator=generator)

    def noise() -> torch.Tensor:
        drawn = torch.randn(x.shape, generator=generator)
        return (unpacked(drawn) if packed else drawn).to(x)

    return noise


def scale_of(model_sampling: Any, shift: float | None = None) -> Scale:
    """Return the path of a loaded model.

    Args:
        shift: of a flow, from the student's file: a student has the times of its training at every size of pictures.
            None for the model's own, which of Flux follows from the picture's size (ModelSamplingFlux).

    Raises:
        ValueError: neither discrete times nor a flow with a shift.
    """
    kinds = {kind.__name__ for kind in type(model_sampling).__mro__}
    if kinds & {"ModelSamplingDiscreteFlow", "ModelSamplingFlux"}:
        own = float(model_sampling.shift)
        factor = shift or (math.exp(own) if "ModelSamplingFlux" in kinds else own)

        def shifted(t: float) -> float:
            return factor * (t / TOTAL) / (1 + (factor - 1) * (t / TOTAL))

        return Scale(shifted, True)
    if "ModelSamplingDiscrete" in kinds:
        return Scale(lambda t: float(model_sampling.sigma(torch.tensor(float(t)))), False)
    raise ValueError(f"{type(model_sampling).__name__} has neither discrete times nor a flow with a shift")


def guidance_of(record: dict[str, Any]) -> tuple[float, float]:
    """Return the cfg of a student, and its guidance as an input of the network (Flux dev; 1 elsewhere)."""
    own = record.get("guidance", {})
    scale = float(own.get("scale", 1.0))
    return (1.0, scale) if own.get("told") else (scale, 1.0)


def check_model(record: dict[str, Any], model_sampling: Any) -> None:
    """Refuse a model whose prediction type in ComfyUI differs from the student's.

    Raises:
        ValueError: naming both.
    """
    kinds = {kind.__name__ for kind in type(model_sampling).__mro__}
    found = "v" if "V_PREDICTION" in kinds else "flow" if "CONST" in kinds else "eps"
    wanted = record.get("prediction", found)
    if wanted != found:
        raise ValueError(
            f"the student predicts {wanted}, ComfyUI's model {found}; put a ModelSamplingDiscrete node before this one"
        )


def read_record(path: str) -> dict[str, Any]:
    """Read the record in a student's metadata.

    Raises:
        ValueError: there is none.
    """
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    text = header.get("__metadata__", {}).get("fewstep")
    if not text:
        raise ValueError(f"{path} has no settings in its metadata; use a file that `fewstep export` wrote")
    record: dict[str, Any] = json.loads(text)
    return record
