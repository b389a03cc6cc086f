"""fewstep: distil a text-to-image diffusion model into one that needs 2 to 8 network evaluations."""

from __future__ import annotations

from importlib import import_module

from fewstep.common.renamed_modules import install

TYPE_CHECKING = False  # not typing's: importing that takes as long as the interpreter's start
if TYPE_CHECKING:  # type checkers and editors see the names; `import fewstep` stays light
    from typing import Any

    from fewstep.commands.distill import distill as distill
    from fewstep.commands.distill import estimate as estimate
    from fewstep.commands.draw_folder import draw_folder as draw_folder
    from fewstep.commands.evaluate import evaluate as evaluate
    from fewstep.commands.export import export_as as export_as
    from fewstep.commands.init import init as init
    from fewstep.commands.report import report as report
    from fewstep.commands.sample import sample as sample
    from fewstep.commands.synthesize import read_synthesis as read_synthesis
    from fewstep.commands.synthesize import synthesis_cost as synthesis_cost
    from fewstep.commands.synthesize import synthesize as synthesize
    from fewstep.commands.train_adapter import train_adapter as train_adapter
    from fewstep.commands.train_latent_lpips import train_latent_lpips as train_latent_lpips
    from fewstep.commands.train_latent_lpips import train_perceptual as train_perceptual
    from fewstep.commands.train_style import style_cost as style_cost
    from fewstep.commands.train_style import train_style as train_style
    from fewstep.commands.web_app import app as app
    from fewstep.common.errors import UserError as UserError
    from fewstep.inference.attach import attach as attach
    from fewstep.inference.negative_guidance import lead_away as lead_away
    from fewstep.inference.pipeline import call_settings as call_settings
    from fewstep.inference.pipeline import flow_map_scheduler_for as flow_map_scheduler_for
    from fewstep.inference.pipeline import scheduler_for as scheduler_for
    from fewstep.inference.schedulers.few_step import ConsistencyScheduler as ConsistencyScheduler
    from fewstep.inference.schedulers.few_step import SSSScheduler as SSSScheduler
    from fewstep.inference.text_to_image import TextToImage as TextToImage
    from fewstep.inference.text_to_image import load as load

__version__ = "0.1.0"
install()

_MODULES = {
    "ConsistencyScheduler": "inference.schedulers.few_step",
    "SSSScheduler": "inference.schedulers.few_step",
    "TextToImage": "inference.text_to_image",
    "UserError": "common.errors",
    "app": "commands.web_app",
    "attach": "inference.attach",
    "call_settings": "inference.pipeline",
    "distill": "commands.distill",
    "draw_folder": "commands.draw_folder",
    "estimate": "commands.distill",
    "evaluate": "commands.evaluate",
    "export_as": "commands.export",
    "lead_away": "inference.negative_guidance",
    "load": "inference.text_to_image",
    "flow_map_scheduler_for": "inference.pipeline",
    "init": "commands.init",
    "read_synthesis": "commands.synthesize",
    "report": "commands.report",
    "sample": "commands.sample",
    "scheduler_for": "inference.pipeline",
    "style_cost": "commands.train_style",
    "synthesis_cost": "commands.synthesize",
    "synthesize": "commands.synthesize",
    "train_adapter": "commands.train_adapter",
    "train_latent_lpips": "commands.train_latent_lpips",
    "train_perceptual": "commands.train_latent_lpips",
    "train_style": "commands.train_style",
}
"""Public name -> the module of this package that defines it, imported on first access."""
__all__ = [name for name in _MODULES if name != "train_perceptual"]  # an old name


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"fewstep.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
