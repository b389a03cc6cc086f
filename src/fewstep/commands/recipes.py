"""`fewstep recipes`: the bundled recipes, and every setting."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from fewstep.common.arguments import checked


@checked
def recipes(*, settings: bool = False) -> str:
    """List the bundled recipes: sampling steps, cost of a training step, paper, and what each is good for.

    The cost is network evaluations of one sample and training step, forward passes only.

    Args:
        settings: list every setting that a recipe, --config or --set can set as well, verb by verb.

    Returns:
        The table.
    """
    lines = list(table())
    if settings:
        lines += setting_lines()
    return "\n".join(lines)


def table() -> Iterator[str]:
    """Yield the lines of the table of recipes."""
    from fewstep.distillation.config import DistillConfig, resolve
    from fewstep.methods.cost import step_calls
    from fewstep.methods.recipes import describe, names

    yield f"{'recipe':<14}{'steps':>5}{'cost':>6}  {'paper':<12}good for"
    for name in names():
        config = resolve(name)
        stages = config.each_stage()
        calls = sum(stage.loop.steps * sum(step_calls(stage.method).values()) for stage in stages)
        cost = calls / sum(stage.loop.steps for stage in stages)
        about = describe(name, DistillConfig)
        yield f"{name:<14}{config.sampling.steps:>5}{cost:>6.3g}  {about['paper']:<12}{about['about']}"


def setting_lines() -> Iterator[str]:
    """Yield the settings of every verb."""
    from fewstep.common.defaults import installed_world
    from fewstep.distillation.config import DistillConfig
    from fewstep.distillation.latent_lpips.settings import LatentLpipsTrainConfig
    from fewstep.distillation.synthesis.settings import SynthesisConfig
    from fewstep.inference.multilingual.settings import AdapterConfig

    bundled = installed_world()
    verbs: dict[str, BaseModel] = {
        "distill": DistillConfig(),
        "synthesize": SynthesisConfig(),
        "train-latent-lpips": LatentLpipsTrainConfig(),
        "train-adapter": AdapterConfig(),
        **(bundled.configs() if bundled else {}),
    }
    for verb, config in verbs.items():
        yield f"\nsettings of {verb} ({'recipe < --config FILE < ' if verb == 'distill' else ''}--set key=value):"
        yield from described(config)


def described(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield a line for each setting of a config: dotted key, value and meaning."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from described(value, f"{prefix}{name}.")
        else:
            yield f"  {prefix}{name} = {value!r}: {field.description}"
