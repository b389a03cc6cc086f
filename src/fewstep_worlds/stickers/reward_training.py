"""Training and measuring of the preference scorer.

A picture's true prompt competes with prompts of which one fact is wrong, and with prompts of other scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from fewstep.common.cpu_kernels import speed_up
from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import to_tensor
from fewstep_worlds.common.training import ENDLESS, Weights, fit
from fewstep_worlds.stickers.accuracy import Share
from fewstep_worlds.stickers.claim import check, facts_of
from fewstep_worlds.stickers.dataset import REFERENCE_SEED, REWARD_SEED, SceneWorkers, fingerprint
from fewstep_worlds.stickers.draw import Picture
from fewstep_worlds.stickers.grammar import phrases
from fewstep_worlds.stickers.heldout import KINDS
from fewstep_worlds.stickers.reader import damage
from fewstep_worlds.stickers.reader_report import BLUR, NOISE
from fewstep_worlds.stickers.reward import StickerScorer
from fewstep_worlds.stickers.reward_network import RewardNetwork, word_numbers, words_of
from fewstep_worlds.stickers.settings import RewardConfig
from fewstep_worlds.stickers.sprites import sprite_folder
from fewstep_worlds.stickers.wrong_claims import Choice, draw_choices

VALIDATION_SCENES = 500
"""Unseen scenes of a validation."""


def vocabulary() -> tuple[str, ...]:
    """Return every word of English sentences."""
    return tuple(sorted({word for phrase in phrases() for word in words_of(phrase)} | {","}))


def rivals(choices: Sequence[Choice], others: int) -> tuple[Tensor, Tensor]:
    """Return the prompts that each picture is compared with, and which of them are true of it as well.

    Args:
        others: true prompts of the next scenes of the batch to add.

    Returns:
        numbers of prompts in the concatenation of all choices, int64 [B, N], the true one first, and bool [B, N].
    """
    own, count = len(choices[0].prompts), len(choices)
    columns = [[own * row + number for number in range(own)] for row in range(count)]
    true = [[True] + [False] * (own - 1) for _ in range(count)]
    for row, choice in enumerate(choices):
        facts = facts_of(choice.scene)
        for other in range(row + 1, row + 1 + others):
            columns[row].append(own * (other % count))
            true[row].append(all(check(choices[other % count].claim, facts).values()))
    return torch.tensor(columns), torch.tensor(true)


def choice_loss(logits: Tensor, true: Tensor) -> Loss:
    """Return the cross-entropy of choosing the first prompt among the false ones, and the mean error of each alone.

    Args:
        logits: that each prompt is true, [B, N].
        true: which ones are, bool [B, N]; the first of each row. Others that are true do not compete.
    """
    first = torch.zeros_like(true)
    first[:, 0] = True
    choice = F.cross_entropy(
        logits.masked_fill(true & ~first, -torch.inf), torch.zeros_like(true[:, 0], dtype=torch.long)
    )
    alone = F.binary_cross_entropy_with_logits(logits, true.float(), reduction="none")
    alone_mean = 0.5 * (alone[true].mean() + alone[~true].mean())
    right = (logits[:, :1] > logits).float()[~true].mean()
    return Loss(choice + alone_mean, scalars={"choice": choice, "alone": alone_mean, "right": right})


def train_reward(
    config: RewardConfig, out: Path, accelerator: Accelerator, folder: Path | None = None
) -> RewardNetwork:
    """Train the network in the run folder `out`, resuming what is there; return it.

    Raises:
        UserError: the sprite sheets cannot be read, or `out` holds another run.
    """
    torch.manual_seed(config.loop.seed)
    words, device = vocabulary(), accelerator.device
    numbers = {word: number for number, word in enumerate(words, 1)}
    network = RewardNetwork(config, len(words))
    speed_up(network)
    network.to(device)

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        parts = workers.run(draw_choices, items)
        pictures = to_tensor(np.concatenate([drawn for drawn, _ in parts]))
        choices = [choice for _, part in parts for choice in part]
        damaged = rng.chance("damaged", config.damaged).float()
        blur, noise = (damaged * rng.uniform(name, 0, getattr(config, name)).float() for name in ("blur", "noise"))
        pictures = damage(pictures, blur, noise, rng.normal("noise of pictures", tuple(pictures.shape[1:])).cpu())
        rows = word_numbers([prompt for choice in choices for prompt in choice.prompts], numbers)
        columns, true = rivals(choices, min(config.others, len(choices) - 1))
        rows = rows[:, : int((rows > 0).sum(1).max())]
        batch = {"pictures": pictures, "words": rows, "columns": columns, "true": true}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def loss(batch: Batch, _: KeyedRng) -> Loss:
        cells = network.pictures(batch["pictures"].contiguous(memory_format=torch.channels_last))
        prompts = network.text(batch["words"])
        compared = {name: rows[batch["columns"]] for name, rows in prompts.items()}
        return choice_loss(network.compare(cells, compared), batch["true"])

    def evaluate(weights: Weights) -> dict[str, float]:
        averaged = RewardNetwork(config, len(words))
        averaged.load_state_dict({name: value.cpu() for name, value in weights["reward"].items()})
        scorer = StickerScorer(averaged.eval(), words, "")
        return {name: share.value for name, share in choice_accuracy(scorer, VALIDATION_SCENES, folder=folder).items()}

    plan = [Update("reward", dict(network.named_parameters()), loss, config.optim)]
    inputs = {"scenes": fingerprint(folder)}
    with SceneWorkers(config.workers, REWARD_SEED, folder) as workers:
        weights = fit("reward", plan, fetch, ENDLESS, out, config, config.loop, accelerator, inputs, evaluate)
    network.load_state_dict(weights["reward"])
    return network.cpu().eval()


@torch.no_grad()
def choice_logits(scorer: StickerScorer, pictures: Tensor, choices: Sequence[Choice], batch: int = 100) -> np.ndarray:
    """Return the logit of each picture [B, 3, 64, 64] with each prompt of its choice, [B, N]."""
    parts = []
    for start in range(0, len(pictures), batch):
        own = choices[start : start + batch]
        prepared = scorer.prepare([prompt for choice in own for prompt in choice.prompts])
        prompts = {name: rows.view(len(own), -1, *rows.shape[1:]) for name, rows in prepared.items()}
        cells = scorer.network.pictures(pictures[start : start + batch])
        parts.append(scorer.network.compare(cells, prompts))
    found: np.ndarray = torch.cat(parts).numpy()
    return found


def choice_accuracy(
    scorer: StickerScorer,
    n: int,
    split: str = "train",
    folder: Path | None = None,
    blur: float = 0.0,
    noise: float = 0.0,
) -> dict[str, Share]:
    """Return how often the true prompt of an unseen scene has a larger logit than a wrong one: `all`, and by fact.

    `first` is how often it is higher than all of the scene's wrong prompts.

    Args:
        n: scenes of the split.
        blur: standard deviation of a blur of the pictures, in pixels.
        noise: standard deviation of noise in them, pictures being in [-1, 1].
    """
    drawn, choices = draw_choices(REFERENCE_SEED, np.arange(n), folder or sprite_folder(), split)
    logits = choice_logits(scorer, damaged(drawn, blur, noise), choices)
    right = np.greater(logits[:, :1], logits[:, 1:])
    facts = np.array([choice.wrong for choice in choices])
    result = {"all": _share(right.ravel()), "first": _share(right.all(1))}
    return result | {f"fact {fact}": _share(right[facts == fact]) for fact in dict.fromkeys(facts.ravel().tolist())}


def damaged(pictures: Picture, blur: float, noise: float) -> Tensor:
    """Return uint8 pictures as float32 [N, 3, 64, 64] in [-1, 1], blurred and noised."""
    normal = generator(REFERENCE_SEED, "stickers noise").standard_normal((len(pictures), 3, *pictures.shape[1:3]))
    spread, strength = (torch.full((len(pictures),), level) for level in (blur, noise))
    return damage(to_tensor(pictures), spread, strength, torch.from_numpy(normal).float())


def _share(right: np.ndarray) -> Share:
    return Share(int(right.sum()), right.size)


def reward_report(scorer: StickerScorer, n: int, folder: Path | None = None) -> dict[str, dict[str, Share]]:
    """Return the accuracy under each condition on `n` unseen scenes: real, of held-out kinds, blurred, noised."""
    shown = {"real": choice_accuracy(scorer, n, folder=folder)}
    shown |= {f"real, held out: {kind}": choice_accuracy(scorer, n, kind, folder) for kind in KINDS}
    shown["blurred"] = choice_accuracy(scorer, n, folder=folder, blur=BLUR)
    shown["noised"] = choice_accuracy(scorer, n, folder=folder, noise=NOISE)
    return shown
