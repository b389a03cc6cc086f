"""The inference settings in every exported file's metadata, readable by any tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewstep.diffusion.config import Sampling
from fewstep.diffusion.grid import inference_times
from fewstep.diffusion.schedule import FlowMatching, index_of

if TYPE_CHECKING:
    from torch import nn

    from fewstep.backbones.base import Backbone


def inference_record(backbone: Backbone, sampling: Sampling, network: nn.Module | None = None) -> dict[str, Any]:
    """Return the record of a student beside its `sampling` settings.

    Args:
        network: the student's, if it is another one than the backbone's.

    Returns:
        base_model: pipeline class and family of the teacher;
        prediction, path, shift: what the network predicts, its noise path, and a flow's shift (1 elsewhere);
        times: the exact times of the calls, as the network's input (training indices; 1000 sigma on a flow);
        sigmas: the noise there, x_t = alpha x_0 + sigma eps, which identifies the scheduler's betas;
        guidance: omega of (1 + omega) out(prompt) - omega out(null); `scale` as the pipeline's argument of guidance
            (mostly 1 + omega, or the guidance input); `told`: whether guidance is an input. A student whose UNet embeds
            w by itself is `embedded`, its scale 1 + w.
    """
    count = sampling.steps // sampling.calls_a_step
    times = inference_times(backbone.path, count, grid=sampling.grid, spacing=sampling.spacing)
    embedded = backbone.embedded_guidance
    plain = backbone.folder.family.unguided + sampling.omega
    scale = plain if sampling.omega or not embedded else backbone.default_guidance
    guidance: dict[str, Any] = {"omega": sampling.omega, "scale": scale, "told": embedded}
    if sampling.w is not None and backbone.embeds_guidance(network or backbone.network):
        guidance |= {"scale": 1 + sampling.w, "told": True, "embedded": True}
    return {
        "base_model": {"pipeline": backbone.folder.pipeline, "family": backbone.folder.family.kind},
        "prediction": backbone.prediction,
        "path": "flow" if isinstance(backbone.path, FlowMatching) else "vp",
        "shift": backbone.path.shift if isinstance(backbone.path, FlowMatching) else 1.0,
        "times": [round(float(t), 6) for t in index_of(backbone.path, times)],
        # enough digits for alpha > 0 where sigma is nearly 1
        "sigmas": [round(float(sigma), 12) for sigma in backbone.path.sigma(times)],
        "guidance": guidance,
    }


def beside_flow_map(record: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the first setting, and its value, by which a student is no flow map as diffusers samples it; else None.

    A flow map is conditioned on its landing s on a flow, and sampled by deterministic first-order jumps to clean data.
    """
    own: Mapping[str, Any] = record["sampling"]
    extra = own.get("extra_conditioning") or ()
    wanted: dict[str, tuple[Any, Any]] = {
        "path": (record.get("path"), "flow"),
        "extra_conditioning": (list(extra), ["s"]),
        "sampler": (own.get("sampler", "sss"), "sss"),
        "jump": (own.get("jump") or "first_order", "first_order"),
        "gamma": (own.get("gamma", 0.3), 0),
        "end": (own.get("end", "index0"), "clean"),
        "spacing": (own.get("spacing", "grid"), "grid"),
    }
    return next(((name, value) for name, (value, needed) in wanted.items() if value != needed), None)
