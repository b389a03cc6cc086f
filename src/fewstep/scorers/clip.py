"""CLIP as a scorer, and other CLIPModels whose score is a scaled cosine: PickScore, HPS v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.files import read_mapping, sha256
from fewstep.scorers.preprocess import CLIP_MEAN, CLIP_STD, Framing
from fewstep.scorers.registry import ScorerFiles
from fewstep.scorers.reward import CLIP, ScorerIdentity
from fewstep.scorers.scorer import Scorer, load_frozen, load_tokenizer, loading, unit

HUNDRED = 100.0
"""Cosines are reported in per cent."""
_BICUBIC = 3
"""Bicubic's number in PIL and in preprocessor_config.json."""


@dataclass(eq=False)
class CosineScorer(Scorer):
    """scale * cos(picture, prompt), of a CLIPModel's embeddings; a prompt is {"text": unit vector [D]}.

    Attributes:
        network: transformers' CLIPModel, frozen.
        scale: factor of the cosine; None for exp(logit scale), as trained.
    """

    scale: float | None

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode K prompts to {"text": unit vectors [K, D]}."""
        ids, _ = self.token_ids(prompts)
        pooled = self.network.text_model(input_ids=ids.to(self.network.device)).pooler_output
        return {"text": unit(self.network.text_projection(pooled))}

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of framed pictures, [B, D], not yet of length 1."""
        embedding: Tensor = self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)
        return embedding

    def compare(self, pixels: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return scores [B]."""
        picture = unit(self.embed(pixels))
        scale = self.network.logit_scale.exp() if self.scale is None else self.scale
        return scale * (picture * rows["text"].to(picture)).sum(-1)


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """Load any folder of transformers' CLIPModel; the score is 100 x cosine."""
    return load_clip_folder(files, device, dtype, CLIP, HUNDRED)


def load_clip_folder(
    files: ScorerFiles,
    device: torch.device,
    dtype: torch.dtype,
    identity: ScorerIdentity,
    scale: float | None,
    fit: Literal["crop", "pad"] = "crop",
) -> CosineScorer:
    """Load a scorer from a folder of transformers' CLIPModel.

    Args:
        identity: the published facts.
        scale: factor of the cosine; None for exp(logit scale).
        fit: "crop" as preprocessor_config.json defines it, or "pad" with CLIP's normalisation.

    Raises:
        UserError: broken config, weights or tokenizer, or preprocessing that is not CLIP's.
    """
    config = clip_config(files)
    network = load_frozen(lambda: clip_network(config), files, dtype, device)
    tokenizer = clip_tokenizer(files, config)
    framing = read_framing(files, config) if fit == "crop" else Framing(config.vision_config.image_size, "pad")
    return cosine_scorer(network, tokenizer, framing, scale, identity, files)


def cosine_scorer(
    network: Any, tokenizer: Any, framing: Framing, scale: float | None, published: ScorerIdentity, files: ScorerFiles
) -> CosineScorer:
    """Return the scorer of a loaded CLIPModel."""
    length = network.config.text_config.max_position_embeddings
    identity = identity_of(published, files, network.config, framing)
    return CosineScorer(network, tokenizer, length, framing, identity, scale)


def clip_network(config: Any) -> nn.Module:
    """Build a CLIPModel without weights."""
    from transformers import CLIPModel

    network: nn.Module = CLIPModel(config)
    return network


def clip_config(files: ScorerFiles) -> Any:
    """Return transformers' CLIPConfig of config.json."""
    from transformers import CLIPConfig

    with loading(files.folder / "config.json"):
        return CLIPConfig.from_dict(files.config)


def clip_tokenizer(files: ScorerFiles, config: Any) -> Any:
    """Load the folder's tokenizer and compare its end token with the network's.

    Raises:
        UserError: they differ, so that embeddings would be taken from the first token instead of the last.
    """
    tokenizer = load_tokenizer(files.folder, "clip", config.text_config.vocab_size)
    end = config.text_config.eos_token_id
    if end not in (2, tokenizer.eos_token_id):  # 2 in older configs means the highest id
        raise UserError(
            f"{files.folder / 'config.json'} has eos_token_id {end}, which must be the tokenizer's, "
            f"{tokenizer.eos_token_id}",
            field=str(files.folder / "config.json"),
        )
    return tokenizer


def read_framing(files: ScorerFiles, config: Any) -> Framing:
    """Return size and normalisation from preprocessor_config.json, or CLIP's own where there is none.

    Raises:
        UserError: it has other steps than resizing the shorter side (bicubic) and cropping the centre.
    """
    size = int(config.vision_config.image_size)
    file = files.folder / "preprocessor_config.json"
    own = read_mapping(file) if file.is_file() else {}
    steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": _BICUBIC}
    with loading(file):
        for key, value in {**steps, "size": size, "crop_size": size}.items():
            found = own.get(key, value)
            if set(found.values() if isinstance(found, dict) else [found]) != {value}:
                raise UserError(f"{file} has {key} = {found}, which must be {value}", field=str(file))
        mean, std = (
            tuple(float(value) for value in own.get(key, default))
            for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
    return Framing(size, "crop", mean, std)


def identity_of(
    published: ScorerIdentity, files: ScorerFiles, config: Any, framing: Framing, more: str = ""
) -> ScorerIdentity:
    """Return the record of a scorer on a CLIP network; `more` describes further parts."""
    vision, text = config.vision_config, config.text_config
    backbone = (
        f"CLIP: ViT of {vision.num_hidden_layers} x {vision.hidden_size}, patch {vision.patch_size}, and text "
        f"transformer of {text.num_hidden_layers} x {text.hidden_size} into {config.projection_dim}{more}"
    )
    return replace(published, backbone=backbone, weights_sha256=sha256(*files.weights), input=str(framing))
