"""Which pretrained pipelines are supported, and what each is made of. Light: read before torch is imported.

A family is an entry of families.yaml and one small module in `fewstep.backbones`; see
`docs/guide/adding-a-backbone.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from fewstep.common.text import read_table

GUIDANCE_KEY = "time_embedding.cond_proj.weight"
"""The weight of a UNet's guidance embedding, diffusers' `time_cond_proj_dim`."""
GUIDANCE_WIDTH = 256
"""Width of the sinusoid of omega in students that have one: LCM's."""


def adapts(target: str, layer: str) -> bool:
    """Return whether a target is the end of a layer's name, whole words of it; {i} stands for any number."""
    end = re.escape(target).replace(r"\{i\}", r"\d+")
    return re.fullmatch(rf"(.*\.)?{end}", layer) is not None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Family:
    """One kind of pipeline folder.

    Attributes:
        kind: its name here.
        pipelines: its classes of pipelines in diffusers.
        backbone: where its class is, MODULE:CLASS.
        network: the denoiser's component.
        encoders: the text encoders; each has a tokenizer of the same number, or of the same place in `words`.
        words: the tokenizers, where their names do not follow from the encoders'.
        modular: whether it is a modular pipeline, whose index has another name.
        targets: the layers that a LoRA adapts by default, by the ends of their names; {i} stands for any number, in a
            whole name.
        classes: the classes that the denoiser may be of.
        sample_size: latent points a side at the trained size, for networks whose config lacks it.
        packed: latent points that the network takes as one, in its channels.
        patch: latent points a side of a token, for networks whose config lacks it.
        guided: the argument of the pipeline's call that guides.
        unguided: its value without guidance.
        call: arguments by which the pipeline draws at any size.
        variance: whether the network may output a variance too, as a second half of its channels.
        cross_attention: whether its blocks attend to the prompt apart from the picture (`attn2` in diffusers).
    """

    kind: str
    pipelines: tuple[str, ...]
    backbone: str
    network: str
    encoders: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...]
    words: tuple[str, ...] = ()
    modular: bool = False
    sample_size: int = 0
    packed: int = 1
    patch: int = 1
    guided: str = "guidance_scale"
    unguided: float = 1.0
    call: Mapping[str, Any] = field(default_factory=dict)
    variance: bool = False
    cross_attention: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers of the text encoders, in their order."""
        return self.words or tuple(name.replace("text_encoder", "tokenizer") for name in self.encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that pictures are drawn with."""
        return (self.network, "vae", "scheduler", *self.encoders, *self.tokenizers)

    @property
    def weighed(self) -> tuple[str, ...]:
        """The components with weights."""
        return (self.network, "vae", *self.encoders)

    @property
    def readers(self) -> tuple[str, ...]:
        """The components that encode prompts."""
        return (*self.encoders, *self.tokenizers)


_ROWS: dict[str, dict[str, Any]] = read_table(__file__)
_EVERY = [TypeAdapter(Family).validate_python({"kind": kind, **row}) for kind, row in _ROWS.items()]
FAMILIES = {pipeline: family for family in _EVERY for pipeline in family.pipelines}
"""Pipeline class -> family."""
CONSISTENCY = "LatentConsistencyModelPipeline"
"""Stable Diffusion's parts around a UNet that embeds its guidance."""
