"""The nodes, in ComfyUI's V3 schema."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from .negative_guidance import led_away
from .sampling import (
    PACKED,
    check_model,
    guidance_of,
    noise_after_the_first,
    read_record,
    sample,
    scale_of,
    settings_of,
)


class FewStepStudent(io.ComfyNode):
    """A model and a student's LoRA to the student with its sampler, sigmas and guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="FewStepStudent",
            display_name="fewstep student",
            category="sampling/custom_sampling",
            description="A few-step student with the times, sampler, gamma and guidance of its own file.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file that `fewstep export` wrote.",
                ),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.Int.Input("steps", default=0, min=0, max=50, tooltip="Network calls; 0 for the student's own."),
                io.Float.Input(
                    "gamma",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Stochasticity of SSS; -1 for the student's own.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Sampler.Output(display_name="sampler"),
                io.Sigmas.Output(display_name="sigmas"),
                io.Float.Output(display_name="cfg"),
                io.Float.Output(display_name="guidance", tooltip="For FluxGuidance."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float, steps: int, gamma: float) -> io.NodeOutput:
        """Apply the LoRA, and make the sampler and the sigmas."""
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        record = read_record(path)
        held = model.get_model_object("model_sampling")
        check_model(record, held)
        settings, scale = settings_of(record, steps, gamma), scale_of(held, record.get("shift"))
        packed = record.get("base_model", {}).get("family") in PACKED
        weights = comfy.utils.load_torch_file(path, safe_load=True)
        student, _ = comfy.sd.load_lora_for_models(model, None, weights, strength, 0)

        def function(net: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, **_: Any) -> Any:
            more = extra_args or {}
            ones = x.new_ones([len(x)])

            def report(i: int, now: torch.Tensor, x0: torch.Tensor) -> None:
                if callback is not None:
                    callback({"x": now, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})

            noise = noise_after_the_first(x, int(more.get("seed") or 0), packed=packed)
            drawn = sample(lambda y, sigma: net(y, sigma * ones, **more), x, settings, scale, noise, report)
            return scale.handed_back(drawn, scale.lowest(settings.end))

        sigmas = torch.tensor([*(scale.sigma_of(t) for t in settings.times), scale.lowest(settings.end)])
        return io.NodeOutput(student, comfy.samplers.KSAMPLER(function), sigmas, *guidance_of(record))


class FewStepNegative(io.ComfyNode):
    """A model to one that is led away from a negative prompt at cfg 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="FewStepNegative",
            display_name="fewstep negative prompt",
            category="sampling/custom_sampling",
            description="Leads a student away from a negative prompt at cfg 1 (normalised attention guidance).",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("negative"),
                io.Float.Input("scale", default=3.0, min=0.0, max=50.0, step=0.05),
                io.Float.Input("tau", default=2.5, min=0.0, max=10.0, step=0.05),
                io.Float.Input("alpha", default=0.5, min=0.0, max=1.0, step=0.05),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: Any, negative: Any, scale: float, tau: float, alpha: float) -> io.NodeOutput:
        """Patch the model's cross-attention."""
        return io.NodeOutput(led_away(model, negative[0][0], scale, tau, alpha))


class FewStepExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return its nodes."""
        return [FewStepStudent, FewStepNegative]


async def comfy_entrypoint() -> FewStepExtension:
    """Return the pack to ComfyUI."""
    return FewStepExtension()
