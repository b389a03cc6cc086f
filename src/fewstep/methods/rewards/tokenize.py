"""Prompts -> token ids, by the tokenizer that lies in a scorer's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.methods.rewards.weights import loading

BATCH = 64
"""Prompts that are encoded at once."""


def load_tokenizer(folder: Path, kind: str, vocabulary: int) -> Any:
    """The folder's tokenizer, of class CLIPTokenizer ("clip") or BertTokenizer ("bert").

    Args:
        vocabulary: tokens that the network knows.

    Raises:
        UserError: it cannot be read, or makes tokens that the network does not know.
    """
    import transformers

    maker = transformers.CLIPTokenizer if kind == "clip" else transformers.BertTokenizer
    with loading(f"the tokenizer in {folder}"):
        tokenizer = maker.from_pretrained(folder, local_files_only=True)
        size = len(tokenizer)
    if size > vocabulary:
        raise UserError(f"the tokenizer in {folder} has {size} tokens, the network knows {vocabulary}: another model's")
    return tokenizer


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are no padding, int64 [K, length] each; what is longer is cut off.

    Always the full length, so that a prompt's row does not depend on the prompts beside it.
    """
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


@torch.no_grad()
def in_batches(encode: Callable[[Sequence[str]], dict[str, Tensor]], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Encode prompts a batch at a time; what comes out is gathered on the CPU.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to prepare")
    parts = [encode(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    return {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}


def check_rows(pictures: Tensor, said: dict[str, Tensor], wanted: tuple[str, ...]) -> None:
    """Refuse what is not one row of `prepare` a picture.

    Raises:
        ValueError: it is not.
    """
    if set(said) != set(wanted):
        raise ValueError(f"prepared prompts hold {sorted(said)}, this scorer's hold {sorted(wanted)}")
    rows = {key: len(value) for key, value in said.items()}
    if set(rows.values()) != {len(pictures)}:
        raise ValueError(f"{len(pictures)} pictures came with rows of prompts {rows}; give one row a picture")
