"""Pictures decoded in tiles: exact for a local decoder, near for one with norms over the picture, in bounded memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import load_backbone
from fewstep.backbones.tiles import decode_tiles, tile_starts, tile_weights
from fewstep.distillation.frozen_networks import make_reward
from fewstep.training.live_bytes import LiveBytes
from support import tiny_pipelines


@pytest.mark.parametrize(
    ("points", "tile", "starts"),
    [(8, 8, [0]), (5, 8, [0]), (9, 8, [0, 1]), (14, 8, [0, 6]), (15, 8, [0, 3, 7]), (128, 64, [0, 32, 64])],
)
def test_tiles_cover_a_side_and_share_a_quarter(points: int, tile: int, starts: list[int]) -> None:
    assert tile_starts(points, tile) == starts
    weights = tile_weights(points, tile, 3)
    total = torch.zeros(3 * points)
    for start, own in zip(starts, weights, strict=True):
        assert float(own.min()) > 0
        total[3 * start : 3 * start + len(own)] += own
    torch.testing.assert_close(total, torch.ones(3 * points))
    assert all(b - a <= tile - tile // 4 for a, b in pairwise(starts))


def local(latents: Tensor) -> Tensor:
    """A decoder whose pixels depend on their own point alone."""
    up = latents.sin().repeat_interleave(2, -2).repeat_interleave(2, -1)
    return torch.stack([up[:, 0] * up[:, 1], up[:, 1].exp(), up[:, 0] - up[:, 1]], 1)


@pytest.mark.parametrize("shape", [(20, 20), (9, 26), (6, 12)])
def test_a_local_decoder_gives_the_same_picture_and_gradient(shape: tuple[int, int]) -> None:
    z = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for pictures in (local(z), decode_tiles(local, z, 8, 2)):
        found.append((pictures, torch.autograd.grad((pictures * pictures.cos()).sum(), z)[0]))
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


class Mean:
    """A scorer of a picture's colours at 8 x 8."""

    def prepare(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"n": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def score(self, pictures: Tensor, prepared: Any) -> Tensor:
        small = nn.functional.adaptive_avg_pool2d(pictures, 8)
        return (small + small.square()).mean((1, 2, 3)) * prepared["n"][:, 0]


def test_a_reward_by_tiles_is_near_and_holds_one_tile(tmp_path: Path) -> None:
    """Without norms and attention, which see other points in a tile, tiles differ at their padded borders alone."""
    backbone = load_backbone(tiny_pipelines.sd(tmp_path / "sd"))
    vae = backbone.vae
    for part in list(vae.decoder.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.GroupNorm) or type(child).__name__ == "Attention":
                setattr(part, name, nn.Identity())
    vae.decoder.mid_block.attentions[0].forward = lambda x, **_: x
    found, peaks = [], []
    for tile in (None, 128):
        reward, _ = make_reward(backbone, Mean(), ["a", "bb"], tile)  # type: ignore[arg-type]
        z = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with LiveBytes() as held:
            (score,) = reward(z, [torch.tensor([1])])
            score.sum().backward()
        assert z.grad is not None
        found.append((score.detach(), z.grad))
        peaks.append(held.peak)
    (score, whole), (near, tiled) = found
    assert 0 < float((whole - tiled).norm() / whole.norm()) < 0.15
    assert float(near) == pytest.approx(float(score), rel=0.05)
    picture = 3 * 256 * 256 * 4
    assert peaks[1] < peaks[0] * (128 / 256) ** 2 + 5 * picture, peaks
