"""The table of config keys against the classes of the installed libraries: a new key or default fails here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import diffusers
import pytest
import transformers

from fewstep.backbones import config_keys
from fewstep.backbones.config_keys import ConfigKeys
from fewstep.backbones.families import FAMILIES
from fewstep.inference.schedulers.few_step import ConsistencyScheduler, SSSScheduler

OURS = {"SSSScheduler": SSSScheduler, "ConsistencyScheduler": ConsistencyScheduler}
TABLES = config_keys.PIPELINES | config_keys.MODELS | config_keys.SCHEDULERS | config_keys.ENCODERS
CONFIGS = {
    "CLIPTextModel": "CLIPTextConfig",
    "CLIPTextModelWithProjection": "CLIPTextConfig",
    "T5EncoderModel": "T5Config",
    "Gemma2Model": "Gemma2Config",
    "Qwen3Model": "Qwen3Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLConfig",
    "Qwen3VLModel": "Qwen3VLConfig",
    "BertModel": "BertConfig",
}
REFUSED_SCHEDULERS = {
    "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler", "DDPMWuerstchenScheduler", "DPMSolverMultistepInverseScheduler",
    "DiscreteDDIMScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EntropyBoundScheduler", "FlowMapEulerDiscreteScheduler", "HeliosDMDScheduler",
    "HeliosScheduler", "IPNDMScheduler", "KarrasVeScheduler",
    "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
    "RFD4ProteinaScheduler", "RePaintScheduler", "SCMScheduler",
    "ScoreSdeVeScheduler", "UnCLIPScheduler", "VQDiffusionScheduler"
}  # fmt: skip
"""Schedulers of diffusers that are refused: other paths, other data, or a path from data to noise."""
SCHEDULERS = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith(("Flax", "Common"))
)


def arguments(kind: Any) -> dict[str, Any]:
    """Constructor arguments and their defaults, as JSON has them."""
    found = {}
    for name, argument in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL):
            continue
        default = argument.default
        found[name] = list(default) if isinstance(default, tuple) else default
    return found


MODULAR = {name for name, family in FAMILIES.items() if family.modular}
"""Pipelines that are made of blocks: their constructor takes no components."""


@pytest.mark.parametrize("name", sorted(TABLES.keys() - config_keys.ENCODERS.keys() - MODULAR))
def test_every_constructor_key_of_diffusers_is_in_the_table(name: str) -> None:
    kind = OURS.get(name) or getattr(diffusers, name)
    if "dummy" in kind.__module__:
        pytest.skip(f"{name} needs a package that is not installed")
    keys, own = TABLES[name], arguments(kind)
    assert not own.keys() - keys.known, "decide for each: built, read, partly or harmless"
    defaults = {**keys.read, **{key: default for key, (default, _) in keys.partly.items()}}
    for key in defaults.keys() & own.keys():
        assert own[key] == defaults[key], f"the default of {key}"


@pytest.mark.parametrize("name", sorted(config_keys.ENCODERS))
def test_every_config_key_of_transformers_is_in_the_table(name: str) -> None:
    kind = getattr(transformers, CONFIGS[name])
    keys = config_keys.ENCODERS[name]
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert not fields.keys() - keys.known
    for key in keys.read.keys() & fields.keys():
        assert fields[key] == keys.read[key], f"the default of {key}"


def test_every_tokenizer_argument_is_in_the_table() -> None:
    files = {"self", "vocab", "merges", "kwargs", "_spm_precompiled_charsmap"}  # what is read from the vocabulary
    for name in config_keys.VOCABULARIES:
        own = arguments(getattr(transformers, name)).keys() - files
        assert not own - config_keys.TOKENIZER.known, name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_diffusers_is_decided(name: str) -> None:
    assert (name in config_keys.SCHEDULERS) != (name in REFUSED_SCHEDULERS)


@pytest.mark.parametrize("keys", [*TABLES.values(), config_keys.TOKENIZER], ids=[*TABLES, "tokenizers"])
def test_no_key_is_decided_twice(keys: ConfigKeys) -> None:
    parts: list[set[str]] = [set(keys.built), set(keys.read), set(keys.partly), set(keys.harmless)]
    assert sum(map(len, parts)) == len(keys.known)
    assert all(default in legal for key, (default, legal) in keys.partly.items() if key not in OTHERWISE)


OTHERWISE = {"clip_sample", "norm_type", "guidance_embeds"}
"""Keys whose default is not implemented: DDIM clips by default, the oldest transformer is another network, and FLUX.2's
default is not klein's."""


def test_every_supported_class_has_a_table() -> None:
    assert FAMILIES.keys() == config_keys.PIPELINES.keys()
    for family in FAMILIES.values():
        assert set(family.classes) <= config_keys.MODELS.keys()
        module, _, name = family.backbone.partition(":")
        backbone = getattr(importlib.import_module(module), name)
        assert set(backbone.text_classes) <= config_keys.ENCODERS.keys() | config_keys.MODELS.keys()
        assert backbone.text_classes, "another class of encoder would have no table"
    for pipeline, parts in config_keys.BY_PIPELINE.items():
        assert parts.keys() <= set(FAMILIES[pipeline].parts)
