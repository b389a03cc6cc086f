"""The frozen networks of a recipe beside its teacher: a distance between latents, and a reward.

A reward decodes latents with gradient and scores the pictures with the prompts of the training data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.backbones.base import Backbone
from fewstep.backbones.recompute import recompute_blocks
from fewstep.backbones.tiles import decode_tiles
from fewstep.common.defaults import world
from fewstep.common.errors import UserError
from fewstep.common.files import sha256, short_digest
from fewstep.data.sources import WorldData
from fewstep.distillation.checks import Source
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.latent_lpips.settings import LatentLpipsTrainConfig
from fewstep.methods.terms import FrozenNetworks, Reward
from fewstep.scorers.reward import PreferenceScorer

MOST_HELD = 2**30
"""Bytes of prepared prompts that are kept in memory; more are prepared batch by batch."""
MOST_PIXELS = 2**17
"""Pixels decoded and scored at once with all activations kept: 2.8 GiB of SD's decoder in fp32."""


class PreparedPrompts:
    """A scorer's inputs of prompts: of all beforehand if they fit into `MOST_HELD`, else batch by batch."""

    def __init__(self, scorer: PreferenceScorer, prompts: Sequence[str]) -> None:
        self._scorer, self._prompts = scorer, prompts
        a_prompt = sum(rows.nbytes for rows in scorer.prepare(prompts[:1]).values())
        self._all = scorer.prepare(prompts) if a_prompt * len(prompts) <= MOST_HELD else None

    def rows(self, which: Tensor) -> Mapping[str, Tensor]:
        """Return the inputs of some prompts, int64 [B]."""
        chosen = which.cpu()
        if self._all is None:
            return self._scorer.prepare([self._prompts[row] for row in chosen.tolist()])
        return {name: value[chosen] for name, value in self._all.items()}


def pixels_of(backbone: Backbone, scorer: PreferenceScorer, x0: Tensor) -> int:
    """Return the pixels of a picture, or those of the scorer's input if they are more."""
    own = x0.shape[-2] * x0.shape[-1] * backbone.folder.scale**2
    framing = getattr(scorer, "framing", None)
    return max(own, framing.size**2 if framing else 0)


def make_reward(
    backbone: Backbone, scorer: PreferenceScorer, prompts: Sequence[str], tile: int | None = None
) -> tuple[Reward, int]:
    """Return the reward, (x_0, prompt numbers of each scoring) -> scores, and the number of prompts.

    Pictures are decoded in fp32, once for all prompts that they are scored with. A batch of more than `MOST_PIXELS` is
    decoded and scored in parts that are recomputed in the backward pass, so that one part's activations are held at a
    time. For a single picture, or tile, of more pixels the decoder's blocks are recomputed too.

    Args:
        tile: pixels a side of the tiles that pictures are decoded in; None for whole pictures.

    Raises:
        UserError: there is a single prompt, and the loss needs a wrong one beside it.
    """
    if len(prompts) < 2:
        raise UserError("data.source holds 1 prompt; method.reward needs at least 2", field="data.source")
    prepared = PreparedPrompts(scorer, prompts)

    scale = backbone.folder.scale

    def scored(x0: Tensor, *rows: Mapping[str, Tensor]) -> list[Tensor]:
        pictures = decode_tiles(backbone.decode, x0, tile // scale, scale) if tile else backbone.decode(x0)
        return [scorer.score(pictures, own) for own in rows]

    def reward(x0: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        pixels = pixels_of(backbone, scorer, x0)
        if min(pixels, tile**2 if tile else pixels) > MOST_PIXELS:
            recompute_blocks(backbone.vae.decoder)
        rows = [prepared.rows(which) for which in wanted]
        with torch.autocast(x0.device.type, enabled=False):
            parts = torch.split(x0.float(), max(1, MOST_PIXELS // pixels))
            if len(parts) == 1:
                return scored(parts[0], *rows)
            found = []
            for start, part in zip(range(0, len(x0), len(parts[0])), parts, strict=True):
                own = [{name: value[start : start + len(part)] for name, value in row.items()} for row in rows]
                found.append(checkpoint(scored, part, *own, use_reentrant=False, preserve_rng_state=False))
        return [torch.cat(scores) for scores in zip(*found, strict=True)]

    return reward, len(prompts)


def load_frozen_networks(
    config: DistillConfig, backbone: Backbone, prompts: Sequence[str], latent_lpips: Path | None
) -> tuple[FrozenNetworks, dict[str, str]]:
    """Load the frozen networks of a recipe beside its teacher; return them and their fingerprints.

    Args:
        prompts: the distinct ones of the data.
        latent_lpips: folder of the distance between latents, if the recipe uses one.
    """
    frozen, inputs = FrozenNetworks(), {}
    if latent_lpips is not None:
        from fewstep.distillation.latent_lpips.network import WEIGHTS, load_latent_lpips

        vae = backbone.folder.identity("vae")
        network = load_latent_lpips(latent_lpips, backbone.latent_shape[0], vae, backbone.device)
        frozen = replace(frozen, distance=lambda landed, wanted, at, condition: network(landed, wanted))
        inputs["perceptual distance"] = sha256(latent_lpips / WEIGHTS)
    if config.method.reward.weight:
        scorer = load_named_scorer(config.method.reward.scorer, backbone.device)
        frozen = replace(frozen, reward=make_reward(backbone, scorer, prompts, config.method.reward.tile))
        inputs["scorer"] = scorer.identity.weights_sha256
    return frozen, inputs


def latent_lpips_folder(
    config: DistillConfig, source: Source, backbone: Backbone, prompts: Sequence[str], cache: Path
) -> Path | None:
    """Return the folder of the recipe's distance between latents; train the distance first if none is named.

    It belongs to the teacher and the source, not to the run: stages and seeds that draw the bundled world's captions
    by seeds of their own share one, trained on those of its own seed.
    """
    if config.method.distance != "latent_lpips" or not config.method.consistency:
        return None
    if config.latent_lpips.folder:
        return Path(config.latent_lpips.folder)
    from fewstep.distillation.latent_lpips.train import make_latent_lpips

    own = {name: getattr(config.latent_lpips, name) for name in LatentLpipsTrainConfig.model_fields}
    loop = config.latent_lpips.loop.model_copy(update={"precision": config.loop.precision})  # one precision a process
    settings = LatentLpipsTrainConfig(**own | {"loop": loop})
    if isinstance(source, WorldData):
        drawn = source.world.captions_alone(config.data.captions, loop.seed)
        prompts = sorted({caption for row in drawn.captions for caption in row})
    known = json.dumps([backbone.folder.identity(), list(prompts), settings.model_dump(mode="json")])
    place = cache / f"perceptual-{short_digest(known)}"
    return make_latent_lpips(settings, backbone, prompts, place)


def load_named_scorer(named: str, device: torch.device) -> PreferenceScorer:
    """Load the scorer that `method.reward.scorer` names: `world`, or NAME:FOLDER."""
    if named == "world":
        scorer: PreferenceScorer = world("method.reward.scorer").load_scorer(device)
        return scorer
    from fewstep.scorers.registry import load_scorer

    name, _, folder = named.partition(":")
    return load_scorer(name, Path(folder), device)
