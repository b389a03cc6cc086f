"""Treatment of each key of each class of config, read from `config_keys.yaml`; `config_checks` applies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.backbones.families import FAMILIES
from fewstep.common.text import read_table

Partly = tuple[Any, Sequence[Any]]
"""A key's default, and the values that are implemented."""
ANY: Sequence[Any] = ()
"""Every value, in a `Partly`."""


@dataclass(frozen=True)
class ConfigKeys:
    """Treatment of the keys of one class; see config_keys.yaml.

    Attributes:
        built: the class itself computes with them.
        read: key that fewstep acts on -> the class's default.
        partly: key -> default, and the values that are implemented.
        harmless: key without effect -> why.
    """

    built: frozenset[str] = frozenset()
    read: Mapping[str, Any] = field(default_factory=dict)
    partly: Mapping[str, Partly] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """Every key of the table."""
        return self.built | self.read.keys() | self.partly.keys() | self.harmless.keys()


def _partly(values: Mapping[str, Any]) -> dict[str, Partly]:
    return {key: (default, ANY if legal == "any" else legal) for key, (default, legal) in values.items()}


def _keys(row: Mapping[str, Any], built: Sequence[str] = (), harmless: Sequence[str] = ()) -> ConfigKeys:
    """Return one class's keys; `built` and `harmless` are added to the row's own."""
    groups = [_TABLE["groups"][name] for name in (*row.get("harmless", ()), *harmless)]
    return ConfigKeys(
        frozenset([*row.get("built", "").split(), *built]),
        row.get("read", {}),
        {key: (value, [value]) for key, value in row.get("fixed", {}).items()} | _partly(row.get("partly", {})),
        {key: group["reason"] for group in groups for key in group["keys"].split()},
    )


_TABLE: dict[str, Any] = read_table(__file__)

PIPELINES = {name: _keys(row, built=FAMILIES[name].parts) for name, row in _TABLE["pipelines"].items()}
MODELS = {name: _keys(row) for name, row in _TABLE["models"].items()}
"""Networks and autoencoders of diffusers."""
ENCODERS = {name: _keys(row) for name, row in _TABLE["encoders"].items()}
"""Text encoders of transformers."""
TOKENIZER = _keys(_TABLE["tokenizer"])
SCHEDULERS = {name: _keys(row, harmless=("sampling", "clipping")) for name, row in _TABLE["schedulers"].items()}
BY_PIPELINE: dict[str, dict[str, dict[str, Partly]]] = {
    pipeline: {component: _partly(values) for component, values in parts.items()}
    for pipeline, parts in _TABLE["by_pipeline"].items()
}
"""Pipeline class -> component -> key -> what it implements of that key, before the component's own table."""
VOCABULARIES: dict[str, Sequence[tuple[str, ...]]] = {
    name: [tuple(files) for files in sets] for name, sets in _TABLE["vocabularies"].items()
}
COUNTS = {"patch_size", "in_channels", "out_channels", "latent_channels", "pos_embed_max_size", "num_train_timesteps"}
"""Keys that fewstep computes with, and that are whole numbers above 0."""
DECISIVE: Mapping[str, Any] = {"rescale_betas_zero_snr": False, "trained_betas": None, "use_flow_sigmas": False}
"""Keys that decide a path, with their defaults: a scheduler that does not take one is refused with another value."""
