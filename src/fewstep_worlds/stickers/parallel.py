"""Text pairs of sticker scenes: sentences in Chinese and English with one English sentence of the same claim.

The English sentence has the usual words, so that a claim has one target: the mean of the states of several sentences
is the states of none. Where the Chinese of a claim is held out, which is so for two claims of five, the source is an
English sentence. Its words let an adapter map Chinese words that it has never seen, as far as the sentence encoder has
aligned the two languages.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.inference.multilingual.pairs import Pair
from fewstep_worlds.stickers.dataset import TRAINING_SEED
from fewstep_worlds.stickers.grammar import write
from fewstep_worlds.stickers.prompts import training_prompt, unseen_prompts
from fewstep_worlds.stickers.scene import make_scene

TEST_SEED = 120
"""Seed of the sentences that are measured."""
SETS = {
    "unseen scenes": "open",
    "held-out combinations": "chinese_colour",
    "held-out nouns": "chinese_concept",
}
"""Name of a set of test pairs -> set of prompts."""


@dataclass(frozen=True)
class ScenePairs:
    """Pairs about the first training scenes, as a function of (seed, index)."""

    seed: int = TRAINING_SEED
    count: int = 2**20

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        """Return pair `index`, below `count`."""
        scene = make_scene(self.seed, index)
        source = training_prompt(scene, self.seed, index, "chinese") or training_prompt(scene, self.seed, index)
        assert source is not None  # English prompts are never left out
        return Pair(source.text, write(source.claim, "english", None))


def held_out_pairs(count: int) -> dict[str, list[Pair]]:
    """Return `count` pairs of each of `SETS`."""
    sets = {name: unseen_prompts(of, count, TEST_SEED, "chinese") for name, of in SETS.items()}
    return {
        name: [Pair(prompt.text, write(prompt.claim, "english", None)) for prompt in prompts]
        for name, prompts in sets.items()
    }
