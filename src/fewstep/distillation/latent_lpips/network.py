"""A distance between latents in the features of a small network on latents.

TLCM compares latents in features of a VGG with 4-channel input and three of its max-pools removed, because latents are
eight times smaller than pictures (arXiv 2406.05768v6). This network is smaller; it is trained on the pairs of
`pairs.py` with the distances of `pixel_features.py`. On disk it is its weights and a record of its autoencoder, its
training and its held-out figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.common.config import validate
from fewstep.common.errors import UserError
from fewstep.common.files import atomic_folder, read_mapping, sha256, write_json
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.distillation.latent_lpips.settings import NetworkConfig

NORM_EPS = 1e-6
"""Added to squared lengths: smooth where a vector is 0."""
LEAST = 1e-4
"""Least weight of a latent channel's own difference: different latents have a positive distance with a gradient."""
PACE = 20.0
"""Factor of the raw weights: they must move further than convolution weights at the same step size."""
LARGE = 1024
"""Elements of a latent beyond which the pairs' activations are recomputed in the backward pass."""


class PlaceNorm(nn.Module):
    """Normalisation over the channels at each position, independent of the latent's size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        centred = x - x.mean(1, keepdim=True)
        unit_variance = centred * (centred.square().mean(1, keepdim=True) + NORM_EPS).rsqrt()
        return unit_variance * self.weight[:, None, None] + self.bias[:, None, None]


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = PlaceNorm(channels), PlaceNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        result: Tensor = x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return result


class LatentLPIPS(nn.Module):
    """d(a, b) between latents, in LPIPS's form (arXiv 1801.03924, eq 1) over a network on latents.

    d(a, b) = sum over maps m of the mean over positions of sum over channels c of w_mc (u_mc(a) - u_mc(b))^2, with u
    the map's vectors at length 1, plus the latents' own term, the mean over positions of sum over their channels c of
    v_c q_c^2 log(1 + (a_c - b_c)^2 / q_c^2), which is v_c (a_c - b_c)^2 for small differences and grows slower for
    large ones, as distances of features do. All w, v and q are positive and learned. So d is symmetric, smooth, 0 where
    a = b with gradient 0, and positive everywhere else.

    Args:
        channels: channels of a latent.
    """

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.stem = nn.Conv2d(channels, config.widths[0], 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in zip(config.widths, config.widths[1:])
        )
        self.levels = nn.ModuleList(
            nn.ModuleList(Residual(width) for _ in range(count))
            for width, count in zip(config.widths, config.blocks, strict=True)
        )
        mapped = [width for width, count in zip(config.widths, config.blocks, strict=True) for _ in range(count)]
        self.raw_weights = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in (config.widths[0], *mapped))
        self.raw_own = nn.Parameter(torch.zeros(channels))
        self.raw_knee = nn.Parameter(torch.zeros(channels))  # a knee at 2 log 2 = 1.4, a latent's usual size

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the stem and of each block for latents [B, C, h, w], vectors scaled to length 1."""
        x = self.stem(x)
        maps = [x]
        for number, blocks in enumerate(self.levels):
            x = self.downs[number - 1](x) if number else x
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
                maps.append(x)
        return [y * (y.square().sum(1, keepdim=True) + NORM_EPS).rsqrt() for y in maps]

    @property
    def weights(self) -> list[Tensor]:
        """Positive weights w of each map's channels."""
        return [0.1 * F.softplus(PACE * raw) for raw in self.raw_weights]

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Positive v and q of the latents' own channels, [C] each."""
        return F.softplus(PACE * self.raw_own) / self.channels + LEAST, 2 * F.softplus(PACE * self.raw_knee) + LEAST

    def between(self, a: list[Tensor], b: list[Tensor], gap: Tensor) -> Tensor:
        """Return the distance of two latents from their `features` and their difference, [B]."""
        share, knee = (value[:, None, None] for value in self.own)
        total = (share * knee.square() * torch.log1p((gap / knee).square())).sum(1).flatten(1).mean(1)
        for weight, x, y in zip(self.weights, a, b, strict=True):
            total = total + ((x - y).square() * weight[:, None, None]).sum(1).flatten(1).mean(1)
        return total

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return d(a, b), [B]; latents [B, C, h, w] of any size from 4 x 4, in units of the pixel network's distance.

        Computed in fp32 or wider, also under autocast: near latents differ by less than bf16 resolves.
        """
        with torch.autocast(a.device.type, enabled=False):
            a, b = (x.to(torch.promote_types(x.dtype, self.raw_own.dtype)) for x in (a, b))
            return self.between(self.features(a), self.features(b), a - b)


@torch.no_grad()
def calibrate(network: LatentLPIPS, found: Tensor, wanted: Tensor) -> None:
    """Scale all weights in place by the one factor that makes the mean logarithm of found / wanted 0."""
    factor = ((wanted.log() - found.to(wanted).log()).mean().exp()).to(network.raw_own)
    for raw in (*network.raw_weights, network.raw_own):
        raw.copy_(torch.expm1(F.softplus(PACE * raw) * factor).log() / PACE)


def group_distances(network: LatentLPIPS, groups: Tensor, ends: Tensor) -> Tensor:
    """Return the distances of pairs of each group's members, [n, P]; each member's features are computed once.

    Pairs of large latents are computed one group at a time and recomputed in the backward pass.

    Args:
        groups: [n, m, C, h, w].
        ends: members of each pair, int64 [2, P].
    """
    n, m = groups.shape[:2]
    with torch.autocast(groups.device.type, enabled=False):
        flat = groups.flatten(0, 1).to(network.raw_own.dtype)
        maps = network.features(flat)

        def pairs_of(first: int, count: int) -> Tensor:
            start = ((first + torch.arange(count)) * m)[:, None]
            one, other = ((start + side).flatten().to(flat.device) for side in ends)
            return network.between([x[one] for x in maps], [x[other] for x in maps], flat[one] - flat[other])

        if flat[0, 0].numel() <= LARGE:
            return pairs_of(0, n).view(n, -1)
        rows = [checkpoint(pairs_of, group, 1, use_reentrant=False) for group in range(n)]
        return torch.stack([torch.as_tensor(row) for row in rows])


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
            f"latent_lpips.folder = {str(folder)!r} holds no {RECORD}; train one by `fewstep train-latent-lpips`"
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
            f"teacher's ({ours}); leave it out to train one for this teacher"
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
