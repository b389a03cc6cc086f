"""Trajectories of the teacher: the solver loop that draws them, and their stored points as training data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.common.mapped_tensors import MappedRows
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser
from fewstep.diffusion.jump import Step
from fewstep.diffusion.samplers import start_size


@dataclass(frozen=True)
class TeacherOde:
    """The teacher's probability-flow ODE from noise to the end point, one solver step between neighbouring times.

    Attributes:
        times: of the points, rising, [N + 1]: the end point, then the grid.
        step: (t, s) -> the solver's step between these times.
        guided: whether the steps are guided.
    """

    denoiser: Denoiser
    times: Sequence[float]
    step: Callable[[float, float], Step]
    guided: bool

    def teacher(self, denoiser: Denoiser, condition: Condition, null: Condition, omega: Tensor) -> ConditionedDenoiser:
        """Return the teacher under the conditions and the guidance, float64 [B], of a batch."""
        plain = ConditionedDenoiser(denoiser, condition, BASE)
        return replace(plain, null=null, omega=omega) if self.guided else plain

    def solve(self, teacher: ConditionedDenoiser, x: Tensor) -> Iterator[Tensor]:
        """Step from x at the noisiest time; yield x at each time below it, the end point last."""
        path = self.denoiser.path
        for t, s in zip(self.times[:0:-1], self.times[-2::-1], strict=True):
            now, then = (torch.full((len(x),), u, dtype=torch.float64) for u in (t, s))
            x = self.step(t, s)(teacher.denoise, path, x, now, then)
            yield x

    @torch.no_grad()
    def end_points(self, condition: Condition, null: Condition, omega: Tensor, noise: Tensor) -> Tensor:
        """Return the end points of trajectories from standard normal `noise`, [B, ...]."""
        teacher = self.teacher(self.denoiser, condition, null, omega)
        (x,) = deque(self.solve(teacher, noise * start_size(self.denoiser.path)), maxlen=1)
        return x

    @torch.no_grad()
    def points(self, condition: Condition, null: Condition, omega: Tensor, noise: Tensor) -> Tensor:
        """Return whole trajectories from standard normal `noise`, fp32 [B, N + 1, ...], at rising times."""
        x = noise * start_size(self.denoiser.path)
        teacher = self.teacher(self.denoiser, condition, null, omega)
        return torch.stack([x, *self.solve(teacher, x)][::-1], 1).float()

    @torch.no_grad()
    def with_outputs(
        self, condition: Condition, null: Condition, omega: Tensor, noise: Tensor, kind: torch.dtype
    ) -> dict[str, Tensor]:
        """Return whole trajectories from standard normal `noise` with the network's outputs at every grid point.

        The outputs with and without the prompt are kept apart: guidance commutes with their conversion to x0 and eps
        (`Denoiser.guided`), so that they give the guided estimate of any omega. Where the steps are not guided, the
        output without the prompt is one call more. Of a solver with two calls a step the first one is kept, which is
        at the point.

        Args:
            kind: type of the result, which is on the CPU.

        Returns:
            `latents` [B, ...]; `points` [B, N + 1, ...], at rising times; `with_prompt` and `without_prompt`
            [B, N, ...], the outputs at the points of the grid, at rising times.
        """
        plain = self.denoiser
        outputs: list[Tensor] = []

        def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
            outputs.append(plain.call(x, t, condition, role))
            return outputs[-1]

        def keep(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", kind)

        x = noise * start_size(plain.path)
        points, with_prompt, without_prompt = [keep(x)], [], []
        solved = self.solve(self.teacher(replace(plain, call=call), condition, null, omega), x)
        for t in self.times[:0:-1]:
            before, x = x, next(solved)
            if self.guided:
                conditional, unconditional = outputs[0].chunk(2)
            else:
                now = torch.full((len(x),), t, dtype=torch.float64)
                conditional, unconditional = outputs[0], plain.call(before, now, null, BASE)
            outputs.clear()
            points.append(keep(x))
            with_prompt.append(keep(conditional))
            without_prompt.append(keep(unconditional))
        falling = {"points": points, "with_prompt": with_prompt, "without_prompt": without_prompt}
        return {"latents": points[-1], **{name: torch.stack(parts[::-1], 1) for name, parts in falling.items()}}


@dataclass(frozen=True)
class Trajectories:
    """The stored trajectories of a training set.

    Attributes:
        points: [N, n + 1, ...]: the end point, then the points at the grid's rising times.
        omega: guidance of each, float64 [N].
        outputs: the network's outputs at the grid's times with and without the prompt, [N, n, ...] each; None if they
            are not stored.
    """

    points: MappedRows
    omega: Tensor
    outputs: tuple[MappedRows, MappedRows] | None = None

    def point(self, items: Tensor, index: Tensor) -> Tensor:
        """Return x of samples at times of the grid, int64 [B] each -> [B, ...] as stored; index -1 is the end point."""
        return self.points.at(items, index + 1)
