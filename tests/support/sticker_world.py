"""World folders of sticker scenes with tiny random networks."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep_worlds.common import location
from fewstep_worlds.stickers.reader import Reader, save_reader
from fewstep_worlds.stickers.reward import save_reward
from fewstep_worlds.stickers.reward_network import RewardNetwork
from fewstep_worlds.stickers.reward_training import vocabulary
from fewstep_worlds.stickers.settings import ReaderConfig, RewardConfig

TINY_READER = ReaderConfig(channels=(8, 8, 8), blocks=(1, 1, 1))
TINY_REWARD = RewardConfig(channels=(8, 8, 8), blocks=(1, 1), width=16, layers=(1, 1))
PROMPTS = 40
"""Prompts of a list of a small world, and its training scenes."""
SETTINGS = """
method: {guidance: {low: 1.0, high: 3.0}}
student: {rank: 2, targets: [to_q, conv1]}
data: {captions: 1}
"""
"""Settings of its students."""


def tiny_reader(seed: int = 0) -> Reader:
    """A reader with random weights."""
    torch.manual_seed(seed)
    return Reader(TINY_READER).eval()


def make_world(place: Path, sheets: Path, teacher: Path) -> Path:
    """A world folder of given sheets and teacher, with a tiny random reader and preference scorer."""
    place.mkdir()
    (place / location.STICKERS).symlink_to(sheets)
    (place / "teacher").symlink_to(teacher)
    (place / "distill.yaml").write_text(SETTINGS, encoding="utf-8")
    save_reader(tiny_reader(), place / "reader")
    words = vocabulary()
    save_reward(RewardNetwork(TINY_REWARD, len(words)), words, place / "reward")
    return place
