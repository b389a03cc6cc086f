"""What a diffusers scheduler's config says: the noise path, and what the network predicts on it.

Light but for `path_of`: a student's file is held against it before torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewstep.errors import UserError, nearest
from fewstep.names import Prediction

if TYPE_CHECKING:
    from fewstep.schedule import Path

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
"""diffusers' words for what a network outputs, and ours."""
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""The keys that decide an indexed path."""
NOISE_KEYS = (*BETAS, "prediction_type", "shift", "use_dynamic_shifting")
"""What is taken over from another scheduler even where it is that scheduler's own default, which is not ours."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether it is a scheduler of a flow: by its class, its prediction, its sigmas, or a shift without betas."""
    named = str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("path") == "flow"
    said = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(named or said or ("shift" in config and not any(key.startswith("beta") for key in config)))


def prediction_of(config: Mapping[str, Any], place: str) -> Prediction:
    """What the network predicts; eps where a scheduler with betas does not say.

    Args:
        place: what the config belongs to, for errors.

    Raises:
        UserError: a word that diffusers does not know either.
    """
    if is_flow(config):
        return "flow"
    name = str(config.get("prediction_type") or "epsilon")
    if name not in PREDICTIONS:
        legal = ", ".join(PREDICTIONS)
        raise UserError(
            f"prediction_type = {name!r} of {place} is none of {legal}; the nearest is {nearest(name, PREDICTIONS)!r}"
        )
    return PREDICTIONS[name]


def check_terminal_snr(scheduler: Mapping[str, Any]) -> None:
    """Refuse an eps network on a schedule that ends in pure noise: x0 = (x - sigma eps)/alpha is not there.

    Raises:
        UserError: it is one.
    """
    if scheduler.get("rescale_betas_zero_snr") and scheduler.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "prediction_type = 'epsilon' with zero terminal SNR (rescale_betas_zero_snr) has no x0 at the noisiest "
            "time; the nearest legal one is 'v_prediction', or rescale_betas_zero_snr = false"
        )


def shift_of(config: Mapping[str, Any]) -> Any:
    """The shift in a flow's config: a solver's `flow_shift`, else `shift`; None where it has neither.

    A solver that took a flow's config over keeps that one's `shift` beside its own default `flow_shift`, which nobody
    asked for.
    """
    unsaid = "flow_shift" in config.get("_use_default_values", ())
    if config.get("flow_shift") is None or (unsaid and config.get("shift") is not None):
        return config.get("shift")
    return config["flow_shift"]


def settled(config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A config whose shift goes by the picture's size (`use_dynamic_shifting`) -> one with that of so many tokens.

    mu runs linearly in the number of tokens, from `base_shift` to `max_shift`; the shift is exp(mu), or mu itself by
    `time_shift_type = linear`: diffusers' Flux and Stable Diffusion 3 pipelines. Any other config stays as it is.
    """
    if not (config.get("use_dynamic_shifting") and is_flow(config)):
        return dict(config)
    low, high = config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = first + (last - first) * (tokens - low) / (high - low)
    shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    kept = {key: value for key, value in config.items() if key != "flow_shift"}
    return {**kept, "shift": shift, "use_dynamic_shifting": False}


def taken_over(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ours that another scheduler's config decides, where they are not our defaults."""
    kept = {key: config[key] for key in NOISE_KEYS if config.get(key) not in (None, defaults[key])}
    if is_flow(config):
        kept |= {"path": "flow", "prediction_type": "flow_prediction"}
        if shift_of(config) is not None:
            kept["shift"] = shift_of(config)
    # what LCM's and TCD's schedulers call their grid; a grid of ours that they took over says more
    origin = config.get("original_inference_steps")
    if origin not in (None, defaults["grid"]) and "grid" not in config:
        kept["grid"] = origin
    return kept


def path_of(config: Mapping[str, Any]) -> Path:
    """The noise path: a flow by its shift, any other from diffusers' own table of betas, for exact parity with it.

    Raises:
        UserError: a schedule that diffusers does not know, or a shift that is none.
    """
    from fewstep.schedule import FlowMatching, VariancePreserving

    if is_flow(config):
        shift = shift_of(config)
        if shift is not None and not (isinstance(shift, int | float) and shift > 0):
            raise UserError(f"shift = {shift!r} of a flow's scheduler is not above 0; the nearest legal one is 1.0")
        return FlowMatching(float(shift or 1.0))
    from diffusers import DDPMScheduler

    settings = {key: config[key] for key in BETAS if key in config}
    try:
        table = DDPMScheduler(**settings).alphas_cumprod
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"cannot load the scheduler config: {' '.join(str(error).split())[:300]}") from error
    return VariancePreserving.from_alphas_cumprod(table)
