"""The consistency objective: two jumps that start on the same path must land on the same point.

    L = d( f_theta(x_{t_n+k}, t_{n+k} -> s), sg f_target(x^_{t_n}, t_n -> s) ),
    x^_{t_n} = one guided step of the frozen teacher from x_{t_n+k}.

Every method of the family is this loss with its choices filled in by a recipe file: LCM jumps to the end point
through a skip connection (arXiv 2310.04378, algorithm 1), TCD jumps anywhere with the first-order trajectory
consistency function (arXiv 2402.19159, algorithm 2; the idea of anytime-to-anytime jumps is CTM's, 2310.02279).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoiser import Condition, Denoiser
from fewstep.draws import Draws
from fewstep.grid import end_time, previous, training_grid
from fewstep.jump import first_order, skip_connection, skip_scalings
from fewstep.loss import Loss
from fewstep.objectives.distance import DISTANCES
from fewstep.roles import BASE
from fewstep.schedule import Path, add_noise, expand
from fewstep.settings import ConsistencyConfig
from fewstep.solver import SOLVERS


@dataclass(frozen=True)
class Pair:
    """The times of a batch, float64 [B] each: t_{n+k} >= t_n >= s (equal at index 0 of a grid that has it)."""

    t_nk: Tensor
    t_n: Tensor
    s: Tensor


def draw_times(config: ConsistencyConfig, path: Path, draws: Draws) -> Pair:
    """Draw t_{n+k} uniformly over the grid, so that every time of the grid is trained, then s.

    Where the grid ends within k points, t_n is the end point. The law `uniform` draws s uniformly from the end point
    and the grid's points up to t_n: t_n itself is included, where the target is the teacher's own point (the anchor
    that rules out the collapsed solution), and so is the end point, where the term is LCM's.
    """
    grid = training_grid(path, config.grid)
    end = end_time(path, config.end)
    index = draws.integers("n", 0, config.grid)
    t_nk, t_n = grid[index], previous(grid, index, config.k, end)
    if config.s == "zero":
        return Pair(t_nk, t_n, torch.full_like(t_n, end))
    choices = (index + 1 - config.k).clamp(min=0) + 1  # end, grid[0], ..., t_n
    m = (draws.uniform("s") * choices.double()).long()
    return Pair(t_nk, t_n, previous(grid, m, 1, end))


def jump(
    config: ConsistencyConfig, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition, role: str
) -> Tensor:
    """f_role(x_t, t -> s), fp32; one network call."""
    estimate = denoiser.estimate(x_t, t, condition, role)
    if config.jump == "skip":
        c_skip, c_out = skip_scalings(t)
        return skip_connection(x_t, estimate, expand(c_skip, x_t), expand(c_out, x_t))
    return first_order(estimate, expand(denoiser.path.alpha(s), x_t), expand(denoiser.path.sigma(s), x_t))


def consistency_loss(
    config: ConsistencyConfig, denoiser: Denoiser, x_0: Tensor, condition: Condition, null: Condition, draws: Draws
) -> Loss:
    """The loss of one micro-batch.

    Args:
        x_0: clean latents, fp32 [B, ...].
        condition, null: what the network is told, with and without the prompt; [B, ...] each.

    One student call with gradient, one target call, and one batched teacher call of 2B for each solver stage.
    """
    path = denoiser.path
    times = draw_times(config, path, draws)
    eps = draws.normal("noise", tuple(x_0.shape[1:]))
    x_nk = add_noise(path, x_0, eps, times.t_nk)
    # The student before the target: autocast of older torch keeps the cast weights of the first call, and those of a
    # call without gradient would leave the student without one.
    landed = jump(config, denoiser, x_nk, times.t_nk, times.s, condition, "student")
    with torch.no_grad():
        omega = draws.uniform("omega", *config.guidance.omegas)
        teacher = denoiser.bind_guided(condition, null, omega, BASE)
        x_n = SOLVERS[config.solver](teacher, path, x_nk, times.t_nk, times.t_n)
        role = "target" if config.target == "ema" else "student"
        wanted = jump(config, denoiser, x_n, times.t_n, times.s, condition, role)
    per_sample = DISTANCES[config.distance](landed, wanted, config.huber_c)
    share = (times.t_nk - path.clean) / (path.noisiest - path.clean)
    return Loss(per_sample.mean(), per_sample.detach(), share)
