"""What is where while a run is loaded: networks come to the device late, narrow, and after the encoders have gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.backbones.base import Backbone, load_backbone, open_backbone
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.data.latents import latent_set
from fewstep.distillation.checks import open_source
from fewstep.distillation.config import resolve
from fewstep.distillation.prepare import lay_out, load_teacher
from fewstep.distillation.run_data import EncodedData, encoders_fingerprint, find_captioned
from fewstep.distillation.synthesis.settings import resolve_synthesis
from fewstep.distillation.synthesis.synthesize import synthesize
from fewstep.inference.generator import load_image_generator
from fewstep.training.roles import networks_of
from support import tiny_pipelines

ELSEWHERE = torch.device("meta")
"""A fake GPU: tensors on it take no main memory, and cannot be computed with."""


def facts(network: nn.Module) -> tuple[set[str], set[torch.dtype]]:
    weights = list(network.parameters())
    return {weight.device.type for weight in weights}, {weight.dtype for weight in weights}


def moves(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], network_distance: Callable[[Any], Any]) -> list[Any]:
    """What `network_distance` sees of networks of a kind just before each is brought elsewhere."""
    seen: list[Any] = []
    bare: Any = kind.to

    def to(self: Any, *args: Any, **more: Any) -> Any:
        if ELSEWHERE in (*args, more.get("device")):
            seen.append(network_distance(self))
        return bare(self, *args, **more)

    monkeypatch.setattr(kind, "to", to)
    return seen


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_an_opened_network_waits_in_main_memory_in_its_type(tiny_pipeline: Path, kept: torch.dtype) -> None:
    backbone = open_backbone(read_folder(tiny_pipeline), ELSEWHERE, kept)
    assert facts(backbone.network) == ({"cpu"}, {kept})
    backbone.to_device()
    assert facts(backbone.network) == ({"meta"}, {kept})
    assert facts(backbone.fresh_network()) == ({"meta"}, {torch.float32})


@pytest.mark.parametrize(
    ("words", "kept", "places"),
    [
        (["student.base=bf16", "loop.precision=bf16"], {torch.bfloat16, torch.float32}, 1),
        ([], {torch.float32}, 1),
        (["student.kind=full"], {torch.float32}, 2),
    ],
)
def test_roles_come_after_the_encoders_have_gone(
    tiny_overrides: list[str],
    tiny_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    kept: set[torch.dtype],
    places: int,
) -> None:
    config = resolve("tcd", None, [*tiny_overrides, *words])
    backbone = load_teacher(config, read_folder(config.teacher), torch.device("cpu"))
    wide = sum(weight.numel() for weight in backbone.network.parameters() if weight.dtype == torch.float32)
    assert bool(wide) == (not words or "bf16" not in words[0])  # never whole in fp32, not even in main memory
    source: Any = open_source(config.data, backbone.folder)
    captioned = find_captioned(config, source, backbone.folder, tiny_cache)
    data = latent_set(
        captioned, backbone, encoders_fingerprint(config, backbone.folder), tiny_cache, backbone.latent_shape
    )
    encoders = [weakref.ref(encoder) for encoder in [*backbone.text_encoders, backbone.vae]]

    def network_distance(network: nn.Module) -> tuple[bool, set[torch.dtype]]:
        gc.collect()
        return any(encoder() is not None for encoder in encoders), facts(network)[1]

    backbone.device = ELSEWHERE
    seen = moves(monkeypatch, type(backbone.network), network_distance)
    run = lay_out(config, backbone, EncodedData(source, captioned, data))
    assert seen == [(False, kept)] * places
    for network in networks_of(run.student.roles):
        assert facts(network)[0] == {"meta"}


def test_a_drawing_network_comes_in_the_type_that_it_draws_in(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(load_backbone(tiny_pipeline).network)
    seen = moves(monkeypatch, kind, facts)
    image_generator = load_image_generator(tiny_pipeline, None, ELSEWHERE, precision=torch.bfloat16)
    assert seen == [({"cpu"}, {torch.bfloat16})]
    assert facts(image_generator.backbone.network) == ({"meta"}, {torch.bfloat16})


def test_a_synthesis_lets_its_encoders_go_first(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    bare = Backbone.to_device
    monkeypatch.setattr(Backbone, "to_device", lambda self: held.append("readers" in vars(self)) or bare(self))
    words = ["grid=2", "batch=2", "shard=2", "device=cpu"]
    synthesize(resolve_synthesis(words, tiny_pipeline), ["red", "green"], tmp_path / "set", quiet=True)
    assert held == [False]


def test_convolutions_keep_channels_last(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_pipelines.sd(tmp_path / "sd"))
    assert backbone.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert backbone.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    tokens = load_backbone(tiny_pipelines.pixart(tmp_path / "pixart"))
    assert tokens.network.pos_embed.proj.weight.is_contiguous()
