"""The teacher's guided walk from noise down a grid to the end point, and what is kept of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.common.choices import SolverName
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.samplers import start_size, step_between


@dataclass(frozen=True)
class Walk:
    """How the teacher is followed.

    Attributes:
        times: of the points, rising, [N + 1]: the end point, then the grid.
        guided: whether the steps are guided at all.
    """

    denoiser: Denoiser
    times: tuple[float, ...]
    solver: SolverName
    guided: bool

    def voice(self, denoiser: Denoiser, condition: Condition, null: Condition, omega: Tensor) -> ConditionedDenoiser:
        """The teacher under the conditions of a batch."""
        voice = ConditionedDenoiser(denoiser, condition, BASE)
        return replace(voice, null=null, omega=omega) if self.guided else voice

    def steps(self, voice: ConditionedDenoiser, x: Tensor) -> Iterator[Tensor]:
        """Step from x at the noisiest time; yields x at each time below it, the end point last."""
        path = voice.denoiser.path
        for t, s in zip(self.times[:0:-1], self.times[-2::-1], strict=True):
            now, then = (torch.full((len(x),), u, dtype=torch.float64) for u in (t, s))
            x = step_between(path, t, s, self.solver)(voice.denoise, path, x, now, then)
            yield x


Drawn = dict[str, Tensor]
"""What is kept of a batch of walks, by the name that it has in a shard."""


@torch.no_grad()
def end_points(
    walk: Walk, condition: Condition, null: Condition, omega: Tensor, noise: Tensor, kind: torch.dtype
) -> Drawn:
    """Where walks end.

    Args:
        omega: guidance of each, float64 [B].
        noise: standard normal, [B, ...].
        kind: type to keep it in.

    Returns:
        `latents` [B, ...], on the CPU.
    """
    voice = walk.voice(walk.denoiser, condition, null, omega)
    (x,) = deque(walk.steps(voice, noise * start_size(walk.denoiser.path)), maxlen=1)
    return {"latents": x.to("cpu", kind)}


@torch.no_grad()
def trajectories(
    walk: Walk, condition: Condition, null: Condition, omega: Tensor, noise: Tensor, kind: torch.dtype
) -> Drawn:
    """Whole walks, with what the network said at every point of the grid.

    Its own outputs are kept, with and without the prompt, because guidance commutes with their conversion to x0 and
    eps (`Denoiser.guided`): from them the guided estimate of any omega can be formed. Where the walk itself has no
    guidance the output without the prompt is asked for beside it. Of a solver with two calls a step the first one is
    kept, which is at the point.

    Returns:
        `latents` [B, ...]; `points` [B, N + 1, ...], the end point first, then the points at the grid's rising times;
        `with_prompt`, `without_prompt` [B, N, ...], the outputs at the points of the grid, rising. On the CPU.
    """
    plain = walk.denoiser
    outputs: list[Tensor] = []

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        outputs.append(plain.call(x, t, condition, role))
        return outputs[-1]

    def keep(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", kind)

    x = noise * start_size(plain.path)
    points, said, unsaid = [keep(x)], [], []
    walked = walk.steps(walk.voice(replace(plain, call=call), condition, null, omega), x)
    for t in walk.times[:0:-1]:
        before, x = x, next(walked)
        if walk.guided:
            with_prompt, without = outputs[0].chunk(2)
        else:
            now = torch.full((len(x),), t, dtype=torch.float64)
            with_prompt, without = outputs[0], plain.call(before, now, null, BASE)
        outputs.clear()
        points.append(keep(x))
        said.append(keep(with_prompt))
        unsaid.append(keep(without))
    rising = {"points": points, "with_prompt": said, "without_prompt": unsaid}
    return {"latents": points[-1], **{name: torch.stack(parts[::-1], 1) for name, parts in rising.items()}}
