"""Latents decoded in overlapping tiles, with gradient: one tile's activations are held at a time.

Diffusers' `enable_tiling` blends tiles, too, and keeps the activations of all of them for a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

OVERLAP = 4
"""Neighbouring tiles share at least this part of a tile's side: a quarter, as in diffusers."""


def tile_starts(points: int, tile: int) -> list[int]:
    """Return where tiles of `tile` points begin along a side of so many points, evenly spread; one covers a short side.

    Neighbours share at least tile // `OVERLAP` points, one at the least.
    """
    if points <= tile:
        return [0]
    step = tile - max(1, tile // OVERLAP)
    count = 1 + math.ceil((points - tile) / step)
    return [i * (points - tile) // (count - 1) for i in range(count)]


def tile_weights(points: int, tile: int, scale: int) -> list[Tensor]:
    """Return each tile's weights along a side, fp32 [tile * scale]: linear ramps at shared ends, 1 in sum everywhere.

    Args:
        scale: pixels a point.
    """
    starts, width = tile_starts(points, tile), min(tile, points) * scale
    ramp = max(1, tile // OVERLAP) * scale
    at = torch.arange(width) + 0.5
    raw = []
    for start in starts:
        left = at if start > 0 else torch.full_like(at, ramp)
        right = width - at if start + tile < points else torch.full_like(at, ramp)
        raw.append((torch.minimum(left, right) / ramp).clamp(max=1))
    total = torch.zeros(points * scale)
    for start, own in zip(starts, raw, strict=True):
        total[start * scale : start * scale + width] += own
    return [own / total[start * scale : start * scale + width] for start, own in zip(starts, raw, strict=True)]


def decode_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, scale: int) -> Tensor:
    """Decode latents [N, C, h, w] tile by tile to pictures [N, 3, h * scale, w * scale], blended where tiles overlap.

    Each tile is decoded again in the backward pass. A decoder whose norms or attention see the whole picture gives each
    tile other statistics: the picture differs a little from the one that is decoded at once.

    Args:
        decode: latents to pictures, of any size.
        tile: points a side of a tile.
        scale: pixels a point.
    """
    height, width = latents.shape[-2:]
    rows, columns = (
        list(zip(tile_starts(n, tile), tile_weights(n, tile, scale), strict=True)) for n in (height, width)
    )
    if len(rows) * len(columns) == 1:
        return decode(latents)
    pictures = latents.new_zeros(len(latents), 3, height * scale, width * scale)
    for top, of_rows in rows:
        for left, of_columns in columns:
            part = latents[..., top : top + tile, left : left + tile]
            with set_checkpoint_early_stop(False):  # by an exception, which a backbone's `decode` would name
                own = checkpoint(decode, part, use_reentrant=False, preserve_rng_state=False)
            share = (of_rows[:, None] * of_columns).to(own)
            down, across = (slice(start * scale, (start + tile) * scale) for start in (top, left))
            pictures[..., down, across] += share * own
    return pictures
