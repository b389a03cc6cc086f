"""Weights under their original names: diffusers reads them back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.backbones.single_file.sd_checkpoint import checkpoint_weights
from support import tiny_pipelines


@pytest.mark.parametrize(
    ("name", "act", "prediction"), [("sd", "quick_gelu", "eps"), ("sd", "gelu", "v"), ("sdxl", "quick_gelu", "eps")]
)
def test_a_single_file_is_read_back_equal(name: str, act: str, prediction: str, tmp_path: Path) -> None:
    """Stable Diffusion 1.x with OpenAI's encoder, 2.x with OpenCLIP's, XL with both."""
    import diffusers

    folder = tiny_pipelines.FAMILIES[name](tmp_path / "tiny")
    kind: Any = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[name]
    pipe = kind.from_pretrained(folder, local_files_only=True)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if name == "sdxl" else [])]
    encoders[0].config.hidden_act = act
    weights = checkpoint_weights(
        pipe.unet.state_dict(), pipe.vae.state_dict(), encoders, prediction=prediction, zero_snr=False
    )
    assert ("v_pred" in weights) == (prediction == "v")
    file = tmp_path / "whole.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    back = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is None:
            continue
        own, found = getattr(pipe, part).state_dict(), getattr(back, part).state_dict()
        assert own.keys() == found.keys()
        for key, value in own.items():
            assert torch.equal(found[key], value), (part, key)
