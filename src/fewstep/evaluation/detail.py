"""Fine structure of pictures, by edge density and by lossless WebP size.

These replace the image complexity of the TCD paper (arXiv 2402.19159), whose network is not available here. Noise
raises both: compare them with the figures of real, blurred and noised pictures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from fewstep.common.random_streams import generator
from fewstep.evaluation.metric import Array, Figure, Identity, Pictures, check_pictures
from fewstep.evaluation.per_picture import PerPictureMetric

LUMA = np.array([0.299, 0.587, 0.114])
BLURS = (0.5, 1.0)
NOISES = (5.0, 10.0)


def edge_density(pictures: Pictures) -> Array:
    """Return the mean length of the luma gradient in 8-bit levels per pixel, float64 [N].

    Sobel's kernels divided by 8, so that a ramp of one level per pixel gives 1; inner pixels only.
    """
    check_pictures(pictures)
    luma = pictures @ LUMA
    smooth_y = luma[:, :-2] + 2 * luma[:, 1:-1] + luma[:, 2:]
    smooth_x = luma[:, :, :-2] + 2 * luma[:, :, 1:-1] + luma[:, :, 2:]
    across = (smooth_y[:, :, 2:] - smooth_y[:, :, :-2]) / 8
    down = (smooth_x[:, 2:] - smooth_x[:, :-2]) / 8
    density: Array = np.hypot(across, down).mean((1, 2))
    return density


def webp_bytes(pictures: Pictures) -> Array:
    """Return the size of each picture as lossless WebP, in bytes, float64 [N]."""
    check_pictures(pictures)
    sizes = []
    for picture in pictures:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "WEBP", lossless=True, quality=50, method=3)
        sizes.append(float(len(stream.getvalue())))
    return np.array(sizes)


class EdgeDensity(PerPictureMetric):
    """Mean of `edge_density`."""

    identity = Identity(
        name="detail: edges",
        group="detail",
        measures="mean length of the luma gradient",
        better="neither",
        unit="levels/pixel",
        reduction="mean over pictures of the mean Sobel gradient (kernels / 8) over inner pixels",
    )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's edge density, [N]."""
        return edge_density(pictures)


class WebpBytes(PerPictureMetric):
    """Mean of `webp_bytes`."""

    identity = Identity(
        name="detail: WebP",
        group="detail",
        measures="size as lossless WebP",
        better="neither",
        unit="bytes",
        reduction="mean over pictures of the lossless WebP size (Pillow, quality 50, method 3)",
    )

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's size in bytes, [N]."""
        return webp_bytes(pictures)


def blurred(pictures: Pictures, radius: float) -> Pictures:
    """Return the pictures after Pillow's Gaussian blur."""
    soft = [Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in soft])


def noised(pictures: Pictures, sigma: float, seed: int) -> Pictures:
    """Return pictures with Gaussian noise of `sigma` 8-bit levels added, rounded and clipped."""
    noise = generator(seed, "noised").standard_normal(pictures.shape, dtype=np.float32)
    wide: Pictures = np.clip(np.rint(pictures + sigma * noise), 0, 255).astype(np.uint8)
    return wide


def detail_scale(real: Pictures, seed: int = 0) -> dict[str, dict[str, Figure]]:
    """Return both figures of detail for real pictures and for blurred and noised copies of them."""
    copies = {"real": real}
    copies.update({f"blurred, radius {radius:g}": blurred(real, radius) for radius in BLURS})
    copies.update({f"noised, sigma {sigma:g}": noised(real, sigma, seed) for sigma in NOISES})
    metrics = (EdgeDensity(), WebpBytes())
    return {
        name: {m.identity.name: m.reduce(m.features(pictures, ()), None, seed) for m in metrics}
        for name, pictures in copies.items()
    }
