"""A teacher with the text encoder of real Stable Diffusion folders: CLIP, its keys under `text_model.`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fewstep as api
from fewstep.backbones.base import load_backbone

PROMPTS = ["a red disc", "", "a blue blue square beside a green ring and much that is cut off"]


@pytest.fixture(scope="module")
def clip_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a random CLIP encoder and a byte-pair tokenizer of single letters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("clip") / "tiny"
    shutil.copytree(tiny_pipeline, folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    weights = folder / "text_encoder" / "model.safetensors"
    named = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})  # as the published folders have them
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_states_and_pictures_are_those_of_plain_diffusers(clip_pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(clip_pipeline, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    states = load_backbone(clip_pipeline).encode(PROMPTS)["text"]
    for prompt, state in zip(PROMPTS, states, strict=True):
        theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(state, theirs[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(states[0], states[1]), "the prompt is read"

    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    drawn = pipe(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    )
    ours = api.sample(
        PROMPTS[0],
        out=tmp_path / "a.png",
        teacher=clip_pipeline,
        seed=5,
        scale=1,
        device="cpu",
        settings={"steps": 4, "omega": 2.0, "spacing": "trailing", "sampler": "ddim", "end": "clean"},
    )
    picture = np.asarray(Image.open(ours).convert("RGB"), dtype=np.float64)
    np.testing.assert_allclose(picture, drawn.images[0] * 255, atol=1.01)
    assert picture.std() > 1
