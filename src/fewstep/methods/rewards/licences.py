"""Published facts of each scorer: paper, licence, terms, and what its number means."""

from __future__ import annotations

from fewstep.methods.rewards.reward import ScorerIdentity

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
