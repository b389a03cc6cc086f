"""The networks of published sizes, on meta tensors: no weights are made, and nothing is computed."""

from __future__ import annotations

import pytest
import torch

from fewstep.backbones.families import FAMILIES, adapts
from fewstep.students.lora_keys import original_places

BILLIONS = {"z_image": 6.15, "qwen_image": 20.43, "flux2": 3.88, "chroma": 8.9, "krea2": 12.9, "anima": 1.96}
"""Weights that the publishers name, or that others count."""
COMFYUI: dict[str, dict[str, str]] = {
    "z_image": {
        "layers.29.attention.qkv": "layers.29.attention.to_q layers.29.attention.to_k layers.29.attention.to_v",
        "noise_refiner.1.attention.out": "noise_refiner.1.attention.to_out.0",
        "context_refiner.0.feed_forward.w3": "context_refiner.0.feed_forward.w3",
    },
    "qwen_image": {
        "transformer_blocks.59.attn.add_q_proj": "transformer_blocks.59.attn.add_q_proj",
        "transformer_blocks.0.img_mlp.net.0.proj": "transformer_blocks.0.img_mlp.net.0.proj",
    },
    "flux2": {
        "double_blocks.4.txt_attn.qkv": "transformer_blocks.4.attn.add_q_proj transformer_blocks.4.attn.add_k_proj "
        "transformer_blocks.4.attn.add_v_proj",
        "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
        "single_blocks.19.linear1": "single_transformer_blocks.19.attn.to_qkv_mlp_proj",
        "single_blocks.19.linear2": "single_transformer_blocks.19.attn.to_out",
    },
    "chroma": {
        "double_blocks.18.img_mlp.2": "transformer_blocks.18.ff.net.2",
        "single_blocks.37.linear1": "single_transformer_blocks.37.attn.to_q single_transformer_blocks.37.attn.to_k "
        "single_transformer_blocks.37.attn.to_v single_transformer_blocks.37.proj_mlp",
    },
    "krea2": {
        "blocks.27.attn.wo": "transformer_blocks.27.attn.to_out.0",
        "blocks.0.mlp.down": "transformer_blocks.0.ff.down",
        "txtfusion.refiner_blocks.1.attn.gate": "text_fusion.refiner_blocks.1.attn.to_gate",
    },
    "anima": {
        "blocks.27.self_attn.output_proj": "transformer_blocks.27.attn1.to_out.0",
        "blocks.0.cross_attn.k_proj": "transformer_blocks.0.attn2.to_k",
        "blocks.0.mlp.layer2": "transformer_blocks.0.ff.net.2",
    },
}
"""Some layers in ComfyUI's names -> those of diffusers, by ComfyUI's own key maps (2026-11)."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BILLIONS)
def test_a_network_of_the_published_size_takes_a_picture_of_1024_pixels(name: str) -> None:
    from sizes import PUBLISHED

    with torch.device("meta"):
        network = PUBLISHED[name].network().requires_grad_(False)
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)
    assert PUBLISHED[name].call(network, 1).shape == (1, *PUBLISHED[name].latent)
    backbone = PUBLISHED[name].backbone()
    assert backbone.time_embedding(network) is network.get_submodule(backbone.time_embedder)
    assert isinstance(network.get_submodule(backbone.outlets[0]), torch.nn.Linear)


@pytest.mark.slow
@pytest.mark.parametrize("name", BILLIONS)
def test_every_adapted_layer_has_comfyuis_name(name: str) -> None:
    from sizes import PUBLISHED

    with torch.device("meta"):
        network = PUBLISHED[name].network()
    every = [key for key, part in network.named_modules() if isinstance(part, torch.nn.Linear)]
    places = original_places(every)
    assert {theirs: " ".join(places[theirs][0]) for theirs in COMFYUI[name]} == COMFYUI[name]
    targets = FAMILIES[PUBLISHED[name].pipeline].targets
    adapted = {layer for layer in every if any(adapts(target, layer) for target in targets)}
    held = [layer for modules, _ in places.values() for layer in modules]
    assert sorted(held) == sorted(every), "each layer is in one place"
    assert len(adapted) >= 100
    assert not any(swapped for modules, swapped in places.values() if adapted & set(modules))
