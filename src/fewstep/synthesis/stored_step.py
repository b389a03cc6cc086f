"""The teacher's guided step from a stored point, formed from stored predictions: no network is called."""

from __future__ import annotations

from torch import Tensor

from fewstep.jump import land
from fewstep.names import Prediction
from fewstep.schedule import Path, expand, interpret


def guided_output(with_prompt: Tensor, without_prompt: Tensor, omega: Tensor) -> Tensor:
    """(1 + omega) output(c) - omega output(null), for any omega [B]: what `Denoiser.guided` asks the network for."""
    return with_prompt + expand(omega, with_prompt) * (with_prompt - without_prompt)


def step_from_stored(
    path: Path,
    prediction: Prediction,
    x_t: Tensor,
    with_prompt: Tensor,
    without_prompt: Tensor,
    omega: Tensor,
    t: Tensor,
    s: Tensor,
) -> Tensor:
    """The guided DDIM step from a stored point x_t at t to any cleaner s, under any omega.

    It equals `solver.ddim` with the guided teacher there, to the precision that the three tensors are stored in.

    Args:
        prediction: what the stored outputs are.
        x_t, with_prompt, without_prompt: [B, ...].
        omega, t, s: float64 [B].

    Returns:
        x_s, [B, ...].
    """
    output = guided_output(with_prompt, without_prompt, omega)
    estimate = interpret(prediction, output, x_t, expand(path.alpha(t), x_t), expand(path.sigma(t), x_t))
    return land(estimate, path, s)
