"""References for the preference scorers: tiny random checkpoints under the published key names, and the published
formulas in plain torch, float64. Nothing here imports the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
CONTEXT = 16
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": len(PIECES), "width": 24, "heads": 2, "layers": 2},
}
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "disc", "square", ",", "on", "white"]
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(BERT_WORDS) + 2,
    "encoder_width": 17,
    "add_cross_attention": True,
}


class Random:
    """Tensors of a size that lets signals through, from one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def add(self, key: str, *shape: int, size: float | None = None, around: float = 0.0) -> None:
        size = size if size is not None else 1.4 / math.sqrt(math.prod(shape[1:]) or 1)
        self.state[key] = around + size * torch.randn(shape, generator=self.generator)

    def linear(self, key: str, out: int, into: int) -> None:
        self.add(f"{key}.weight", out, into)
        self.add(f"{key}.bias", out, size=0.1)

    def norm(self, key: str, width: int) -> None:
        self.add(f"{key}.weight", width, size=0.2, around=1.0)
        self.add(f"{key}.bias", width, size=0.1)


def write_clip_tokenizer(folder: Path) -> None:
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_bert_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n", encoding="utf-8")


def clip_model(seed: int, act: str = "gelu") -> Any:
    """A tiny random CLIPModel of transformers."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        projection_dim=16,
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 28, "patch_size": 14, "hidden_act": act, "projection_dim": 16},
        },
        text_config={
            **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"max_position_embeddings": CONTEXT, "vocab_size": len(PIECES), "hidden_act": act, "projection_dim": 16},
            **{"bos_token_id": len(PIECES) - 2, "eos_token_id": len(PIECES) - 1, "pad_token_id": len(PIECES) - 1},
        },
    )
    model = CLIPModel(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                size = 0.2 if parameter.ndim < 2 else 1.4 / math.sqrt(parameter[0].numel())
                size = 1.0 if "token_embedding" in name else size
                parameter.copy_(
                    size * torch.randn(parameter.shape, generator=draw) + ("norm" in name and "weight" in name)
                )
        model.logit_scale.fill_(2.0)
    return model.eval()


def write_clip(folder: Path, seed: int = 1) -> None:
    """A folder as CLIP and PickScore are published."""
    folder.mkdir(parents=True, exist_ok=True)
    clip_model(seed).save_pretrained(folder)
    write_clip_tokenizer(folder)


def open_clip_state(seed: int = 2) -> State:
    """A checkpoint of open_clip's class CLIP, as HPS v2's `state_dict` has it."""
    draw, vision, text = Random(seed), OPEN_CLIP["vision_cfg"], OPEN_CLIP["text_cfg"]
    width, patch, embed = vision["width"], vision["patch_size"], OPEN_CLIP["embed_dim"]
    draw.add("visual.class_embedding", width)
    draw.add("visual.positional_embedding", (vision["image_size"] // patch) ** 2 + 1, width, size=0.5)
    draw.add("visual.proj", width, embed, size=width**-0.5)
    draw.add("visual.conv1.weight", width, 3, patch, patch)
    draw.norm("visual.ln_pre", width)
    draw.norm("visual.ln_post", width)
    draw.add("positional_embedding", text["context_length"], text["width"], size=0.5)
    draw.add("text_projection", text["width"], embed, size=text["width"] ** -0.5)
    draw.add("token_embedding.weight", text["vocab_size"], text["width"], size=1.0)
    draw.norm("ln_final", text["width"])
    draw.state["logit_scale"] = torch.tensor(4.6)
    for prefix, side in (("visual.", vision), ("", text)):
        for number in range(side["layers"]):
            block, wide = f"{prefix}transformer.resblocks.{number}", side["width"]
            draw.norm(f"{block}.ln_1", wide)
            draw.norm(f"{block}.ln_2", wide)
            draw.add(f"{block}.attn.in_proj_weight", 3 * wide, wide)
            draw.add(f"{block}.attn.in_proj_bias", 3 * wide, size=0.1)
            draw.linear(f"{block}.attn.out_proj", wide, wide)
            draw.linear(f"{block}.mlp.c_fc", 4 * wide, wide)
            draw.linear(f"{block}.mlp.c_proj", wide, 4 * wide)
    return draw.state


def write_hpsv2(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "HPS_v2.1_compressed.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}), encoding="utf-8")
    write_clip_tokenizer(folder)


def _norm(state: State, key: str, x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + eps).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int, added: Tensor | float = 0.0) -> Tensor:
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    logits = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1]) + added
    return (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


def _open_clip_blocks(state: State, prefix: str, x: Tensor, layers: int, heads: int, added: Tensor | float) -> Tensor:
    for number in range(layers):
        block = f"{prefix}transformer.resblocks.{number}"
        h = _norm(state, f"{block}.ln_1", x, 1e-5)
        h = h @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]
        x = x + _linear(state, f"{block}.attn.out_proj", _attention(*h.chunk(3, -1), heads, added))
        h = _gelu(_linear(state, f"{block}.mlp.c_fc", _norm(state, f"{block}.ln_2", x, 1e-5)))
        x = x + _linear(state, f"{block}.mlp.c_proj", h)
    return x


def open_clip_cosine(state: State, pixels: Tensor, ids: Tensor) -> Tensor:
    """cos(picture, text) of open_clip's CLIP; the text is read at its highest token id."""
    state = {key: value.double() for key, value in state.items()}
    vision, text = OPEN_CLIP["vision_cfg"], OPEN_CLIP["text_cfg"]
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = _norm(state, "visual.ln_pre", x, 1e-5)
    x = _open_clip_blocks(state, "visual.", x, vision["layers"], vision["width"] // vision["head_width"], 0.0)
    picture = _norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    later = torch.full((ids.shape[1], ids.shape[1]), -math.inf, dtype=torch.float64).triu(1)
    y = _open_clip_blocks(state, "", y, text["layers"], text["heads"], later)
    y = _norm(state, "ln_final", y, 1e-5)[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    return (picture * y).sum(-1) / picture.norm(dim=-1) / y.norm(dim=-1)


def image_reward_state(seed: int = 3) -> State:
    """A checkpoint of ImageReward's class: BLIP under `blip.` (ViT of 2 x 128, patch 14), the head under `mlp.`."""
    draw, vision, text = Random(seed), "blip.visual_encoder", "blip.text_encoder"
    width, hidden = 128, MED["hidden_size"]
    draw.add(f"{vision}.cls_token", 1, 1, width, size=1.0)
    draw.add(f"{vision}.pos_embed", 1, 5, width, size=0.5)
    draw.add(f"{vision}.patch_embed.proj.weight", width, 3, 14, 14)
    draw.add(f"{vision}.patch_embed.proj.bias", width, size=0.1)
    draw.norm(f"{vision}.norm", width)
    for number in range(2):
        block = f"{vision}.blocks.{number}"
        draw.norm(f"{block}.norm1", width)
        draw.norm(f"{block}.norm2", width)
        draw.linear(f"{block}.attn.qkv", 3 * width, width)
        draw.linear(f"{block}.attn.proj", width, width)
        draw.linear(f"{block}.mlp.fc1", 4 * width, width)
        draw.linear(f"{block}.mlp.fc2", width, 4 * width)
    draw.add(f"{text}.embeddings.word_embeddings.weight", MED["vocab_size"], hidden, size=1.0)
    draw.add(f"{text}.embeddings.position_embeddings.weight", MED["max_position_embeddings"], hidden, size=0.5)
    draw.state[f"{text}.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    draw.norm(f"{text}.embeddings.LayerNorm", hidden)
    for number in range(MED["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{number}"
        for part, into in (("attention", hidden), ("crossattention", width)):
            draw.linear(f"{layer}.{part}.self.query", hidden, hidden)
            draw.linear(f"{layer}.{part}.self.key", hidden, into)
            draw.linear(f"{layer}.{part}.self.value", hidden, into)
            draw.linear(f"{layer}.{part}.output.dense", hidden, hidden)
            draw.norm(f"{layer}.{part}.output.LayerNorm", hidden)
        draw.linear(f"{layer}.intermediate.dense", MED["intermediate_size"], hidden)
        draw.linear(f"{layer}.output.dense", hidden, MED["intermediate_size"])
        draw.norm(f"{layer}.output.LayerNorm", hidden)
    draw.linear("blip.vision_proj", 8, width)
    draw.linear("blip.text_proj", 8, hidden)
    widths = (hidden, 16, 12, 8, 4, 1)
    for place, into, out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        draw.linear(f"mlp.layers.{place}", out, into)
    return draw.state


def write_image_reward(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "ImageReward.safetensors")
    (folder / "med_config.json").write_text(json.dumps(MED), encoding="utf-8")
    write_bert_tokenizer(folder)


def image_reward(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The reward of BLIP's networks, step by step."""
    state = {key: value.double() for key, value in state.items() if value.is_floating_point()}
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    bias = state[f"{vision}.patch_embed.proj.bias"]
    x = F.conv2d(pixels, state[f"{vision}.patch_embed.proj.weight"], bias, stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{vision}.pos_embed"]
    for number in range(2):
        block = f"{vision}.blocks.{number}"
        h = _linear(state, f"{block}.attn.qkv", _norm(state, f"{block}.norm1", x, 1e-6))
        x = x + _linear(state, f"{block}.attn.proj", _attention(*h.chunk(3, -1), 2))  # heads are 64 wide
        h = _gelu(_linear(state, f"{block}.mlp.fc1", _norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + _linear(state, f"{block}.mlp.fc2", h)
    x = _norm(state, f"{vision}.norm", x, 1e-6)
    places = state[f"{text}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = state[f"{text}.embeddings.word_embeddings.weight"][ids] + places
    y = _norm(state, f"{text}.embeddings.LayerNorm", y, 1e-12)
    padding = (1 - mask.double())[:, None, None, :] * -10000
    for number in range(MED["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{number}"
        for part, context, added in (("attention", None, padding), ("crossattention", x, 0.0)):
            seen = y if context is None else context
            sides = [
                _linear(state, f"{layer}.{part}.self.{key}", z)
                for key, z in zip(("query", "key", "value"), (y, seen, seen))
            ]
            h = _linear(state, f"{layer}.{part}.output.dense", _attention(*sides, MED["num_attention_heads"], added))
            y = _norm(state, f"{layer}.{part}.output.LayerNorm", h + y, 1e-12)
        h = _linear(state, f"{layer}.output.dense", _gelu(_linear(state, f"{layer}.intermediate.dense", y)))
        y = _norm(state, f"{layer}.output.LayerNorm", h + y, 1e-12)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = _linear(state, f"mlp.layers.{place}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def mps_state(seed: int = 6) -> State:
    """A checkpoint of MPS's class: CLIPModel under `model.`, two layers of two heads of 8 under `cross_model.`."""
    draw, width, head, heads = Random(seed), 16, 8, 2
    for key, value in clip_model(seed).state_dict().items():
        draw.state[f"model.{key}"] = value.clone()
    draw.state["model.text_model.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
    draw.state["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    for number in range(2):
        for part in (0, 1):
            draw.add(f"cross_model.layers.{number}.{part}.fn.norm.weight", width, size=0.2, around=1.0)
            draw.state[f"cross_model.layers.{number}.{part}.fn.norm.bias"] = torch.zeros(width)
        cross, own = (f"cross_model.layers.{number}.{part}.fn" for part in (0, 1))
        draw.add(f"{cross}.to_q.weight", heads * head, width, size=1.0)
        draw.add(f"{cross}.to_kv.weight", 2 * head, width)
        draw.add(f"{cross}.to_out.weight", width, heads * head)
        draw.add(f"{cross}.ff.0.weight", 8 * width, width)
        draw.add(f"{cross}.ff.2.weight", width, 4 * width)
        draw.state[f"{own}.rotary_emb.inv_freq"] = 10000 ** (-torch.arange(0, head, 2) / head)
        draw.add(f"{own}.fused_attn_ff_proj.weight", heads * head + 2 * head + 8 * width, width, size=0.5)
        draw.add(f"{own}.attn_out.weight", width, heads * head)
        draw.add(f"{own}.ff_out.1.weight", width, 4 * width)
    return draw.state


def write_mps(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clip_model(0).config.save_pretrained(folder)
    save_file(state, folder / "MPS_overall_checkpoint.safetensors")
    write_clip_tokenizer(folder)


def _swiglu(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return left * right / (1 + torch.exp(-right))


def _turn(x: Tensor) -> Tensor:
    """Rotary embedding as a rotation of pairs (i, i + D/2) by place/10000^(2i/D), written with complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def mps(state: State, pixels: Tensor, ids: Tensor, condition: Tensor, threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """Scores of B pictures with prompts ids [B, N] under a condition [1, N], and the words attended to [B, N]."""
    clip = clip_model(0)
    own = clip.state_dict().keys()
    clip.load_state_dict({key: state[f"model.{key}"] for key in own})
    clip = clip.double()
    state = {key: value.double() for key, value in state.items()}
    text, about = (clip.text_model(input_ids=x) for x in (ids, condition))
    words, ends = clip.text_projection(text.last_hidden_state), clip.text_projection(text.pooler_output)
    like = torch.einsum("bid,jd->bji", words, clip.text_projection(about.last_hidden_state)[0]).amax(1)
    attended = like / like.amax(1, keepdim=True) > threshold
    added = torch.zeros(attended.shape, dtype=torch.float64).masked_fill(~attended, -math.inf)[:, None, None, :]
    x = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)
    for number in range(2):
        cross, self_ = (f"cross_model.layers.{number}.{part}.fn" for part in (0, 1))
        h = _norm(state, f"{cross}.norm", x, 1e-5)
        key, value = (words @ state[f"{cross}.to_kv.weight"].T).chunk(2, -1)
        query = (h @ state[f"{cross}.to_q.weight"].T).unflatten(-1, (2, 8)).transpose(1, 2) / math.sqrt(8)
        mixed = (
            ((query @ key[:, None].transpose(-1, -2) + added).softmax(-1) @ value[:, None]).transpose(1, 2).flatten(2)
        )
        inner = _swiglu(h @ state[f"{cross}.ff.0.weight"].T) @ state[f"{cross}.ff.2.weight"].T
        x = x + mixed @ state[f"{cross}.to_out.weight"].T + inner
        h = _norm(state, f"{self_}.norm", x, 1e-5) @ state[f"{self_}.fused_attn_ff_proj.weight"].T
        query, key, value, inner = h[..., :16], h[..., 16:24], h[..., 24:32], h[..., 32:]
        query = _turn(query.unflatten(-1, (2, 8)).transpose(1, 2)) / math.sqrt(8)
        mixed = (
            ((query @ _turn(key)[:, None].transpose(-1, -2)).softmax(-1) @ value[:, None]).transpose(1, 2).flatten(2)
        )
        x = x + mixed @ state[f"{self_}.attn_out.weight"].T + _swiglu(inner) @ state[f"{self_}.ff_out.1.weight"].T
    picture = x[:, 0]
    cosine = (picture * ends).sum(-1) / picture.norm(dim=-1) / ends.norm(dim=-1)
    return state["model.logit_scale"].exp() * cosine, attended
