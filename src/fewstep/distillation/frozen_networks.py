"""The frozen networks of a recipe beside its teacher: a distance between latents, and a reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.backbones.base import Backbone
from fewstep.common.defaults import world
from fewstep.common.files import sha256, short_digest
from fewstep.data.sources import WorldData
from fewstep.distillation.config import DistillConfig
from fewstep.distillation.reward import make_reward
from fewstep.distillation.sources import Source
from fewstep.methods.latent_lpips.settings import LatentLpipsTrainConfig
from fewstep.methods.rewards.reward import PreferenceScorer
from fewstep.methods.update_plan import FrozenNetworks


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
        from fewstep.methods.latent_lpips.record import WEIGHTS, load_latent_lpips

        vae = backbone.folder.identity("vae")
        network = load_latent_lpips(latent_lpips, backbone.latent_shape[0], vae, backbone.device)
        frozen = replace(frozen, distance=lambda landed, wanted, at, condition: network(landed, wanted))
        inputs["perceptual distance"] = sha256(latent_lpips / WEIGHTS)
    if config.method.reward.weight:
        scorer = load_named_scorer(config.method.reward.scorer, backbone.device)
        frozen = replace(frozen, reward=make_reward(backbone, scorer, prompts))
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
    from fewstep.methods.latent_lpips.train import make_latent_lpips

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
    from fewstep.methods.rewards.registry import load_scorer

    name, _, folder = named.partition(":")
    return load_scorer(name, Path(folder), device)
