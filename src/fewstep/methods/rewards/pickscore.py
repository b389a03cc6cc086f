"""PickScore: CLIP-H, fine-tuned on choices that people made between two pictures of their own prompt."""

from __future__ import annotations

import torch

from fewstep.methods.rewards.clip import CosineScorer, load_published
from fewstep.methods.rewards.folder_layout import ScorerFiles
from fewstep.methods.rewards.licences import PICKSCORE


def load(files: ScorerFiles, device: torch.device, dtype: torch.dtype) -> CosineScorer:
    """s = T * cos(E_picture, E_text), T = exp(logit scale) of the checkpoint (Kirstain et al. 2023)."""
    return load_published(files, device, dtype, PICKSCORE, scale=None)
