"""Training of the latent perceptual distance: the teacher's latents, pairs of them, what pixels say, a network."""

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
from fewstep.evaluation.lite0 import Lite0Features
from fewstep.methods.latent_lpips.network import LatentLPIPS, calibrate, group_distances
from fewstep.methods.latent_lpips.pair_set import PairSet, latent_sampling, make_pair_set, pair_set_key
from fewstep.methods.latent_lpips.pairs import KINDS, PAIRS
from fewstep.methods.latent_lpips.pixel_features import Decode, Lite0Stages, PixelFeatures
from fewstep.methods.latent_lpips.rank_comparison import ENDS, NAMED, RankComparison, compare_distances
from fewstep.methods.latent_lpips.record import RECORD, read_record, save_latent_lpips
from fewstep.methods.latent_lpips.settings import LatentLpipsTrainConfig
from fewstep.training.loop import Batch, Update, train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog

FLOOR = 1e-4
"""Added to distances before their logarithm: below it, nothing is to be told apart."""
CALIBRATED = 8
"""Groups that the network's scale is set by before it is trained."""
TURN = 0.5
"""From here on the error of a log distance counts linearly, not squared."""


def log_error(found: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Huber's error of log(d + FLOOR), the weighted mean over a group's pairs, [n]; distances [n, P], weights [P].

    Of the logarithm, because distances of pairs span five orders of magnitude and near ones matter as much as far
    ones: at the end of a distillation all are near.
    """
    error = ((found + FLOOR).log() - (wanted.to(found) + FLOOR).log()).abs()
    each = torch.where(error < TURN, error.square(), 2 * TURN * error - TURN**2)
    return (each * weights.to(each)).sum(1) / weights.sum()


def pair_weights(named: float) -> Tensor:
    """`named` for the pairs that have a law of their own, 1 for the others, [P]."""
    weights = torch.ones(len(PAIRS))
    weights[NAMED] = named
    return weights


def run_inputs(
    config: LatentLpipsTrainConfig, backbone: Backbone, prompts: Sequence[str], pixel: PixelFeatures
) -> dict[str, str]:
    """Fingerprints of what a run is fed."""
    return {
        "teacher": backbone.folder.identity(),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "pixel network": pixel.weights_sha256,
        "pairs": pair_set_key(config.pairs, backbone, prompts, pixel),
    }


def run_key(config: LatentLpipsTrainConfig, inputs: Mapping[str, str]) -> str:
    """Fingerprint of a whole training: what a finished one is known by."""
    known = config.model_dump(mode="json")
    known["loop"] = {name: known["loop"][name] for name in ("steps", "batch", "accumulate", "seed", "precision")}
    return hashlib.sha256(json.dumps([known, dict(inputs)], sort_keys=True).encode()).hexdigest()


def finished(folder: Path, key: str) -> bool:
    """Whether a folder holds the distance of this very training.

    Raises:
        UserError: it holds that of another.
    """
    if not (folder / RECORD).is_file():
        return False
    found = read_record(folder).get("key")
    if found != key:
        raise UserError(
            f"{folder} holds a distance of another training ({str(found)[:12]}, now {key[:12]}); give another --out"
        )
    return True


def make_latent_lpips(
    config: LatentLpipsTrainConfig,
    backbone: Backbone,
    prompts: Sequence[str],
    out: Path,
    *,
    pixel: PixelFeatures | None = None,
    decode: Decode | None = None,
    cache: Path | None = None,
    accelerator: Accelerator | None = None,
    quiet: bool = False,
) -> Path:
    """Train the distance for a teacher from prompts alone, resuming what `out` holds; return its folder.

    A finished one is returned at once. The run folder gets config.yaml, log.jsonl, cache/ (the pairs), checkpoints/
    and heldout.webp (where matplotlib is installed) and perceptual/. All processes of a launch must ask.

    Args:
        prompts: what the teacher draws its latents from; some are held out.
        pixel: the features on pixels that teach it; Lite0's stages by default.
        decode: latents to pictures; the teacher's own autoencoder by default.
        cache: folder of the pairs; `out`/cache by default.
        accelerator: where it runs; one of `config.loop.precision` on the backbone's device by default.

    Raises:
        UserError: too few prompts, another run's folder, or a place that cannot be written to.
    """
    accelerator = accelerator or make_accelerator(config.loop.precision, backbone.device)
    pixel = pixel or Lite0Stages(backbone.device)
    inputs = run_inputs(config, backbone, prompts, pixel)
    key, target, store = run_key(config, inputs), out / "perceptual", cache or out / "cache"
    if finished(target, key):
        return target
    main = accelerator.is_main_process
    with fail_together():
        log = RunLog(out, config, title="perceptual distance", inputs=inputs, main=main, quiet=quiet)
    with log:
        if main:
            sweep(out)
            sweep(store)
        pairs = make_pair_set(config.pairs, backbone, prompts, pixel, store, decode=decode, quiet=quiet)
        network = fit(config, pairs, backbone.latent_shape[0], log, accelerator)
        with fail_together():
            if main:
                comparison = compare_distances(network, pairs.latents[pairs.heldout], pairs.distances[pairs.heldout])
                notes = {**describe(config, backbone, prompts, pixel, pairs, comparison), "key": key}
                if find_spec("matplotlib"):
                    from fewstep.methods.latent_lpips.figure import draw_figure

                    draw_figure(comparison, out / "heldout.webp")
                save_latent_lpips(target, network, backbone.folder.identity("vae"), notes)
    return target


def fit(
    config: LatentLpipsTrainConfig, pairs: PairSet, channels: int, log: RunLog, accelerator: Accelerator
) -> LatentLPIPS:
    """Train on the training groups, watching its validation groups; return the averaged network."""
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
        errors = log_error(found, batch["distances"], weights)
        return Loss(errors.mean())

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
    """What a trained distance says of itself."""
    shared = Lite0Features.weights_sha256 == pixel.weights_sha256
    return {
        "pixel": {
            "name": pixel.name,
            "weights_sha256": pixel.weights_sha256,
            "licence": pixel.licence,
            "input": pixel.input,
            "shared": "FD, KID and the distance to the teacher use later layers of the same network: a student trained "
            "with this distance is not measured by a stranger there"
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
