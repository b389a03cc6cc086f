"""Training of the latent LPIPS distance: a network on latents is fitted to distances of the decoded pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.common.accelerator import make_accelerator
from fewstep.common.distributed import fail_together, on_main_process
from fewstep.common.errors import UserError
from fewstep.common.files import sweep
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.schedule import expand
from fewstep.distillation.latent_lpips.network import (
    RECORD,
    LatentLPIPS,
    calibrate,
    group_distances,
    read_record,
    save_latent_lpips,
)
from fewstep.distillation.latent_lpips.pair_set import PairSet, latent_sampling, make_pair_set, pair_set_key
from fewstep.distillation.latent_lpips.pairs import KINDS, PAIRS
from fewstep.distillation.latent_lpips.pixel_features import Lite0Stages, PixelFeatures
from fewstep.distillation.latent_lpips.rank_comparison import ENDS, NAMED, RankComparison, compare_distances
from fewstep.distillation.latent_lpips.settings import LatentLpipsTrainConfig
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.training.loop import train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep.training.update import Batch, Update

FLOOR = 1e-4
"""Added to distances before their logarithm: smaller distances count as equal."""
CALIBRATED = 8
"""Groups that the network's initial scale is fitted to."""
HUBER_DELTA = 0.5
"""Error of a log distance from which the loss is linear, not squared."""


def log_error(found: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Return Huber's loss of log(d + FLOOR), the weighted mean over a group's pairs, [n]; d [n, P], weights [P].

    The logarithm is used because distances span five orders of magnitude and small ones matter as much as large ones:
    at the end of a distillation all are small.
    """
    error = ((found + FLOOR).log() - (wanted.to(found) + FLOOR).log()).abs()
    each = torch.where(error < HUBER_DELTA, error.square(), 2 * HUBER_DELTA * error - HUBER_DELTA**2)
    return (each * weights.to(each)).sum(1) / weights.sum()


def pair_weights(named: float) -> Tensor:
    """Return the weight `named` for the pairs of `KINDS` and 1 for the others, [P]."""
    weights = torch.ones(len(PAIRS))
    weights[NAMED] = named
    return weights


def run_inputs(
    config: LatentLpipsTrainConfig, backbone: Backbone, prompts: Sequence[str], pixel: PixelFeatures
) -> dict[str, str]:
    """Return fingerprints of a run's inputs."""
    return {
        "teacher": backbone.folder.identity(),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "pixel network": pixel.weights_sha256,
        "pairs": pair_set_key(config.pairs, backbone, prompts, pixel),
    }


def run_key(config: LatentLpipsTrainConfig, inputs: Mapping[str, str]) -> str:
    """Return the fingerprint that identifies a finished training."""
    settings = config.model_dump(mode="json")
    settings["loop"] = {name: settings["loop"][name] for name in ("steps", "batch", "accumulate", "seed", "precision")}
    return hashlib.sha256(json.dumps([settings, dict(inputs)], sort_keys=True).encode()).hexdigest()


def finished(folder: Path, key: str) -> bool:
    """Return whether a folder holds the result of the training with fingerprint `key`.

    Raises:
        UserError: it holds another training's.
    """
    if not (folder / RECORD).is_file():
        return False
    found = read_record(folder).get("key")
    if found != key:
        raise UserError(
            f"{folder} holds a distance of another training ({str(found)[:12]}, now {key[:12]}); give another --out",
            field="out",
        )
    return True


def make_latent_lpips(
    config: LatentLpipsTrainConfig,
    backbone: Backbone,
    prompts: Sequence[str],
    out: Path,
    *,
    pixel: PixelFeatures | None = None,
    quiet: bool = False,
) -> Path:
    """Train the distance for a teacher from prompts alone, resuming what `out` holds; return its folder.

    A finished one is returned at once. `out` holds config.yaml, log.jsonl, cache/ (the pairs), checkpoints/,
    heldout.webp (where matplotlib is installed) and perceptual/. All processes of a launch must call this.

    Args:
        prompts: prompts of the teacher's latents; some are held out.
        pixel: the features on pixels; Lite0's stages by default.

    Raises:
        UserError: too few prompts, another run's folder, or a folder that cannot be written to.
    """
    accelerator = make_accelerator(config.loop.precision, backbone.device)
    pixel = pixel or Lite0Stages(backbone.device)
    inputs = run_inputs(config, backbone, prompts, pixel)
    key, target, cache = run_key(config, inputs), out / "perceptual", out / "cache"
    if finished(target, key):
        return target
    main = accelerator.is_main_process
    with fail_together():
        log = RunLog(out, config, title="perceptual distance", inputs=inputs, main=main, quiet=quiet)
    with log:
        if main:
            sweep(out)
            sweep(cache)
        pairs = make_pair_set(config.pairs, backbone, prompts, pixel, cache, quiet=quiet)
        network = fit(config, pairs, backbone.latent_shape[0], log, accelerator)
        with fail_together():
            if main:
                comparison = compare_distances(network, pairs.latents[pairs.heldout], pairs.distances[pairs.heldout])
                notes = {**describe(config, backbone, prompts, pixel, pairs, comparison), "key": key}
                if find_spec("matplotlib"):
                    from fewstep.distillation.latent_lpips.rank_comparison import draw_figure

                    draw_figure(comparison, out / "heldout.webp")
                save_latent_lpips(target, network, backbone.folder.identity("vae"), notes)
    return target


def fit(
    config: LatentLpipsTrainConfig, pairs: PairSet, channels: int, log: RunLog, accelerator: Accelerator
) -> LatentLPIPS:
    """Train on the training groups, validate on the validation groups, and return the averaged network."""
    device = accelerator.device
    torch.manual_seed(config.loop.seed)
    network = LatentLPIPS(config.network, channels).to(device)
    first = pairs.train[:CALIBRATED]
    near = group_distances(network, pairs.latents[first].to(device), ENDS).cpu()
    calibrate(network, near + FLOOR, pairs.distances[first] + FLOOR)
    weights = pair_weights(config.named)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        rows = pairs.train[torch.from_numpy(items)]
        return {
            "groups": pairs.latents[rows].to(device, non_blocking=True),
            "distances": pairs.distances[rows].float().to(device, non_blocking=True),
        }

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        groups = batch["groups"]
        mirrored = rng.chance("mirror", config.mirror).to(device)
        found = group_distances(network, torch.where(expand(mirrored, groups).bool(), groups.flip(-1), groups), ENDS)
        return Loss(log_error(found, batch["distances"], weights).mean())

    def loaded(weights: Mapping[str, Tensor]) -> LatentLPIPS:
        other = LatentLPIPS(config.network, channels)
        other.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
        return other.to(device).eval().requires_grad_(False)

    def evaluate_weights(step: int, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        rows = pairs.validation
        found = compare_distances(loaded(weights["perceptual"]), pairs.latents[rows], pairs.distances[rows]).overall()
        return {f"validation/{name}": value for name, value in found.items()}

    plan = [Update("perceptual", dict(network.named_parameters()), loss, config.optim)]
    trained = train(plan, fetch, len(pairs.train), config.loop, log, accelerator, on_main_process(evaluate_weights))
    return loaded(trained.weights["perceptual"])


def describe(
    config: LatentLpipsTrainConfig,
    backbone: Backbone,
    prompts: Sequence[str],
    pixel: PixelFeatures,
    pairs: PairSet,
    comparison: RankComparison,
) -> dict[str, Any]:
    """Return the notes of a trained distance's record."""
    shared = Lite0Features.weights_sha256 == pixel.weights_sha256
    return {
        "pixel": {
            "name": pixel.name,
            "weights_sha256": pixel.weights_sha256,
            "licence": pixel.licence,
            "input": pixel.input,
            "shared": "FD, KID and the distance to the teacher use later layers of the same network: they are not "
            "independent of a student that was trained with this distance"
            if shared
            else "",
        },
        "prompts": len(set(prompts)),
        "sampling": latent_sampling(config.pairs, backbone).model_dump(mode="json"),
        "pairs": {"kinds": list(KINDS), "groups": len(pairs.latents), "each": len(PAIRS)},
        "training": config.model_dump(mode="json"),
        "heldout": {
            "groups": len(pairs.heldout),
            "n": comparison.pixel.size,
            "rank_correlation": comparison.overall(),
            "by_kind": comparison.by_kind(),
        },
    }
