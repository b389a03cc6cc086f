"""Words of prompts beyond what the text encoders read: they have no effect on pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.backbones.base import Backbone
from fewstep.common import distributed as processes

SHOWN = 3
"""Cut prompts that are printed one by one."""


class CutPrompts:
    """Counter of the prompts that are cut; keeps the first of them."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.count = self.of = 0
        self.first: dict[str, str] = {}

    def __call__(self, prompts: Sequence[str]) -> None:
        """Count some prompts."""
        lost = {
            prompt: words for prompt, words in zip(prompts, self.backbone.lost_words(prompts), strict=True) if words
        }
        self.count, self.of = self.count + len(lost), self.of + len(prompts)
        self.first = dict([*self.first.items(), *lost.items()][:SHOWN])

    def add_up(self) -> None:
        """Add up the counts of all processes of a launch; each of them must call this."""
        both = torch.tensor([self.count, self.of], device=self.backbone.device)
        self.count, self.of = processes.sum_over_processes(both).tolist()

    def lines(self, kind: str = "prompt") -> list[str]:
        """Return lines about the cut prompts; empty for none."""
        if not self.count:
            return []
        shown = [f"{kind} {_short(prompt)!r} is cut, not read: {words!r}" for prompt, words in self.first.items()]
        if self.of == 1:
            return shown
        return [f"{self.count} of {self.of} {kind}s are longer than the text encoder reads, and are cut", *shown]


def print_cut_prompts(backbone: Backbone, prompts: Sequence[str]) -> None:
    """Print which prompts are cut, to stderr."""
    cut = CutPrompts(backbone)
    cut(list(dict.fromkeys(prompts)))
    processes.print_once(cut.lines())


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
