"""What our diffusers schedulers share: paths, times, and a sampler's loop turned inside out.

The pipeline owns the loop and calls `step`; `schedulers` holds the two samplers.
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
    count_of_sigmas,
    refusing,
)
from fewstep.inference.schedulers.replay import ReplayError, as_batch, replay_outputs, replayed_times

COMPATIBLE = [
    *("TCDScheduler", "LCMScheduler", "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler"),
]
"""diffusers' schedulers of the same noise: pipelines may change from any of them to ours, and back."""


@dataclass
class FewStepOutput(BaseOutput):  # type: ignore[misc]
    """What a step gives.

    Attributes:
        prev_sample: what the pipeline hands to its next network call, [B, ...].
        pred_original_sample: x0 by this call, for previews.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What all of our schedulers share: paths, times, and a loop that is turned inside out.

    Attributes:
        generator: of the noise between jumps, or one for each picture, where a pipeline hands none to `step`: those of
            Stable Diffusion 3, Flux and SANA do not.
    """

    _compatibles = COMPATIBLE

    def _start(self) -> None:
        """Read the config; called last in a scheduler's __init__."""
        config = dict(self.config)
        with refusing():
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
        self._asked: list[float] = []
        self._reset()

    def _reset(self) -> None:
        """Forget the drawing: nothing of a picture reaches the next one."""
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._answers: list[Estimate] = []
        self._from: Tensor | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from any scheduler's config: its noise schedule, what its network predicts, and our own settings.

        Raises:
            ValueError: a schedule that diffusers does not know.
        """
        if isinstance(config, Mapping):
            own = inspect.signature(cls.__init__).parameters
            kwargs = {**adopted_settings(config, {name: value.default for name, value in own.items()}), **kwargs}
            config = {key: value for key, value in config.items() if key != "flow_shift"}  # ours is `shift`
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def step_index(self) -> int | None:
        """How many network calls of this drawing are done, counted from its list of times; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where in the list of times the pipeline begins, if it says so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin in the middle of the list of times, as image-to-image pipelines do.

        Raises:
            ValueError: no jump begins there: it is the second network call of one.
        """
        if self.num_inference_steps is not None:
            self._check_begin(begin_index)
        self._begin_index = begin_index

    def _check_begin(self, place: int) -> None:
        """Refuse a place in the list of times at which no jump begins.

        Latents between the two calls of a second-order jump are its mid-point. The jump's end depends on its start and
        its first prediction too, which only the scheduler that made the first call holds.
        """
        if place < 0 or place % self.order:
            raise SchedulerError(
                f"begin_index = {place} of {len(self.timesteps)} network calls begins no jump, of which each takes "
                f"{self.order}; the nearest legal one is {max(place - place % self.order, 0)}. Draw a picture with one "
                "pipeline, or split it between two with jump = 'first_order'"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
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
        """Take the times of a drawing from the grid that the student was trained on.

        Args:
            num_inference_steps: jumps to make.
            timesteps: the times instead, falling, as networks are told them; those above `strength` are left out.
            sigmas: refused but for their number, which Flux's pipeline hands over: the student has times of its own.
            mu: the shift that a pipeline works out from the picture's size; asked for where `use_dynamic_shifting` is
                on, and not listened to elsewhere.
            strength: begin at that share of the noisiest time, still with all jumps below it (image to image).
            original_inference_steps: points of the training grid, as diffusers' LCM pipelines ask: the config's `grid`.

        Raises:
            ValueError: naming the nearest legal number, time or strength; or a `mu` that is asked for and not given.
        """
        config = self.config
        if original_inference_steps is not None:
            check_origin(original_inference_steps, config["grid"])
        if sigmas is not None:
            num_inference_steps = count_of_sigmas(sigmas, num_inference_steps)
        if (num_inference_steps is None) == (timesteps is None):
            raise SchedulerError("give either num_inference_steps or timesteps")
        sized = bool(config.get("use_dynamic_shifting")) and isinstance(self._own_path, FlowMatching)
        if sized and mu is None:
            raise SchedulerError(
                "mu = None, and use_dynamic_shifting = True asks for one: the shift goes by the picture's size; the "
                "nearest is mu=, as pipelines work it out, or a student's own shift, by fewstep.scheduler_for"
            )
        check_strength(strength)
        self.noise_path = self._own_path  # another picture's mu is no setting of ours
        if sized and mu is not None:
            linear = config.get("time_shift_type") == "linear"
            self.noise_path = FlowMatching(float(mu if linear else np.exp(mu)))
        with refusing():
            if timesteps is not None:
                times = self._own_times(timesteps, strength)
            else:
                steps, own = check_count(num_inference_steps), {"grid": config["grid"], "spacing": config["spacing"]}
                times = times_within(self.noise_path, steps, strength, **own)
            self._jumps = self._plan([float(t) for t in times])
        step = self._jump()
        self._asked = [t for jump in self._jumps for t in replayed_times(step, self.noise_path, jump.t, jump.s)]
        asked = torch.tensor(self._asked, dtype=torch.float64)
        told = index_of(self.noise_path, asked, config["num_train_timesteps"])
        whole = bool((told == told.round()).all()) and not isinstance(self.noise_path, FlowMatching)
        self.timesteps = told.to(device=device, dtype=torch.int64 if whole else torch.float32)
        self.num_inference_steps = len(self._jumps)
        if isinstance(self.noise_path, FlowMatching):
            self.sigmas = torch.cat([told / config["num_train_timesteps"], told.new_zeros(1)]).to(device, torch.float32)
        self._reset()

    def _own_times(self, timesteps: Sequence[float], strength: float) -> Tensor:
        """Times that are given, as networks are told them -> those below a strength, in the path's own time.

        Raises:
            UserError: they do not fall, or leave the path, or none is below.
        """
        told = [float(t) for t in timesteps]
        total = int(self.config["num_train_timesteps"])
        most = total if isinstance(self.noise_path, FlowMatching) else total - 1
        if not told or any(b >= a for a, b in pairwise(told)):
            raise UserError(f"timesteps = {told} must be falling; the nearest is {sorted(set(told), reverse=True)}")
        if told[0] > most or told[-1] < 0:
            raise UserError(f"timesteps = {told} leave the range 0 to {most}")
        every = self._time_told(torch.tensor(told, dtype=torch.float64))
        times = times_below(self.noise_path, every, strength)
        if not len(times):
            least = math.ceil(1000 * float(share_of(self.noise_path, every).min()) - 1e-6) / 1000
            raise UserError(f"strength = {strength} lies below all of timesteps = {told}; the nearest is {least:g}")
        return times

    def _plan(self, times: Sequence[float]) -> list[PlannedJump]:
        """The jumps of a drawing from its times, falling."""
        raise NotImplementedError

    def _jump(self) -> Step:
        """The jump function."""
        return student_step(self.config["jump"], self.config.get("r", 0.5), self.config.get("form", "x0"))

    def previous_timestep(self, timestep: Any) -> Tensor:
        """The time of the network call after this one; -1 after the last."""
        place = self._place(timestep)
        following: Tensor = self.timesteps[place + 1] if place + 1 < len(self.timesteps) else torch.tensor(-1)
        return following

    def _place(self, timestep: Any) -> int:
        """Where a time stands in the list.

        Raises:
            ValueError: nowhere.
        """
        found = (self.timesteps.double() - float(timestep)).abs().cpu()
        place = int(found.argmin())
        if float(found[place]) > 1e-3:
            legal = float(self.timesteps[place])
            raise SchedulerError(f"timestep = {float(timestep):g} is none of the times; the nearest is {legal:g}")
        return place

    def _current(self, timestep: Any) -> int:
        """Return the number of the network call that is due.

        Raises:
            ValueError: no times are set, `timestep` is none of them, or all calls are done.
        """
        if self.num_inference_steps is None:
            raise SchedulerError("num_inference_steps is not set; call set_timesteps first")
        place = self._step_index
        if place is None:
            place = self._place(timestep) if self._begin_index is None else self._begin_index
            self._check_begin(place)
        if place >= len(self.timesteps):
            done = len(self.timesteps)
            raise SchedulerError(
                f"all {done} network calls of this drawing are done; call set_timesteps for another one"
            )
        return place

    def landing(self, timestep: Any) -> float:
        """Return the landing s of the jump that the due network call belongs to, on the scale of `timesteps`."""
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
        """One network call's share of a jump. The maths is in fp32 at least.

        There is no `eta`: gamma is the scheduler's own (`from_config(..., gamma=...)`).

        Args:
            model_output: what the network said, [B, ...].
            timestep: the time that it was told.
            sample: what it was shown.
            generator: of the noise, or one for each picture.

        Raises:
            ValueError: no times are set, or this is none of them.
        """
        place = self._step_index = self._current(timestep)
        jump = self._jumps[place // self.order]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if place % self.order == 0 or self._from is None:
            self._from, self._answers = x, []
        now = as_batch(self._asked[place])
        alpha, sigma = expand(self.noise_path.alpha(now), x), expand(self.noise_path.sigma(now), x)
        estimate = interpret(self.prediction, model_output.to(x.dtype), x, alpha, sigma)
        self._answers.append(estimate)
        try:
            x = self._jump()(replay_outputs(self._answers), self.noise_path, self._from, jump.t, jump.s)
            self._from = None
        except ReplayError as asked:
            x = asked.x
        else:
            drawn_from = self.generator if generator is None else generator
            like = {"device": x.device, "dtype": x.dtype}
            x = jump.renoise(self.noise_path, x, lambda: randn_tensor(sample.shape, generator=drawn_from, **like))
        self._step_index = place + 1
        drawn, seen = x.to(sample.dtype), estimate.x0.to(sample.dtype)
        return FewStepOutput(drawn, seen) if return_dict else (drawn, seen)

    def _time_told(self, told: Tensor) -> Tensor:
        """What a network is told -> the path's own time; the inverse of `index_of`."""
        if isinstance(self.noise_path, FlowMatching):
            sigma, shift = told / float(self.config["num_train_timesteps"]), self.noise_path.shift
            return sigma / (shift - (shift - 1) * sigma)
        return told

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps at times [B] or [1], as networks are told them."""
        times = self._time_told(torch.as_tensor(timesteps).double().cpu().reshape(-1))
        wide = original_samples.to(torch.promote_types(original_samples.dtype, torch.float32))
        return add_noise(self.noise_path, wide, noise.to(wide), times).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """The same, as pipelines of flows ask for it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
