"""The base of the scorers: prompts to tokens, pictures to scores, and a frozen network from published files."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.common.errors import UserError
from fewstep.common.tensors import load_tensors
from fewstep.scorers.preprocess import Framing, frame
from fewstep.scorers.registry import ScorerFiles
from fewstep.scorers.reward import ScorerIdentity

State = Mapping[str, Tensor]
BATCH = 64
"""Prompts that are encoded at once."""


@dataclass(eq=False)
class Scorer(ABC):
    """A preference scorer (`reward.PreferenceScorer`) by a frozen network.

    Attributes:
        rows: names of the tensors that a prompt is encoded to.
        length: tokens of a prompt; longer prompts are truncated.
    """

    rows: ClassVar[tuple[str, ...]] = ("text",)
    network: Any
    tokenizer: Any
    length: int
    framing: Framing
    identity: ScorerIdentity

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode K prompts to `rows`, [K, ...] each."""

    @abstractmethod
    def compare(self, pixels: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return scores [B] of framed pictures, in the network's dtype, with rows of `encode`; all on one device."""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts in batches, on the CPU; see `PreferenceScorer.prepare`."""
        return in_batches(self.encode, prompts)

    def score(self, pictures: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """Score [B, 3, H, W] in [-1, 1] with rows of `prepare`, [B]; see `PreferenceScorer.score`."""
        check_rows(pictures, prepared, self.rows)
        first = next(self.network.parameters())
        pixels = frame(pictures, self.framing).to(first.device, first.dtype)
        return self.compare(pixels, {k: value.to(first.device, non_blocking=True) for k, value in prepared.items()})

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, int64 [K, length] each.

        Always padded to the full length, so that a prompt's row does not depend on the prompts beside it.
        """
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask


@torch.no_grad()
def in_batches(encode: Callable[[Sequence[str]], dict[str, Tensor]], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Encode prompts in batches and concatenate the results on the CPU.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to prepare")
    parts = [encode(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    return {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}


def check_rows(pictures: Tensor, prepared: Mapping[str, Tensor], wanted: tuple[str, ...]) -> None:
    """Raise unless there is one prepared row per picture.

    Raises:
        ValueError: other keys or another number of rows.
    """
    if set(prepared) != set(wanted):
        raise ValueError(f"prepared prompts hold {sorted(prepared)}, this scorer's hold {sorted(wanted)}")
    rows = {key: len(value) for key, value in prepared.items()}
    if set(rows.values()) != {len(pictures)}:
        raise ValueError(f"{len(pictures)} pictures came with rows of prompts {rows}; give one row per picture")


def unit(embedding: Tensor) -> Tensor:
    """Scale vectors to length 1, in at least fp32."""
    wide = embedding if embedding.dtype == torch.float64 else embedding.float()
    return F.normalize(wide, dim=-1)


@contextmanager
def loading(what: object) -> Iterator[None]:
    """Report in one line what cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"cannot load {what}: {' '.join(str(error).split())[:300]}", field=str(what)) from error


def load_tokenizer(folder: Path, kind: str, vocabulary: int) -> Any:
    """Load the folder's tokenizer, of class CLIPTokenizer ("clip") or BertTokenizer ("bert").

    Args:
        vocabulary: number of tokens in the network's embedding.

    Raises:
        UserError: it cannot be read, or has more tokens than the network.
    """
    import transformers

    tokenizer_class = transformers.CLIPTokenizer if kind == "clip" else transformers.BertTokenizer
    with loading(f"the tokenizer in {folder}"):
        tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
        size = len(tokenizer)
    if size > vocabulary:
        raise UserError(
            f"the tokenizer in {folder} has {size} tokens, the network {vocabulary}: it is another model's",
            field=str(folder),
        )
    return tokenizer


def rename_keys(state: State, rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the state with regular expressions of its keys replaced, one rule after another."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = tensor
    return renamed


def load_frozen(
    make: Callable[[], nn.Module],
    files: ScorerFiles,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[State], State] = lambda state: state,
    unused: str = "position_ids$",
) -> Any:
    """Build a network with the weights of a scorer's files, frozen and in eval mode.

    Args:
        make: builds the network; its parameters take no memory until they are loaded.
        convert: state under the files' keys -> state under the network's.
        unused: regular expression of keys in the files that the network lacks, such as buffers.

    Raises:
        UserError: a missing or unknown key, or another shape.
    """
    from accelerate import init_empty_weights

    state = {key: tensor for file in files.weights for key, tensor in load_tensors(file).items()}
    with loading(files.weights[0]):
        with init_empty_weights(include_buffers=False):
            network = make()
        converted = convert({key: tensor for key, tensor in state.items() if not re.search(unused, key)})
        network.load_state_dict({key: tensor.to(dtype).contiguous() for key, tensor in converted.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)
