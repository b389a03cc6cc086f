"""PickScore: CLIP-H, fine-tuned on people's choices between two pictures of their own prompt."""

from __future__ import annotations

import torch

from fewstep.scorers.clip import CosineScorer, load_clip_folder
from fewstep.scorers.registry import ScorerFiles
from fewstep.scorers.reward import PICKSCORE


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """Load s = T * cos(E_picture, E_text), T = exp(logit scale) of the checkpoint (Kirstain et al. 2023)."""
    return load_clip_folder(files, device, dtype, PICKSCORE, scale=None)
