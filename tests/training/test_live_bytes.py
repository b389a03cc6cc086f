"""The memory of a step, counted: exact values, and what recomputing blocks does to it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.backbones.recompute import recompute_blocks
from fewstep.distillation import frozen_networks as reward
from fewstep.distillation.estimate import gradients_dropped
from fewstep.training.live_bytes import LiveBytes

FLOAT = 4


def test_tensors_are_counted_from_creation_to_release() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as held:
        first = outside + 1
        assert held.bytes == 1000 * FLOAT
        view = first[:10].reshape(2, 5)
        first.mul_(2)
        assert held.bytes == 1000 * FLOAT, "views and in-place results share a storage"
        second = torch.cat([first, first])
        del first, view
        assert (held.bytes, held.peak) == (2000 * FLOAT, 3000 * FLOAT)
        del second
        assert held.bytes == 0


def test_what_is_computed_again_is_counted() -> None:
    x, peaks = torch.ones(256, requires_grad=True), []
    for block in (lambda x: x.exp().exp().exp().exp(), lambda x: x.exp()):
        with LiveBytes() as held:
            value = checkpoint(block, x, use_reentrant=False).sum()
            assert held.bytes < 2 * 256 * FLOAT
            value.backward()
        x.grad = None
        peaks.append(held.peak)
    assert peaks[0] >= peaks[1] + 2 * 256 * FLOAT


@torch.no_grad()
def without_attention(vae: Any) -> Any:
    """Attention takes its own memory on each device, little where it is fused."""
    for block in vae.decoder.mid_block.attentions:
        block.forward = lambda x, *_, **__: x
    return vae


def peak_of(vae: Any, side: int, device: str = "meta") -> int:
    """Bytes that decoding one latent with gradient holds at most."""
    z = torch.zeros(1, 4, side, side, device=device, requires_grad=True)
    with LiveBytes() as held:
        vae.decode(z, return_dict=False)[0].sum().backward()
    return held.peak


def test_memory_on_the_meta_device_is_that_of_numbers_and_follows_the_pixels() -> None:
    peaks = []
    for device, side in (("cpu", 32), ("meta", 32), ("meta", 64)):
        vae = without_attention(decoder_of("kl").to(device))
        recompute_blocks(vae.decoder)
        peaks.append(peak_of(vae, side, device))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
    assert peaks[2] == pytest.approx(4 * peaks[1], rel=0.02)


def test_a_picture_of_1024_pixels_is_decoded_with_gradient_in_a_third() -> None:
    """SDXL's decoder in fp32: 22.7 GiB where its activations are kept, 7.3 where its blocks are computed again."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae: Any = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
    without_attention(vae.eval().requires_grad_(False))
    plain = peak_of(vae, 128)
    recompute_blocks(vae.decoder)
    assert plain == pytest.approx(22.6 * 2**30, rel=0.02)
    assert peak_of(vae, 128) == pytest.approx(7.25 * 2**30, rel=0.02)


def test_gradients_are_dropped_when_they_are_complete() -> None:
    network = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(10)))
    x, peaks = torch.ones(1, 100), []
    for dropped in (False, True):
        with LiveBytes() as held, gradients_dropped(network.parameters() if dropped else ()):
            network(x).sum().backward(inputs=list(network.parameters()))
        peaks.append(held.peak)
        assert (network[0].weight.grad is None) == dropped
        network.zero_grad()
    assert peaks[0] - peaks[1] == pytest.approx(8 * 100 * 100 * FLOAT, rel=0.15)
    assert peaks[1] < 3 * 100 * 100 * FLOAT


def decoders() -> dict[str, Callable[[], Any]]:
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    return {
        "kl": lambda: AutoencoderKL(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        "tiny": lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(6, 6),
        ),
        "dc": lambda: AutoencoderDC(
            latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(6, 6), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        ),
    }  # fmt: skip


def decoder_of(name: str) -> Any:
    torch.manual_seed(5)
    return decoders()[name]().eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["kl", "tiny", "dc"])
def test_a_decoder_that_recomputes_its_blocks_gives_the_same_bits_in_less_memory(name: str) -> None:
    found, peaks = [], []
    for again in (False, True):
        vae = decoder_of(name)
        z = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if again:
            recompute_blocks(vae.decoder)
            recompute_blocks(vae.decoder)  # no second time
        with LiveBytes() as held:
            picture = vae.decode(z, return_dict=False)[0]
            (picture * picture.cos()).sum().backward()
        found.append((picture.detach(), z.grad))
        peaks.append(held.peak)
        with torch.no_grad():
            assert torch.equal(vae.decode(z, return_dict=False)[0], picture.detach())
    for plain, folded in zip(*found, strict=True):
        assert torch.equal(plain, folded)
    assert peaks[1] < 0.62 * peaks[0], peaks


class Seen:
    """A scorer of pictures at 8 x 8, which counts how many it is shown at once."""

    framing = SimpleNamespace(size=8)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"n": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def score(self, pictures: Tensor, prepared: Any) -> Tensor:
        self.batches.append(len(pictures))
        small = nn.functional.adaptive_avg_pool2d(pictures, 8)
        return (small * small.sin()).mean((1, 2, 3)) * prepared["n"][:, 0]


@pytest.mark.parametrize(("most", "batches"), [(2**20, [5, 5]), (2 * 48 * 48, [2, 2] * 2 + [1, 1]), (100, [1, 1] * 5)])
def test_scores_in_parts_are_the_scores_of_the_batch(
    most: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values bit for bit, gradients too: parts share nothing. The last case computes the decoder's blocks again."""
    monkeypatch.setattr(reward, "MOST_PIXELS", most)
    vae, scorer = decoder_of("kl"), Seen()
    backbone: Any = SimpleNamespace(
        decode=lambda z: vae.decode(z, return_dict=False)[0], vae=vae, folder=SimpleNamespace(scale=4)
    )
    scored, _ = reward.make_reward(backbone, scorer, ["a", "bb", "cccc"])  # type: ignore[arg-type]
    which = (torch.tensor([0, 2, 1, 0, 1]), torch.tensor([1, 1, 2, 2, 0]))
    z = torch.randn(5, 4, 12, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
    right, wrong = scored(z, which)
    assert scorer.batches == batches
    (right - wrong.square()).sum().backward()
    exclusive = decoder_of("kl")
    x = z.detach().clone().requires_grad_()
    small = nn.functional.adaptive_avg_pool2d(exclusive.decode(x, return_dict=False)[0], 8)
    likes = (small * small.sin()).mean((1, 2, 3))
    lengths = torch.tensor([1.0, 2.0, 4.0])
    wanted = likes * lengths[which[0]], likes * lengths[which[1]]
    (wanted[0] - wanted[1].square()).sum().backward()
    for one, other in zip((right, wrong, z.grad), (*wanted, x.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_small_batch_is_scored_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2**17 pixels nothing is recomputed: 32 pictures of 64 x 64. A larger input of the scorer counts instead."""
    backbone: Any = SimpleNamespace(folder=SimpleNamespace(scale=8))
    scorer: Any = Seen()
    assert reward.pixels_of(backbone, scorer, torch.empty(1, 4, 8, 8, device="meta")) == 64**2
    assert reward.MOST_PIXELS // 64**2 == 32
    scorer.framing = SimpleNamespace(size=224)
    assert reward.pixels_of(backbone, scorer, torch.empty(1, 4, 8, 8, device="meta")) == 224**2
