"""The inference settings that travel with every exported file, in words that any tool can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewstep.diffusion.config import Sampling
from fewstep.diffusion.grid import inference_times
from fewstep.diffusion.schedule import FlowMatching, index_of

if TYPE_CHECKING:
    from torch import nn

    from fewstep.backbones.base import Backbone


def travelling(backbone: Backbone, sampling: Sampling, network: nn.Module | None = None) -> dict[str, Any]:
    """What a file says beside its `sampling` record, which `fewstep sample` reads back.

    Args:
        network: the student's, where it is another one than the backbone's.

    Returns:
        base_model: pipeline class and family of the teacher;
        prediction, path, shift: what the network says, on which noise path; the shift is a flow's, and 1 elsewhere;
        times: the exact times of the calls, as the network is told them (training indices; 1000 sigma on a flow);
        sigmas: the noise there, x_t = alpha x_0 + sigma eps: what the scheduler's betas are known by;
        guidance: omega of (1 + omega) out(prompt) - omega out(null), `scale` in diffusers' words (1 + omega; what a
            network that is told its guidance is told), and whether it is told. A student whose UNet embeds w by itself
            is `embedded`, its scale 1 + w.
    """
    count = sampling.steps // sampling.calls_a_step
    times = inference_times(backbone.path, count, grid=sampling.grid, spacing=sampling.spacing)
    told = backbone.embedded_guidance
    scale = 1 + sampling.omega if sampling.omega or not told else backbone.default_guidance
    guidance: dict[str, Any] = {"omega": sampling.omega, "scale": scale, "told": told}
    if sampling.w is not None and backbone.embeds_guidance(network or backbone.network):
        guidance |= {"scale": 1 + sampling.w, "told": True, "embedded": True}
    return {
        "base_model": {"pipeline": backbone.folder.pipeline, "family": backbone.folder.family.kind},
        "prediction": backbone.prediction,
        "path": "flow" if isinstance(backbone.path, FlowMatching) else "vp",
        "shift": backbone.path.shift if isinstance(backbone.path, FlowMatching) else 1.0,
        "times": [round(float(t), 6) for t in index_of(backbone.path, times)],
        # digits enough to tell alpha from 0 where sigma is nearly 1
        "sigmas": [round(float(sigma), 12) for sigma in backbone.path.sigma(times)],
        "guidance": guidance,
    }
