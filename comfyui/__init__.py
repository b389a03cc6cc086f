"""fewstep in ComfyUI: a student's LoRA, sampler, times, gamma and guidance, read from the student's file.

Copy this folder into ComfyUI's `custom_nodes` as `fewstep`. fewstep itself need not be installed.
"""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
