"""Background whiteness: is the border white where the real pictures' is?

A teacher whose latents leak a grey mean, or a student that adds a haze, shows here first. Background is a
pixel of the 2-pixel border ring that is white (all channels at least 250) in every real picture of the
prompt; where those leave none, one that is white in 95 % of all real pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fewstep.common.errors import UserError
from fewstep.evaluation.metric import Array, Identity, Pictures, check_pictures
from fewstep.evaluation.per_picture import PerPictureMetric

RING = 2
WHITE = 250
MOSTLY = 0.95

Mask = npt.NDArray[np.bool_]


def background(real: Pictures, share: float = MOSTLY) -> Mask:
    """Return which pixels of the border ring are white in at least `share` of the real pictures, bool [H, W].

    Raises:
        UserError: not a set of pictures.
    """
    mask: Mask = _white_ring(real).mean(0) >= share
    return mask


def background_by_prompt(real: Pictures, prompts_of_real: Sequence[Sequence[str]]) -> dict[str, Mask]:
    """Return for each prompt the ring pixels that are white in every real picture that answers it.

    Args:
        real: uint8 [N, H, W, 3].
        prompts_of_real: for each real picture, the prompts that it answers.
    """
    white = _white_ring(real)
    masks: dict[str, Mask] = {}
    for row, prompts in enumerate(prompts_of_real):
        for prompt in prompts:
            masks[prompt] = masks[prompt] & white[row] if prompt in masks else white[row]
    return masks


def _white_ring(real: Pictures) -> Mask:
    """Return the white pixels of the border ring of each picture, bool [N, H, W]."""
    check_pictures(real)
    ring = np.ones(real.shape[1:3], dtype=np.bool_)
    ring[RING:-RING, RING:-RING] = False
    white: Mask = (darkest(real) >= WHITE) & ring
    return white


def darkest(pictures: Pictures) -> npt.NDArray[np.uint8]:
    """Return each pixel's smallest channel, uint8 [..., H, W]; numpy's own minimum is slow over three numbers."""
    return np.minimum(np.minimum(pictures[..., 0], pictures[..., 1]), pictures[..., 2])


class Whiteness(PerPictureMetric):
    """A figure of each picture's background; what is measured there is its subclasses' affair.

    Args:
        everywhere: bool [H, W], the background of a prompt that `by_prompt` lacks or leaves without pixels.
        by_prompt: bool [H, W] each.

    Raises:
        UserError: `everywhere` is empty.
    """

    name: str
    measures: str
    unit: str

    def __init__(self, everywhere: Mask, by_prompt: Mapping[str, Mask] | None = None) -> None:
        if not everywhere.any():
            raise UserError("the real pictures have no white border; whiteness cannot be measured on them")
        self.everywhere = everywhere
        self.by_prompt = by_prompt or {}
        self.identity = Identity(
            name=self.name,
            group="quality",
            measures=self.measures,
            better="higher",
            unit=self.unit,
            reduction=(
                f"mean over pictures; background: {RING}-pixel border ring where the prompt's real pictures "
                f"are all white (every channel >= {WHITE}), else where {MOSTLY:.0%} of all real pictures are"
            ),
        )

    def of_background(self, pixels: Pictures) -> float:
        """Return the figure of one picture's background pixels, uint8 [P, 3]."""
        raise NotImplementedError

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        """Return each picture's figure, float64 [N].

        Raises:
            UserError: pictures of another size than the mask.
        """
        check_pictures(pictures)
        if pictures.shape[1:3] != self.everywhere.shape:
            raise UserError(f"pictures are {pictures.shape[1:3]} but the background is {self.everywhere.shape}")
        values = []
        for number, picture in enumerate(pictures):
            mask = self.by_prompt.get(prompts[number], self.everywhere) if len(prompts) else self.everywhere
            values.append(self.of_background(picture[mask if mask.any() else self.everywhere]))
        return np.array(values)


class WhiteShare(Whiteness):
    """Share of white pixels in the background."""

    name, measures, unit = "background: white", "share of white pixels in the background", "share"

    def of_background(self, pixels: Pictures) -> float:
        """Return the share of pixels whose every channel is white."""
        return float((pixels.min(-1) >= WHITE).mean())


class BackgroundLevel(Whiteness):
    """Mean level of the background."""

    name, measures, unit = "background: level", "mean background level", "levels (0 to 255)"

    def of_background(self, pixels: Pictures) -> float:
        """Return the mean over pixels and channels."""
        return float(pixels.mean())
