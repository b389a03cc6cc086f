"""Words of prompts beyond what the text encoders read: they have no effect on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fewstep.common import distributed as processes

SHOWN = 3
"""Cut prompts that are printed one by one."""


class PromptReader(Protocol):
    """The part of a backbone that finds lost words."""

    device: torch.device

    def lost_words(self, prompts: Sequence[str]) -> list[str]:
        """Return the words of each prompt beyond the last token that is read; empty for none."""
        ...


def words_beyond(tokenizer: Any, texts: Sequence[str], length: int) -> list[str]:
    """Return the end of each text beyond its first `length` tokens, special ones counted; empty for none."""
    texts = list(texts)
    found = [""] * len(texts)
    whole = tokenizer(texts, verbose=False)["input_ids"]
    long = [i for i, ids in enumerate(whole) if len(ids) > length]
    if not long:
        return found
    kept = tokenizer([texts[i] for i in long], truncation=True, max_length=length, verbose=False)["input_ids"]
    for i, ids in zip(long, kept, strict=True):
        common = next((n for n, (a, b) in enumerate(zip(whole[i], ids, strict=False)) if a != b), len(ids))
        found[i] = tokenizer.decode(whole[i][common:], skip_special_tokens=True).strip()
    return found


class CutPrompts:
    """Counter of the prompts that are cut; keeps the first of them."""

    def __init__(self, reader: PromptReader) -> None:
        self.reader = reader
        self.count = self.of = 0
        self.first: dict[str, str] = {}

    def __call__(self, prompts: Sequence[str]) -> None:
        """Count some prompts."""
        lost = {prompt: words for prompt, words in zip(prompts, self.reader.lost_words(prompts), strict=True) if words}
        self.count, self.of = self.count + len(lost), self.of + len(prompts)
        self.first = dict([*self.first.items(), *lost.items()][:SHOWN])

    def add_up(self) -> None:
        """Add up the counts of all processes of a launch; each of them must call this."""
        both = torch.tensor([self.count, self.of], device=self.reader.device)
        self.count, self.of = processes.sum_over_processes(both).tolist()

    def lines(self, kind: str = "prompt") -> list[str]:
        """Return lines about the cut prompts; empty for none."""
        if not self.count:
            return []
        shown = [f"{kind} {_short(prompt)!r} is cut, not read: {words!r}" for prompt, words in self.first.items()]
        if self.of == 1:
            return shown
        return [f"{self.count} of {self.of} {kind}s are longer than the text encoder reads, and are cut", *shown]


def print_cut_prompts(reader: PromptReader, prompts: Sequence[str]) -> None:
    """Print which prompts are cut, to stderr."""
    cut = CutPrompts(reader)
    cut(list(dict.fromkeys(prompts)))
    processes.print_once(cut.lines())


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
