"""CLIP as a scorer, and whatever else is a CLIPModel whose number is a scaled cosine: PickScore, HPS v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping
from fewstep.methods.rewards.folder_layout import ScorerFiles
from fewstep.methods.rewards.licences import CLIP, Facts
from fewstep.methods.rewards.preprocess import CLIP_MEAN, CLIP_STD, Framing, frame
from fewstep.methods.rewards.reward import ScorerIdentity
from fewstep.methods.rewards.tokenize import check_rows, in_batches, load_tokenizer, token_ids
from fewstep.methods.rewards.weights import build, fingerprint, loading, same

HUNDRED = 100.0
"""Cosines are reported as per cents."""
_BICUBIC = 3
"""Bicubic's number in PIL and in preprocessor_config.json."""


class CosineScorer:
    """scale * cos(picture, prompt), of a CLIPModel's embeddings.

    Attributes:
        network: transformers' CLIPModel, frozen.
        scale: what the cosine is multiplied by; None for exp(logit scale), as trained.
    """

    def __init__(
        self, network: Any, tokenizer: Any, framing: Framing, scale: float | None, identity: ScorerIdentity
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.framing = framing
        self.scale = scale
        self.identity = identity

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """K prompts -> {"text": unit vectors [K, D]} on the CPU."""
        return in_batches(self._encode, prompts)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        config = self.network.config.text_config
        ids, _ = token_ids(self.tokenizer, prompts, config.max_position_embeddings)
        pooled = self.network.text_model(input_ids=ids.to(self.network.device)).pooler_output
        return {"text": unit(self.network.text_projection(pooled))}

    def score(self, pictures: Tensor, said: Mapping[str, Tensor]) -> Tensor:
        """[B, 3, H, W] in [-1, 1] and {"text": [B, D]} -> [B]; see `PreferenceScorer.score`."""
        check_rows(pictures, dict(said), ("text",))
        seen = frame(pictures, self.framing).to(self.network.device, self.network.dtype)
        pooled = self.network.vision_model(pixel_values=seen).pooler_output
        picture = unit(self.network.visual_projection(pooled))
        scale = self.network.logit_scale.exp() if self.scale is None else self.scale
        return scale * (picture * said["text"].to(picture, non_blocking=True)).sum(-1)


def unit(embedding: Tensor) -> Tensor:
    """Vectors of length 1, in at least fp32."""
    wide = embedding if embedding.dtype == torch.float64 else embedding.float()
    return F.normalize(wide, dim=-1)


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """A folder of transformers' CLIPModel, whoever trained it; 100 x cosine."""
    return load_published(files, device, dtype, CLIP, HUNDRED)


def load_published(
    files: ScorerFiles,
    device: torch.device,
    dtype: torch.dtype,
    facts: Facts,
    scale: float | None,
    framing: Framing | None = None,
) -> CosineScorer:
    """A scorer from a folder of transformers' CLIPModel.

    Args:
        framing: what the network sees; None for what the folder's preprocessor_config.json says.

    Raises:
        UserError: broken config, weights or tokenizer, or preprocessing that is not CLIP's.
    """
    config = clip_config(files)
    network = build(lambda: clip_network(config), files, same, lambda key: key.endswith("position_ids"), dtype, device)
    tokenizer = clip_tokenizer(files, config)
    framing = framing or read_framing(files, config)
    return CosineScorer(network, tokenizer, framing, scale, identity_of(facts, files, config, framing))


def clip_network(config: Any) -> nn.Module:
    """A CLIPModel without weights."""
    from transformers import CLIPModel

    network: nn.Module = CLIPModel(config)
    return network


def clip_config(files: ScorerFiles) -> Any:
    """transformers' CLIPConfig of config.json."""
    from transformers import CLIPConfig

    with loading(files.folder / "config.json"):
        return CLIPConfig.from_dict(files.config)


def clip_tokenizer(files: ScorerFiles, config: Any) -> Any:
    """The folder's tokenizer, if the network finds the end of its prompts.

    Raises:
        UserError: it marks the end with another token: embeddings would be taken from the first one instead.
    """
    tokenizer = load_tokenizer(files.folder, "clip", config.text_config.vocab_size)
    end = config.text_config.eos_token_id
    if end not in (2, tokenizer.eos_token_id):  # 2 is an old config's way to say: the highest id
        raise UserError(
            f"{files.folder / 'config.json'} has eos_token_id {end}; the nearest legal one is the tokenizer's, "
            f"{tokenizer.eos_token_id}"
        )
    return tokenizer


def read_framing(files: ScorerFiles, config: Any) -> Framing:
    """What preprocessor_config.json says of size and normalisation; CLIP's own where there is none.

    Raises:
        UserError: it asks for other steps than resizing the shorter side (bicubic) and cutting out the middle.
    """
    size = int(config.vision_config.image_size)
    file = files.folder / "preprocessor_config.json"
    if not file.is_file():
        return Framing(size)
    told = read_mapping(file)
    for step in ("do_resize", "do_center_crop", "do_normalize"):
        if not told.get(step, True):
            raise UserError(f"{file} has {step} = False; the nearest legal one is True")
    if told.get("resample", _BICUBIC) != _BICUBIC:
        raise UserError(f"{file} has resample = {told['resample']}; the nearest legal one is {_BICUBIC} (bicubic)")
    with loading(file):
        edges = {key: _edges(told.get(key, size)) for key in ("size", "crop_size")}
        mean, std = (
            tuple(float(value) for value in told.get(key, default))
            for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
    for key, found in edges.items():
        if found != {size}:
            raise UserError(f"{file} has {key} = {told[key]}; the nearest legal one is the network's, {size}")
    return Framing(size, "crop", mean, std)


def _edges(size: Any) -> set[int]:
    return {int(edge) for edge in (size.values() if isinstance(size, dict) else [size])}


def identity_of(facts: Facts, files: ScorerFiles, config: Any, framing: Framing, more: str = "") -> ScorerIdentity:
    """The record of a scorer on a CLIP network; `more` is what stands on top of it."""
    vision, text = config.vision_config, config.text_config
    backbone = (
        f"CLIP: ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, and text "
        f"transformer of {text.num_hidden_layers} x {text.hidden_size} into {config.projection_dim}{more}"
    )
    return facts.identity(backbone, fingerprint(files), framing.words())
