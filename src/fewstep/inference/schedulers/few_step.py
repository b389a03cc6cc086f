"""Our samplers as diffusers schedulers, for any pipeline.

    pipe.scheduler = SSSScheduler.from_config(pipe.scheduler.config, gamma=0.3)

Times come from the training grid and jumps from `diffusion`, so that pictures equal those of `fewstep sample`. gamma is
part of the scheduler's config; `step` takes no `eta`, so that a pipeline's default `eta` of 0 has no effect.
`num_inference_steps` counts jumps; a second-order jump makes two network calls, and `order` is 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from diffusers.configuration_utils import register_to_config

# diffusers finds the loader of a saved component by the base classes in the component's own module
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from fewstep.common.choices import End, Jump
from fewstep.diffusion.samplers import PlannedJump, consistency_jumps, sss_jumps
from fewstep.inference.schedulers.base import FewStepScheduler
from fewstep.inference.schedulers.checks import check_number

LEAST_R = 0.01
"""Least distance of a second-order jump's mid-point from t, as a share of the jump."""


class SSSScheduler(FewStepScheduler):
    """Strategic stochastic sampling (TCD, arXiv 2402.19159, algorithm 4), of first and second order.

    Args:
        gamma: stochasticity of each step, 0 to 1; a pipeline's `eta` is ignored.
        gamma_law: what gamma is linear in: time (TCD) or noise (CTM's sampling).
        jump: first_order, or second_order with two network calls a jump.
        r, form: mid-point and predictions of a second-order jump.
        grid: the training grid that times are taken from: N points, or the points.
        spacing: grid (LCM's and TCD's rule), trailing, or tlcm (its own lists for 2 to 8 steps).
        end: where the last jump lands: index0 (the least noise of training, as TCD's released sampler) or clean.
        path: vp, by betas, or flow.
        shift, use_dynamic_shifting: of a flow.

    Raises:
        ValueError: an illegal value.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        path: str = "vp",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        gamma: float = 0.3,
        gamma_law: str = "time",
        jump: str = "first_order",
        r: float = 0.5,
        form: str = "x0",
        grid: Any = 50,
        spacing: str = "grid",
        end: str = "index0",
    ) -> None:
        # plain numbers: a config is written as JSON
        self.register_to_config(gamma=check_number("gamma", gamma, 0.0, 1.0), r=check_number("r", r, LEAST_R, 1.0))
        self._start(("first_order", "second_order"))

    def _plan(self, times: Sequence[float]) -> list[PlannedJump]:
        config = self.config
        return sss_jumps(self.noise_path, times, config["gamma"], config["end"], config["gamma_law"])


class ConsistencyScheduler(FewStepScheduler):
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1; LCM, arXiv 2310.04378, algorithm 3).

    Each jump lands at the end point; noise is then added up to the next time.

    Args:
        jump: skip (LCM's own, onto clean data), first_order or second_order.
        grid, spacing, end, path, shift, use_dynamic_shifting, r, form: as `SSSScheduler`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        path: str = "vp",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        jump: str = "skip",
        r: float = 0.5,
        form: str = "x0",
        grid: Any = 50,
        spacing: str = "grid",
        end: str = "clean",
    ) -> None:
        self.register_to_config(r=check_number("r", r, LEAST_R, 1.0))
        self._start(get_args(Jump))

    def _plan(self, times: Sequence[float]) -> list[PlannedJump]:
        end: End = "clean" if self.config["jump"] == "skip" else self.config["end"]
        return consistency_jumps(self.noise_path, times, end)
