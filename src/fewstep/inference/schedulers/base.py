"""Base of our diffusers schedulers: paths, times, and a jump made one network call at a time.

The pipeline owns the sampling loop and calls `step`; `few_step` holds the two samplers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.backbones.scheduler_config import PREDICTIONS, adopted_settings, check_terminal_snr, path_of
from fewstep.common.errors import UserError
from fewstep.diffusion.grid import times_below, times_within
from fewstep.diffusion.jump import Step, student_step
from fewstep.diffusion.samplers import PlannedJump, start_size
from fewstep.diffusion.schedule import (
    Estimate,
    FlowMatching,
    Path,
    VariancePreserving,
    add_noise,
    expand,
    index_of,
    interpret,
    share_of,
)
from fewstep.inference.schedulers.checks import (
    SchedulerError,
    check_count,
    check_origin,
    check_strength,
    check_words,
    count_of_sigmas,
    scheduler_errors,
)
from fewstep.inference.schedulers.replay import ReplayError, replay_outputs, replayed_times

COMPATIBLE = [
    *("TCDScheduler", "LCMScheduler", "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler"),
]
"""diffusers' schedulers of the same noise: a pipeline may exchange any of them for ours, and back."""


@dataclass
class FewStepOutput(BaseOutput):  # type: ignore[misc]
    """Output of a step.

    Attributes:
        prev_sample: input of the next network call, [B, ...].
        pred_original_sample: x0 by this call, for previews.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Base class of our schedulers.

    Attributes:
        step_index: index in `timesteps` of the next network call; None before the first.
        begin_index: index in `timesteps` that the pipeline begins at, if it has set one.
        generator: generator (or one per picture) of the noise between jumps, for pipelines that pass none to `step`:
            Stable Diffusion 3, Flux and SANA.
    """

    _compatibles = COMPATIBLE

    def _start(self, jumps: Sequence[str]) -> None:
        """Set up from the config; the last call of a scheduler's __init__.

        Args:
            jumps: legal words of the setting `jump`.

        Raises:
            ValueError: an illegal word.
        """
        config = dict(self.config)
        check_words(config, jumps)
        with scheduler_errors():
            check_terminal_snr(config)
            self.noise_path: Path = path_of(config if config["path"] == "vp" else {**config, "use_flow_sigmas": True})
        self._own_path = self.noise_path
        flow = config["path"] == "flow"
        self.prediction = PREDICTIONS["flow_prediction" if flow else config["prediction_type"]]
        if isinstance(self.noise_path, VariancePreserving):
            bars = self.noise_path.log_alpha_bar.exp()
            self.alphas_cumprod = bars[1:].float()
            trained = config["trained_betas"]
            betas = 1 - bars[1:] / bars[:-1] if trained is None else torch.tensor(np.asarray(trained))
            self.betas = betas.float()
        self.init_noise_sigma = float(start_size(self.noise_path))
        self.order = 2 if config.get("jump") == "second_order" else 1
        self.num_inference_steps: int | None = None
        total = int(config["num_train_timesteps"])
        self.timesteps = torch.arange(total - 1, -1, -1)
        self.generator: Any = None
        self._jumps: list[PlannedJump] = []
        self._call_times: list[float] = []
        self._reset()

    def _reset(self) -> None:
        """Drop the state of the current drawing."""
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self._outputs: list[Estimate] = []
        self._jump_start: Tensor | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from any scheduler's config: its noise schedule and prediction type, and our own settings.

        Raises:
            ValueError: a schedule that diffusers does not have.
        """
        if isinstance(config, Mapping):
            own = inspect.signature(cls.__init__).parameters
            kwargs = {**adopted_settings(config, {name: value.default for name, value in own.items()}), **kwargs}
            config = {key: value for key, value in config.items() if key != "flow_shift"}  # ours is `shift`
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at an index of `timesteps`, as image-to-image pipelines do.

        Raises:
            ValueError: the index is the second network call of a jump.
        """
        if self.num_inference_steps is not None:
            self._check_begin(begin_index)
        self.begin_index = begin_index

    def _check_begin(self, place: int) -> None:
        """Refuse an index of `timesteps` at which no jump begins.

        Between the two calls of a second-order jump the latents are its mid-point. The jump also needs its start and
        its first prediction, which only the scheduler that made the first call has.
        """
        if place < 0 or place % self.order:
            raise SchedulerError(
                f"begin_index = {place} must be a multiple of {self.order}, the network calls of a jump; draw with one "
                "pipeline, or split the drawing between two with jump = 'first_order'"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        strength: float = 1.0,
        original_inference_steps: int | None = None,
    ) -> None:
        """Set the times of a drawing from the student's training grid.

        Args:
            num_inference_steps: number of jumps.
            timesteps: times instead, falling, on the network's scale; those above `strength` are left out.
            sigmas: only their number is used, see `count_of_sigmas`.
            mu: size-dependent shift of a pipeline; required with `use_dynamic_shifting`, else ignored.
            strength: share of the noisiest time to begin at (image to image), with all jumps below it.
            original_inference_steps: points of the training grid, as diffusers' LCM pipelines pass it; must be `grid`.

        Raises:
            ValueError: an illegal number, time or strength, or a missing `mu`.
        """
        config = self.config
        if original_inference_steps is not None:
            check_origin(original_inference_steps, config["grid"])
        if sigmas is not None:
            num_inference_steps = count_of_sigmas(sigmas, num_inference_steps)
        if (num_inference_steps is None) == (timesteps is None):
            raise SchedulerError("give either num_inference_steps or timesteps", field="timesteps")
        sized = bool(config.get("use_dynamic_shifting")) and isinstance(self._own_path, FlowMatching)
        if sized and mu is None:
            raise SchedulerError(
                "mu = None, but use_dynamic_shifting = True needs the shift for the picture's size; give mu, or use a "
                "student's own shift by fewstep.scheduler_for"
            )
        check_strength(strength)
        self.noise_path = self._own_path  # drop the mu of another picture
        if sized and mu is not None:
            linear = config.get("time_shift_type") == "linear"
            self.noise_path = FlowMatching(float(mu if linear else np.exp(mu)))
        with scheduler_errors():
            if timesteps is not None:
                times = self._own_times(timesteps, strength)
            else:
                steps, own = check_count(num_inference_steps), {"grid": config["grid"], "spacing": config["spacing"]}
                times = times_within(self.noise_path, steps, strength, **own)
            self._jumps = self._plan([float(t) for t in times])
        step = self._jump()
        self._call_times = [t for jump in self._jumps for t in replayed_times(step, self.noise_path, jump.t, jump.s)]
        calls = torch.tensor(self._call_times, dtype=torch.float64)
        indices = index_of(self.noise_path, calls, config["num_train_timesteps"])
        whole = bool((indices == indices.round()).all()) and not isinstance(self.noise_path, FlowMatching)
        self.timesteps = indices.to(device=device, dtype=torch.int64 if whole else torch.float32)
        self.num_inference_steps = len(self._jumps)
        if isinstance(self.noise_path, FlowMatching):
            levels = torch.cat([indices / config["num_train_timesteps"], indices.new_zeros(1)])
            self.sigmas = levels.to(device, torch.float32)
        self._reset()

    def _own_times(self, timesteps: Sequence[float], strength: float) -> Tensor:
        """Return the given times (network's scale) at or below a strength, in the path's own time.

        Raises:
            UserError: the times do not fall, leave the path, or are all above the strength.
        """
        given = [float(t) for t in timesteps]
        total = int(self.config["num_train_timesteps"])
        most = total if isinstance(self.noise_path, FlowMatching) else total - 1
        if not given or any(b >= a for a, b in pairwise(given)):
            raise UserError(f"timesteps = {given} must be falling")
        if given[0] > most or given[-1] < 0:
            raise UserError(f"timesteps = {given} leave the range 0 to {most}")
        every = self._path_time(torch.tensor(given, dtype=torch.float64))
        times = times_below(self.noise_path, every, strength)
        if not len(times):
            least = math.ceil(1000 * float(share_of(self.noise_path, every).min()) - 1e-6) / 1000
            raise UserError(f"strength = {strength} is below all timesteps; use {least:g} or more")
        return times

    def _plan(self, times: Sequence[float]) -> list[PlannedJump]:
        """Return the jumps of a drawing from its times, falling."""
        raise NotImplementedError

    def _jump(self) -> Step:
        """Return the jump function."""
        return student_step(self.config["jump"], self.config.get("r", 0.5), self.config.get("form", "x0"))

    def previous_timestep(self, timestep: Any) -> Tensor:
        """Return the time of the network call after this one; -1 after the last."""
        place = self._place(timestep)
        following: Tensor = self.timesteps[place + 1] if place + 1 < len(self.timesteps) else torch.tensor(-1)
        return following

    def _place(self, timestep: Any) -> int:
        """Return the index of a time in `timesteps`.

        Raises:
            ValueError: it is none of them.
        """
        found = (self.timesteps.double() - float(timestep)).abs().cpu()
        place = int(found.argmin())
        if float(found[place]) > 1e-3:
            times = ", ".join(f"{float(t):g}" for t in self.timesteps)
            raise SchedulerError(f"timestep = {float(timestep):g} is none of the times {times}")
        return place

    def _current(self, timestep: Any) -> int:
        """Return the number of the network call that is due.

        Raises:
            ValueError: no times are set, `timestep` is none of them, or all calls are done.
        """
        if self.num_inference_steps is None:
            raise SchedulerError(
                "num_inference_steps is not set; call set_timesteps first", field="num_inference_steps"
            )
        place = self.step_index
        if place is None:
            place = self._place(timestep) if self.begin_index is None else self.begin_index
            self._check_begin(place)
        if place >= len(self.timesteps):
            done = len(self.timesteps)
            raise SchedulerError(
                f"all {done} network calls of this drawing are done; call set_timesteps for another one"
            )
        return place

    def landing(self, timestep: Any = None) -> float:
        """Return the landing s of the jump that the due network call belongs to, on the scale of `timesteps`.

        Args:
            timestep: of the call; None where a pipeline scales it, which begins at `begin_index` or the first time.
        """
        if timestep is None:
            timestep = self.timesteps[self.begin_index or 0]
        s = self._jumps[self._current(timestep) // self.order].s
        return float(index_of(self.noise_path, s, self.config["num_train_timesteps"]))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> FewStepOutput | tuple[Tensor, Tensor]:
        """Advance by one network call, in fp32 or wider.

        There is no `eta`: gamma is set by `from_config(..., gamma=...)`.

        Args:
            model_output: of the network, [B, ...].
            timestep: time of the call.
            sample: input of the call.
            generator: of the noise, or one per picture.

        Raises:
            ValueError: no times are set, or this is none of them.
        """
        place = self.step_index = self._current(timestep)
        jump = self._jumps[place // self.order]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if place % self.order == 0 or self._jump_start is None:
            self._jump_start, self._outputs = x, []
        now = torch.tensor([self._call_times[place]], dtype=torch.float64)
        alpha, sigma = expand(self.noise_path.alpha(now), x), expand(self.noise_path.sigma(now), x)
        estimate = interpret(self.prediction, model_output.to(x.dtype), x, alpha, sigma)
        self._outputs.append(estimate)
        try:
            x = self._jump()(replay_outputs(self._outputs), self.noise_path, self._jump_start, jump.t, jump.s)
            self._jump_start = None
        except ReplayError as needed:
            x = needed.x
        else:
            drawn_from = self.generator if generator is None else generator
            like = {"device": x.device, "dtype": x.dtype}
            x = jump.renoise(self.noise_path, x, lambda: randn_tensor(sample.shape, generator=drawn_from, **like))
        self.step_index = place + 1
        drawn, seen = x.to(sample.dtype), estimate.x0.to(sample.dtype)
        return FewStepOutput(drawn, seen) if return_dict else (drawn, seen)

    def _path_time(self, indices: Tensor) -> Tensor:
        """Return the path's own time for times on the network's scale, the inverse of `index_of`."""
        if isinstance(self.noise_path, FlowMatching):
            sigma, shift = indices / float(self.config["num_train_timesteps"]), self.noise_path.shift
            return sigma / (shift - (shift - 1) * sigma)
        return indices

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = alpha_t x_0 + sigma_t eps at times [B] or [1] on the network's scale."""
        times = self._path_time(torch.as_tensor(timesteps).double().cpu().reshape(-1))
        wide = original_samples.to(torch.promote_types(original_samples.dtype, torch.float32))
        return add_noise(self.noise_path, wide, noise.to(wide), times).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """Return `add_noise`, under the name that pipelines of flows call."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
