"""The training set: groups of latents with the distances of their pictures, made once and cached in shards.

A killed run resumes at the shard it was in. Training needs these latents and distances only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.device import DTYPES, pick_precision
from fewstep.common.distributed import main_process_first
from fewstep.common.messages import Bar
from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng
from fewstep.common.tensor_cache import cached
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import BASE, Condition
from fewstep.distillation.latent_lpips.pairs import FEW, MEMBERS, PAIRS, changes, estimates, partner
from fewstep.distillation.latent_lpips.pixel_features import Decode, PixelFeatures, decoder, pair_distances
from fewstep.distillation.latent_lpips.settings import PairConfig, check_prompts
from fewstep.inference.generator import ImageGenerator, image_generator_of
from fewstep.students.resolve import teacher_sampling

SHARD = 16
"""Groups per shard; even, so that partners are in one shard."""


@dataclass(frozen=True)
class PairSet:
    """Groups of latents and their pixel distances.

    Attributes:
        latents: members of each group, float32 [N, 12, C, h, w].
        distances: distances of the pictures of a group's `PAIRS`, float64 [N, 66].
        train, validation, heldout: indices of groups; no two of the three share a prompt.
    """

    latents: Tensor
    distances: Tensor
    train: Tensor
    validation: Tensor
    heldout: Tensor


def split(groups: int, prompts: int, share: float) -> tuple[list[int], list[range]]:
    """Return the prompt number of each group, and the groups for training, validation and held-out figures.

    Partners have different prompts of the same part. Prompts are repeated where there are more groups.
    """
    used = min(groups, prompts) // 2 * 2
    each = min(max(2, round(used * share / 2) * 2), (used - 2) // 4 * 2)  # at least two prompts are left to train on
    parts, start = [], 0
    sizes = (used - 2 * each, each, each)
    counts = [max(2, round(groups * size / used / 2) * 2) for size in sizes[1:]]
    chosen: list[int] = []
    first = 0
    for size, count in zip(sizes, (groups - sum(counts), *counts), strict=True):
        chosen += [first + i % size for i in range(count)]
        parts.append(range(start, start + count))
        first, start = first + size, start + count
    return chosen, parts


def distinct_prompts(prompts: Sequence[str], groups: int, seed: int) -> list[str]:
    """Return up to `groups` of the distinct prompts, drawn at random.

    Raises:
        UserError: fewer than can be split.
    """
    found = check_prompts(prompts)
    chosen = generator(seed, "perceptual prompts").permutation(len(found))[:groups]
    return [found[i] for i in chosen]


def latent_sampling(config: PairConfig, backbone: Backbone) -> Sampling:
    """Return the sampling settings of the teacher's latents: its own guidance, the config's steps."""
    own = teacher_sampling(backbone.folder)
    omega = own.omega if config.omega is None else config.omega
    return Sampling(sampler="ddim", steps=config.steps, omega=omega, spacing="trailing", end="clean")


def pair_set_key(config: PairConfig, backbone: Backbone, prompts: Sequence[str], pixel: PixelFeatures) -> str:
    """Return a fingerprint of all that decides a set of pairs."""
    known = [
        backbone.folder.identity(),
        hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        f"{pixel.name} {pixel.weights_sha256} {pixel.input}",
        config.model_dump(mode="json"),
        latent_sampling(config, backbone).model_dump(mode="json"),
        MEMBERS,
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def make_pair_set(
    config: PairConfig,
    backbone: Backbone,
    prompts: Sequence[str],
    pixel: PixelFeatures,
    cache: Path,
    *,
    quiet: bool = False,
) -> PairSet:
    """Generate the teacher's latents, make groups around them, and measure their decoded pictures.

    All processes of a launch must call this: the main one computes, the others read the cached shards.

    Args:
        prompts: prompts of the teacher's latents; some are held out.
        pixel: the features on pixels.
        cache: folder of the shards.

    Raises:
        UserError: too few prompts.
    """
    key = pair_set_key(config, backbone, prompts, pixel)
    used = distinct_prompts(prompts, config.groups, config.seed)
    rows, parts = split(config.groups, len(used), config.heldout)
    decode = decoder(backbone)

    def all_shards() -> list[dict[str, Tensor]]:
        made = []
        with Bar(total=config.groups, desc="pairs of latents", unit="group", disable=quiet) as bar:
            for start in range(0, config.groups, SHARD):
                items = range(start, min(start + SHARD, config.groups))

                def make(items: range = items) -> dict[str, Tensor]:
                    groups = draw_groups(config, backbone, [used[rows[i]] for i in items], items)
                    return {"latents": groups, "distances": picture_distances(groups, decode, pixel)}

                made.append(cached(cache, f"pairs-{key[:16]}-{items.start}-{items.stop}", make))
                bar.update(len(items))
        return made

    shards = main_process_first(all_shards)
    backbone.release_encoders()
    train, validation, heldout = (torch.tensor(list(part)) for part in parts)
    latents, distances = (torch.cat([shard[name] for shard in shards]) for name in ("latents", "distances"))
    return PairSet(latents, distances, train, validation, heldout)


@torch.no_grad()
def draw_groups(config: PairConfig, backbone: Backbone, prompts: Sequence[str], items: Sequence[int]) -> Tensor:
    """Return the groups of items with their prompts, [n, 12, C, h, w] on the CPU; partners must be among the items."""
    device = backbone.device
    sampling = latent_sampling(config, backbone)
    precision = DTYPES[pick_precision("auto", device)]
    image_generator = replace(image_generator_of(backbone, sampling), precision=precision)
    condition = backbone.encode(prompts)
    rng = KeyedRng(config.seed, 0, tuple(items), device)
    seeds = [(config.seed * 1_000_003 + item) * 2 for item in items]
    latent = image_generator.latents(condition, seeds, sampling)
    other_seed = image_generator.latents(condition, [seed + 1 for seed in seeds], sampling)
    few = in_few_steps(image_generator, condition, seeds, rng.integers("few steps", 0, len(FEW)), sampling)
    place = {item: row for row, item in enumerate(items)}
    far = latent[[place[partner(item)] for item in items]]
    prompted, empty = (
        {name: x.to(device) for name, x in states.items()} for states in (condition, backbone.null(len(items)))
    )
    unprompted = ConditionedDenoiser(image_generator.denoiser, empty, BASE)
    omega = torch.full((len(items),), sampling.omega) if sampling.omega else None
    teacher = replace(unprompted, condition=prompted, null=empty, omega=omega)
    latent, other_seed, few, far = (x.to(device) for x in (latent, other_seed, few, far))
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        estimated, changed = estimates(teacher, unprompted, latent, rng), changes(latent, other_seed, far, rng)
        return torch.stack([latent, other_seed, few, *estimated, *changed, far], 1).float().cpu()  # as in MEMBERS


def in_few_steps(
    image_generator: ImageGenerator, condition: Condition, seeds: Sequence[int], chosen: Tensor, sampling: Sampling
) -> Tensor:
    """Return latents from the same noise in FEW[chosen] steps, [n, C, h, w]."""
    found: dict[int, Tensor] = {}
    for number, steps in enumerate(FEW):
        rows = (chosen == number).nonzero().flatten().tolist()
        if rows:
            part = {name: value[rows] for name, value in condition.items()}
            quick = sampling.model_copy(update={"steps": steps})
            latents = image_generator.latents(part, [seeds[row] for row in rows], quick)
            found |= dict(zip(rows, latents, strict=True))
    return torch.stack([found[row] for row in range(len(seeds))])


def picture_distances(groups: Tensor, decode: Decode, pixel: PixelFeatures) -> Tensor:
    """Return the distances of each group's decoded pictures by the pixel network, for `PAIRS`, float64 [n, 66]."""
    return torch.stack([pair_distances(pixel(decode(group)), PAIRS) for group in groups])
