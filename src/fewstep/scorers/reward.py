"""The interface of a preference scorer, and the published facts of each: paper, licence, terms. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScorerIdentity:
    """Everything that decides a score besides picture and prompt, and on what terms it may be used.

    Attributes:
        name: the scorer's name in the registry.
        paper: its publication.
        licence: of code and weights, as published.
        commercial: what is known of commercial use, in words; no legal advice.
        measures: what the number is; higher is better for every scorer.
        span: the numbers that pictures usually get.
        backbone: the networks, with their sizes as loaded.
        weights_sha256: SHA-256 of the weights files.
        input: size, resizing and normalisation of the network's input.
    """

    name: str
    paper: str
    licence: str
    commercial: str
    measures: str
    span: str
    backbone: str = ""
    weights_sha256: str = ""
    input: str = ""


@runtime_checkable
class PreferenceScorer(Protocol):
    """A differentiable scorer of pictures with prompts; training uses these three members only."""

    @property
    def identity(self) -> ScorerIdentity:
        """The scorer and its terms of use."""
        ...

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode K prompts, [K, ...] each, on the CPU and without gradient.

        Called before training. Rows are independent: row i is the same beside any other prompts.
        """
        ...

    def score(self, pictures: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """Return one number per picture, float32 [B] (float64 from networks in float64), differentiable in `pictures`.

        Args:
            pictures: RGB [B, 3, H, W] in [-1, 1], any H and W; values outside are clamped.
            prepared: rows of `prepare`, one for each picture, on any device.

        Raises:
            ValueError: other shapes, or not one row per picture.
        """
        ...


CLIP = ScorerIdentity(
    name="clip",
    paper="Radford et al. 2021, arXiv:2103.00020; as a score of pictures: Hessel et al. 2021, arXiv:2104.08718",
    licence="OpenAI's and LAION's weights: MIT; other folders: see their card",
    commercial="MIT allows commercial use, but the cards of OpenAI and LAION call every deployed use out of scope",
    measures="100 x cosine of the picture's and the prompt's embeddings, as text-to-image papers report it (Hessel's "
    "CLIPScore would be 2.5 x the cosine, clipped at 0)",
    span="about 20 to 40",
)
PICKSCORE = ScorerIdentity(
    name="pickscore",
    paper="Kirstain et al. 2023, Pick-a-Pic, arXiv:2305.01569",
    licence="MIT (repository); the card of the weights names none; base weights CLIP-H of LAION: MIT",
    commercial="MIT allows commercial use; the weights carry no licence of their own, so contact their authors",
    measures="exp(logit scale) x cosine, with the checkpoint's own logit scale (about 100); its differences are "
    "log-odds of being preferred. Some report the hundredth",
    span="about 17 to 24; few-step students of SDXL get about 21.7 to 22.9 on average",
)
HPSV2 = ScorerIdentity(
    name="hpsv2",
    paper="Wu et al. 2023, HPS v2, arXiv:2306.09341",
    licence="Apache-2.0 (repository and package); base weights CLIP-H of LAION: MIT",
    commercial="Apache-2.0 allows commercial use; the terms of its preference data (HPD v2) were not examined",
    measures="100 x cosine, as the benchmark's tables report it (the package's own `score` gives the hundredth). "
    "Comparable for one prompt and one version only: not between v2.0 and v2.1",
    span="v2.0 about 23 to 29, v2.1 about 13 to 34",
)
IMAGE_REWARD = ScorerIdentity(
    name="image_reward",
    paper="Xu et al. 2023, ImageReward, arXiv:2304.05977",
    licence="Apache-2.0 (repository and package); base weights BLIP of Salesforce: BSD-3-Clause",
    commercial="Apache-2.0 and BSD-3-Clause allow commercial use",
    measures="the head's output, brought to about mean 0 and deviation 1 by two constants of the published code",
    span="about -2.3 to 2; few-step students of SDXL get about .3 to .8 on average",
)
MPS = ScorerIdentity(
    name="mps",
    paper="Zhang et al. 2024, MPS, CVPR 2024, pages 8018-8027 (arXiv:2405.14705)",
    licence="MIT (repository), which links the weights without terms of their own; base weights CLIP-H of LAION: MIT",
    commercial="unclear: MIT allows commercial use of the code, the weights carry no licence, so contact their authors",
    measures="exp(logit scale) x cosine of the prompt's embedding and of the picture's, after the picture's tokens "
    "attended to those words of the prompt that the condition is about; published for the overall impression alone",
    span="none is published; TLCM stops rewarding at 16",
)
