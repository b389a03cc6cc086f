"""Channels and scale of an autoencoder's latents as a network takes them, by its config. Light: read before torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def channels_of(vae: Mapping[str, Any]) -> int:
    """Return the channels of a latent: those of the autoencoder times the points of its patches, if it has any."""
    points: int = math.prod(vae.get("patch_size") or [1])
    return int(vae["z_dim"] if "z_dim" in vae else vae["latent_channels"]) * points


def scale_of(vae: Mapping[str, Any]) -> int | None:
    """Return pixels a side of one latent point; None where the config lacks them.

    Each level but the last halves, or each of `temperal_downsample` where an autoencoder of video has that key.
    """
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    halvings = vae.get("temperal_downsample") or (levels[1:] if isinstance(levels, list) and levels else None)
    return None if halvings is None else (1 << len(halvings)) * (vae.get("patch_size") or [1])[0]
