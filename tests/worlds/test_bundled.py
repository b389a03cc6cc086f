"""The bundled teacher draws its prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.common.files import read_json
from fewstep.common.tensors import load_tensors
from fewstep.diffusion.config import TEACHER_SAMPLING
from fewstep.distillation.frozen_networks import load_named_scorer
from fewstep.inference.generator import load_image_generator
from fewstep_worlds.common import location
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.metrics import agreement
from fewstep_worlds.studies.students import students_omega

PROMPTS = 48


@pytest.mark.slow
def test_the_teacher_draws_its_prompts() -> None:
    """A caption fits its own picture better than the next caption does, by far."""
    records = emoji8.load_records("train")
    captions = [emoji8.name_with_style(records[i]) for i in range(0, len(records), len(records) // PROMPTS)][:PROMPTS]
    image_generator = load_image_generator(location.root() / "teacher")
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": 20, "omega": students_omega()})
    pictures = image_generator.draw(captions, range(PROMPTS), sampling)
    fits, strangers = (agreement().features(pictures, prompts) for prompts in (captions, captions[1:] + captions[:1]))
    gains = fits - strangers
    assert gains.mean() > 8 * gains.std(ddof=1) / np.sqrt(PROMPTS)
    assert np.median(pictures[:, 0, 0]) > 250, "emoji are on white"


def test_what_rewards_is_not_what_evaluates() -> None:
    """The two scorers of the bundled world share no weights, no network and no reader of prompts."""
    reward, evaluates = (read_json(location.root() / name / "scorer.json") for name in ("reward", "scorer"))
    assert reward["network"]["channels"] != evaluates["network"]["channels"]
    assert reward["text"]["sha256"] != evaluates["text"]["sha256"]
    assert reward["training"]["loop"]["seed"] != evaluates["training"]["loop"]["seed"]
    own, other = (load_tensors(location.root() / name / "scorer.safetensors") for name in ("reward", "scorer"))
    same = [name for name in own.keys() & other.keys() if own[name].shape == other[name].shape]
    same = [name for name in same if own[name].dim() > 1]  # fresh biases and norms may well be alike
    assert not any(torch.equal(own[name], other[name]) for name in same)


def test_the_reward_distinguishes_prompts() -> None:
    """`method.reward.scorer = world`, as in training: scores, and a gradient to the picture."""
    scorer = load_named_scorer("world", torch.device("cpu"))
    data = emoji8.load("heldout-pair")
    rows = list(range(0, len(data), len(data) // PROMPTS))[:PROMPTS]
    pictures = torch.from_numpy(data.pictures[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
    texts = scorer.prepare([emoji8.name(data.records[row]) for row in rows])
    pictures.requires_grad_()
    right = scorer.score(pictures, texts)
    wrong = scorer.score(pictures, {name: value.roll(1, 0) for name, value in texts.items()})
    assert float((right > wrong).float().mean()) > 0.9
    (slope,) = torch.autograd.grad(right.sum(), pictures)
    better = scorer.score((pictures + 0.5 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]).detach(), texts)
    assert float((better - right).detach().min()) > 0
