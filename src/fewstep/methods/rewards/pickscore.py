"""PickScore: CLIP-H, fine-tuned on people's choices between two pictures of their own prompt."""

from __future__ import annotations

import torch

from fewstep.methods.rewards.clip import CosineScorer, load_clip_folder
from fewstep.methods.rewards.registry import ScorerFiles
from fewstep.methods.rewards.reward import PICKSCORE


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """Load s = T * cos(E_picture, E_text), T = exp(logit scale) of the checkpoint (Kirstain et al. 2023)."""
    return load_clip_folder(files, device, dtype, PICKSCORE, scale=None)
