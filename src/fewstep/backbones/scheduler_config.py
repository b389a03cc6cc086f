"""The noise path and the prediction type in a diffusers scheduler's config.

Everything but `path_of` works without torch, so that a student's file is checked before it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any

from fewstep.common.choices import Prediction
from fewstep.common.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fewstep.diffusion.schedule import Path

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
"""prediction_type in diffusers -> here."""
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""The keys that determine an indexed path."""
NOISE_KEYS = (*BETAS, "prediction_type", "shift", "use_dynamic_shifting")
"""Keys that are adopted from another scheduler's config even at its own defaults, which are not ours."""
NO_SIGNAL = 1e-24
"""alpha^2 in place of 0 (zero terminal SNR), as in `diffusion.schedule.NO_SIGNAL`."""
NOISE_APART = 1e-4
"""Tolerance for a noise level, as the angle arcsin(sigma), beside that in a student's file: rounding.

sigma itself differs little where the noise is nearly pure: PixArt's betas and the same ones rescaled to zero terminal
SNR are 2e-5 apart there, and 6e-3 as angles."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler is of a flow: by its class, prediction, sigmas, or a shift without betas."""
    by_class = str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("path") == "flow"
    by_key = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(by_class or by_key or ("shift" in config and not any(key.startswith("beta") for key in config)))


def prediction_of(config: Mapping[str, Any], place: str) -> Prediction:
    """Return what the network predicts; eps where a scheduler of betas has no prediction_type.

    Args:
        place: what the config belongs to, for errors.

    Raises:
        UserError: an unknown prediction_type.
    """
    if is_flow(config):
        return "flow"
    name = str(config.get("prediction_type") or "epsilon")
    if name not in PREDICTIONS:
        legal = ", ".join(PREDICTIONS) + did_you_mean(name, PREDICTIONS)
        raise UserError(f"prediction_type = {name!r} of {place} must be one of {legal}")
    return PREDICTIONS[name]


def check_terminal_snr(scheduler: Mapping[str, Any]) -> None:
    """Refuse an eps network on a schedule that ends in pure noise, where x0 = (x - sigma eps)/alpha is undefined.

    Raises:
        UserError: prediction_type epsilon with rescale_betas_zero_snr.
    """
    if scheduler.get("rescale_betas_zero_snr") and scheduler.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "prediction_type = 'epsilon' with zero terminal SNR (rescale_betas_zero_snr) has no x0 at the noisiest "
            "time; use 'v_prediction', or rescale_betas_zero_snr = false"
        )


def shift_of(config: Mapping[str, Any]) -> Any:
    """Return the shift in a flow's config: a solver's `flow_shift`, else `shift`; None where it has neither.

    A solver made from another flow's config keeps that one's `shift` beside its own default `flow_shift`.
    """
    default = "flow_shift" in config.get("_use_default_values", ())
    if config.get("flow_shift") is None or (default and config.get("shift") is not None):
        return config.get("shift")
    return config["flow_shift"]


def flux2_mu(tokens: int, steps: int = 50) -> float:
    """Return FLUX.2's mu for so many tokens: linear in their number, and in the steps up to 4,300 tokens.

    Its pipeline takes the number of steps of each drawing; a teacher has one noise path, that of 50 steps.
    """
    many = 0.00016927 * tokens + 0.45666666
    few = 8.73809524e-05 * tokens + 1.89833333
    return many if tokens > 4300 else few + (many - few) * (steps - 10) / 190


def with_static_shift(config: Mapping[str, Any], tokens: int, mu: float | None = None) -> dict[str, Any]:
    """Replace a shift that depends on the picture's size (`use_dynamic_shifting`) by its value for so many tokens.

    mu is linear in the number of tokens, from `base_shift` to `max_shift`; the shift is exp(mu), or mu itself with
    `time_shift_type = linear`, as in diffusers' Flux and Stable Diffusion 3 pipelines. Any other config is unchanged.

    Args:
        mu: in place of the linear one.
    """
    if not (config.get("use_dynamic_shifting") and is_flow(config)):
        return dict(config)
    low, high = config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = first + (last - first) * (tokens - low) / (high - low) if mu is None else mu
    shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    kept = {key: value for key, value in config.items() if key != "flow_shift"}
    return {**kept, "shift": shift, "use_dynamic_shifting": False}


def adopted_settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of our schedulers in another one's config that differ from our defaults."""
    kept = {key: config[key] for key in NOISE_KEYS if config.get(key) not in (None, defaults[key])}
    if is_flow(config):
        kept |= {"path": "flow", "prediction_type": "flow_prediction"}
        if shift_of(config) is not None:
            kept["shift"] = shift_of(config)
    # LCM's and TCD's schedulers' name of their grid; a grid of ours in their config goes before it
    origin = config.get("original_inference_steps")
    if origin not in (None, defaults["grid"]) and "grid" not in config:
        kept["grid"] = origin
    return kept


def betas_of(config: Mapping[str, Any]) -> list[float] | None:
    """Return the betas of a config by diffusers' formulas, in float64; None for an unknown schedule."""
    if config.get("trained_betas") is not None:
        return [float(beta) for beta in config["trained_betas"]]
    total, kind = int(config.get("num_train_timesteps", 1000)), config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    shares = [i / max(total - 1, 1) for i in range(total)]
    if kind == "linear":
        return [start + u * (end - start) for u in shares]
    if kind == "scaled_linear":
        return [(start**0.5 + u * (end**0.5 - start**0.5)) ** 2 for u in shares]
    if kind == "sigmoid":
        return [start + (end - start) / (1 + math.exp(6 - 12 * u)) for u in shares]
    alpha_bar = {"squaredcos_cap_v2": _cosine, "laplace": _laplace}.get(str(kind))
    return alpha_bar and [min(1 - b / a, 0.999) for a, b in pairwise(alpha_bar(i / total) for i in range(total + 1))]


def _cosine(share: float) -> float:
    return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(share: float) -> float:
    snr = math.exp(math.copysign(0.5, share - 0.5) * math.log(1 - 2 * abs(0.5 - share) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def sigmas_at(config: Mapping[str, Any], times: Iterable[float]) -> list[float] | None:
    """Return sigma at some times of an indexed path, as `diffusion.schedule.VariancePreserving`, without torch.

    None for a broken schedule, which `path_of` refuses.
    """
    try:
        bars = list(accumulate((1 - beta for beta in betas_of(config) or ()), mul))
        if config.get("rescale_betas_zero_snr"):
            first, last = bars[0] ** 0.5, bars[-1] ** 0.5
            bars = [((bar**0.5 - last) * first / (first - last)) ** 2 for bar in bars]
        logs = [0.0, *(math.log(max(bar, NO_SIGNAL)) for bar in bars)]
    except (TypeError, ValueError, LookupError, ArithmeticError):
        return None
    if len(logs) == 1:
        return None
    found = []
    for t in times:
        place = min(max(t + 1, 0.0), len(logs) - 1.0)
        low = min(int(place), len(logs) - 2)
        found.append(math.sqrt(-math.expm1(logs[low] + (place - low) * (logs[low + 1] - logs[low]))))
    return found


def noise_difference(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the first time at which a scheduler's noise differs from a student's, for messages; "" for equal noise.

    Records without `sigmas` (older ones) are not compared, nor are flows, whose sigma is the time.

    Args:
        record: the student's, from its file.
        config: the scheduler's.
    """
    times, sigmas = record.get("times"), record.get("sigmas")
    if is_flow(config) or not (isinstance(times, list) and isinstance(sigmas, list)):
        return ""
    if not all(isinstance(number, int | float) for number in [*times, *sigmas]):
        return ""
    for t, sigma, own in zip(times, sigmas, sigmas_at(config, times) or ()):
        if not abs(math.asin(min(max(sigma, 0.0), 1.0)) - math.asin(min(own, 1.0))) <= NOISE_APART:
            kept = {key: config[key] for key in BETAS[1:] if config.get(key) is not None}
            words = ", ".join(f"{key} = {'...' if key == 'trained_betas' else repr(kept[key])}" for key in kept)
            return f"sigmas = {sigma:.6g} at time {t:g}; {words or 'its betas'} make it {own:.6g}"
    return ""


def path_of(config: Mapping[str, Any]) -> Path:
    """Return the noise path: a flow by its shift, any other from diffusers' own table of betas, for exact parity.

    Raises:
        UserError: a broken or unknown schedule, or a shift that is not above 0.
    """
    from fewstep.diffusion.schedule import FlowMatching, VariancePreserving

    if is_flow(config):
        shift = shift_of(config)
        if shift is not None and not (isinstance(shift, int | float) and shift > 0):
            raise UserError(f"shift = {shift!r} of a flow's scheduler must be a number above 0")
        return FlowMatching(float(shift or 1.0))
    from diffusers import DDPMScheduler

    settings = {key: config[key] for key in BETAS if key in config}
    try:
        table = DDPMScheduler(**settings).alphas_cumprod
        if table.dim() != 1 or len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("its betas are not from 0 to 1")
    except Exception as error:  # diffusers' own errors for broken numbers and words
        words = ", ".join(f"{key} = {settings[key]!r}"[:80] for key in BETAS if key in settings)
        raise UserError(f"cannot load the scheduler config ({words}): {' '.join(str(error).split())[:300]}") from error
    return VariancePreserving.from_alphas_cumprod(table)
