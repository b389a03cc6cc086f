"""A trained distance on disk: weights, and a record of its autoencoder, its training and its held-out figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_mapping, sha256, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.methods.latent_lpips.network import LatentLPIPS
from fewstep.methods.latent_lpips.settings import NetworkConfig

WEIGHTS = "perceptual.safetensors"
RECORD = "perceptual.json"


def save_latent_lpips(folder: Path, network: LatentLPIPS, vae: str, notes: Mapping[str, Any]) -> None:
    """Write the network and its record atomically.

    Args:
        vae: fingerprint of the autoencoder whose latents it was trained on.
    """
    record = {
        "network": network.config.model_dump(mode="json"),
        "channels": network.channels,
        "vae": vae,
        "licence": "Apache-2.0",
        **notes,
    }
    with atomic_folder(folder) as part:
        save_tensors(part / WEIGHTS, network.state_dict(), metadata={"licence": "Apache-2.0"})
        write_json(part / RECORD, {**record, "weights_sha256": sha256(part / WEIGHTS)})


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a trained distance.

    Raises:
        UserError: there is none, or it is broken.
    """
    if not (folder / RECORD).is_file():
        raise UserError(
            f"latent_lpips.folder = {str(folder)!r} holds no {RECORD}; train one by `fewstep train-latent-lpips`",
            field="latent_lpips.folder",
        )
    return read_mapping(folder / RECORD)


def load_latent_lpips(
    folder: Path | str, channels: int, vae_fingerprint: str, device: torch.device | str = "cpu"
) -> LatentLPIPS:
    """Load a trained distance for latents of the given autoencoder, frozen and in eval mode.

    Args:
        channels: channels of a latent.
        vae_fingerprint: `PipelineFolder.identity("vae")` of the pipeline whose latents will be compared.

    Raises:
        UserError: a part is missing or damaged, or it was made for latents of another autoencoder.
    """
    folder = Path(folder)
    record = read_record(folder)
    try:
        config = validate(NetworkConfig, record["network"])
        known, vae, expected = int(record["channels"]), str(record["vae"]), str(record["weights_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / RECORD} is not the record of a distance: {error!r} is wrong or missing",
            field="latent_lpips.folder",
        ) from error
    if (known, vae) != (channels, vae_fingerprint):
        theirs, ours = f"{known} channels, {vae[:16]}", f"{channels} channels, {vae_fingerprint[:16]}"
        raise UserError(
            f"latent_lpips.folder = {str(folder)!r} is for latents of another autoencoder ({theirs}), not of this "
            f"teacher's ({ours}); leave it out to train one for this teacher",
            field="latent_lpips.folder",
        )
    path = folder / WEIGHTS
    network = LatentLPIPS(config, channels)
    weights = load_tensors(path)
    if sha256(path) != expected:
        raise UserError(
            f"{path} is not the file that {RECORD} names (sha256 {expected[:16]}); restore it",
            field="latent_lpips.folder",
        )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(device)
