"""Weights under the names of their original code."""

from __future__ import annotations

import torch


def sd3_original(weights: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A transformer of Stable Diffusion 3 under the names of its original code, q, k and v in one matrix."""
    plain = {
        "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
    }  # fmt: skip
    swapped = {"norm_out.linear", f"transformer_blocks.{layers - 1}.norm1_context.linear"}
    for i in range(layers):
        here, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for ours, theirs in (
            ("norm1.linear", "x_block.adaLN_modulation.1"),
            ("norm1_context.linear", "context_block.adaLN_modulation.1"),
            ("attn.to_out.0", "x_block.attn.proj"), ("attn.to_add_out", "context_block.attn.proj"),
            ("ff.net.0.proj", "x_block.mlp.fc1"), ("ff.net.2", "x_block.mlp.fc2"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"), ("ff_context.net.2", "context_block.mlp.fc2"),
        ):  # fmt: skip
            plain[f"{here}.{ours}"] = f"{there}.{theirs}"
    found = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if name in plain:
            found[plain[name]] = value
        elif module in plain:
            halves = value.chunk(2) if module in swapped else (value,)
            found[f"{plain[module]}.{kind}"] = torch.cat(halves[::-1])
    for i in range(layers):
        own = f"transformer_blocks.{i}.attn."
        joint = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}
        for block, names in joint.items():
            for kind in ("weight", "bias"):
                joined = torch.cat([weights[f"{own}{name}.{kind}"] for name in names])
                found[f"joint_blocks.{i}.{block}.attn.qkv.{kind}"] = joined
    return found
