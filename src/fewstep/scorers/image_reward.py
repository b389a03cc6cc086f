"""ImageReward v1.0: BLIP's vision transformer, its text encoder with cross attention, and a small head."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.files import sha256
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.scorers.preprocess import Framing
from fewstep.scorers.registry import ScorerFiles
from fewstep.scorers.reward import IMAGE_REWARD
from fewstep.scorers.scorer import Scorer, load_frozen, load_tokenizer, loading, rename_keys

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Constants of the published code: the reward is (output - MEAN)/DEVIATION."""
LENGTH = 35
"""Tokens of a prompt; longer prompts are truncated."""
HEAD_WIDTH = 64
"""Width of an attention head of the vision transformer, in BLIP's base and large sizes alike."""
HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the head's linear layers; the others are dropouts. There are no activations between them."""
_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
_RULES = (
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
_UNUSED = r"^blip\.(vision|text)_proj\.|position_ids$"
"""BLIP's projections for contrastive pretraining, which the reward does not use, and a buffer."""


class RewardNetwork(nn.Module):
    """Network from a picture and the tokens of a prompt to the head's output, before it is normalised."""

    def __init__(self, vision: Any, text: Any, widths: Sequence[int]) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        linear = {i: nn.Linear(*sizes) for i, sizes in zip(HEAD_LAYERS, pairwise(widths), strict=True)}
        self.head = nn.Sequential(*(linear.get(i, nn.Identity()) for i in range(HEAD_LAYERS[-1] + 1)))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return outputs [B] of pictures [B, 3, size, size], tokens int64 [B, 35] and their mask int64 [B, 35]."""
        tokens = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens).last_hidden_state
        x: Tensor = states[:, 0] if states.dtype == torch.float64 else states[:, 0].float()
        output: Tensor = self.head(x)
        return output.squeeze(-1)


class ImageRewardScorer(Scorer):
    """(head(text encoder's first state | picture) - MEAN)/DEVIATION (Xu et al. 2023).

    A prompt is {"ids", "mask"}, int64 [35] each; the text encoder needs the picture too.
    """

    rows = ("ids", "mask")

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return {"ids", "mask"} of K prompts, int64 [K, 35]."""
        return dict(zip(self.rows, self.token_ids(prompts), strict=True))

    def compare(self, pixels: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return scores [B]."""
        output: Tensor = self.network(pixels, rows["ids"], rows["mask"])
        return (output - MEAN) / DEVIATION


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> ImageRewardScorer:
    """Load the published checkpoint into transformers' BLIP classes.

    Raises:
        UserError: broken config, weights or tokenizer.
    """
    from transformers import BlipTextConfig

    vision, widths = _sizes(files)
    with loading(files.folder / "med_config.json"):
        # The picture's width takes the place of the file's encoder_width, as in the published code.
        sizes = {key: files.config[key] for key in _TEXT_SIZES}
        text = BlipTextConfig(**sizes, encoder_hidden_size=vision.hidden_size, is_decoder=True)
    convert = partial(rename_keys, rules=_RULES)
    network = load_frozen(lambda: RewardNetwork(vision, text, widths), files, dtype, device, convert, _UNUSED)
    network.head.to(dtype if dtype == torch.float64 else torch.float32)
    tokenizer = load_tokenizer(files.folder, "bert", text.vocab_size)
    framing = Framing(vision.image_size)
    backbone = (
        f"BLIP: ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, and text encoder "
        f"of {text.num_hidden_layers} x {text.hidden_size} with cross attention, head {' '.join(map(str, widths))}"
    )
    identity = replace(IMAGE_REWARD, backbone=backbone, weights_sha256=sha256(*files.weights), input=str(framing))
    return ImageRewardScorer(network, tokenizer, LENGTH, framing, identity)


def _sizes(files: ScorerFiles) -> tuple[Any, list[int]]:
    """Return the vision transformer's config and the head's widths, from the checkpoint's shapes."""
    from transformers import BlipVisionConfig

    shapes = {key: entry.shape for key, entry in read_safetensors_header(files.weights[0])[1].items()}
    side = "blip.visual_encoder"
    with loading(files.weights[0]):
        _, places, width = shapes[f"{side}.pos_embed"]
        patch = shapes[f"{side}.patch_embed.proj.weight"][-1]
        blocks = {key.split(".")[3] for key in shapes if re.match(rf"{re.escape(side)}\.blocks\.\d+\.", key)}
        config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=shapes[f"{side}.blocks.0.mlp.fc1.weight"][0],
            num_hidden_layers=len(blocks),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=math.isqrt(places - 1) * patch,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,  # BLIP's checkpoints; transformers' default is another
        )
        matrices = [shapes[f"mlp.layers.{index}.weight"] for index in HEAD_LAYERS]
        return config, [matrices[0][1], *(matrix[0] for matrix in matrices)]
