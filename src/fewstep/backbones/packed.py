"""The base of families whose network takes latents packed two by two."""

from __future__ import annotations

from torch import Tensor

from fewstep.backbones.transformer import TransformerBackbone


class PackedTransformer(TransformerBackbone):
    """A pipeline that steps on packed latents [B, h w, 4 C]."""

    def arranged(self, noise: Tensor) -> Tensor:
        """Unpack noise: its pipeline draws noise, and steps, on packed latents."""
        b, c, height, width = noise.shape
        return unpack(noise.reshape(b, height // 2 * (width // 2), 4 * c), height // 2, width // 2)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Unpack latents."""
        pixels = 2 * self.folder.scale
        return unpack(latents, height // pixels, width // pixels)


def pack(x: Tensor) -> Tensor:
    """Pack [B, C, 2h, 2w] into tokens [B, h w, 4 C], one for each square of four points."""
    b, c, height, width = x.shape
    squares = x.reshape(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(b, (height // 2) * (width // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert `pack`, for h x w tokens."""
    b, _, c = tokens.shape
    squares = tokens.reshape(b, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(b, c // 4, 2 * height, 2 * width)
