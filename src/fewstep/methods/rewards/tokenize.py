"""Prompts -> token ids, by the tokenizer of a scorer's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.methods.rewards.weights import loading

BATCH = 64
"""Prompts that are encoded at once."""


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


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 [K, length] each; longer prompts are truncated.

    Always padded to the full length, so that a prompt's row does not depend on the prompts beside it.
    """
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
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
