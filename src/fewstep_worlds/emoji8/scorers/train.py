"""Training of the prompt-agreement scorer, on Emoji-8's training split alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.common.accelerator import make_accelerator
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.device import pick_device
from fewstep.common.errors import UserError
from fewstep.common.rng import KeyedRng
from fewstep.inference.multilingual.sentence import SentenceEncoder
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common import location
from fewstep_worlds.common.training import Weights, fit
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.config import AgreementConfig
from fewstep_worlds.emoji8.scorers.agreement import Agreement, load_scorer, save_scorer, to_input
from fewstep_worlds.emoji8.scorers.augment import augment
from fewstep_worlds.emoji8.scorers.network import Scorer
from fewstep_worlds.emoji8.scorers.text import BertStates

VALIDATION_PICTURES = 500
"""Pictures of each split that the scorer is validated on."""


@dataclass(frozen=True)
class Captions:
    """Every record's drawn captions, encoded once, and which other records they are true of.

    Attributes:
        states: vectors of the distinct captions, [K, W].
        rows: which of them belong to which record, int64 [N, V].
        pieces: the comma-separated pieces of each distinct caption, bool [K, P].
        named: the caption contains the concept's name, bool [K].
        styled: style that the caption names, or -1, int64 [K].
        concept: int64 [N].
        style: int64 [N].
        known: pieces that are true of each record, bool [N, P].
    """

    states: Tensor
    rows: Tensor
    pieces: Tensor
    named: Tensor
    styled: Tensor
    concept: Tensor
    style: Tensor
    known: Tensor


def draw_captions(records: tuple[emoji8.Record, ...], variants: int, seed: int, text: SentenceEncoder) -> Captions:
    """Draw and encode `variants` captions of each record."""
    drawn = emoji8.caption_table(records, variants, seed)
    distinct = sorted({caption for row in drawn for caption in row})
    number = {caption: i for i, caption in enumerate(distinct)}
    styles = {emoji8.style_words(style): i for i, style in enumerate(emoji8.STYLE_FAMILY)}
    concepts = {code: i for i, code in enumerate(sorted({record.concept for record in records}))}
    names = {record.name for record in records}

    def split(caption: str) -> list[str]:
        return caption.split(", ")

    true_of = [{*split(r.name), *r.keywords, emoji8.style_words(r.style)} for r in records]
    column = {piece: i for i, piece in enumerate(sorted(set().union(*true_of)))}
    known = torch.zeros(len(records), len(column), dtype=torch.bool)
    for row, pieces_of_record in enumerate(true_of):
        known[row, [column[piece] for piece in pieces_of_record]] = True
    pieces = torch.zeros(len(distinct), len(column), dtype=torch.bool)
    named = torch.zeros(len(distinct), dtype=torch.bool)
    styled = torch.full((len(distinct),), -1)
    for row, caption in enumerate(distinct):
        parts = split(caption)
        pieces[row, [column[piece] for piece in parts if piece in column]] = True
        named[row] = any(", ".join(parts[:end]) in names for end in range(1, len(parts) + 1))
        styled[row] = styles.get(parts[-1], -1)
    return Captions(
        states=torch.as_tensor(text(distinct)),
        rows=torch.tensor([[number[caption] for caption in row] for row in drawn]),
        pieces=pieces,
        named=named,
        styled=styled,
        concept=torch.tensor([concepts[record.concept] for record in records]),
        style=torch.tensor([styles[emoji8.style_words(record.style)] for record in records]),
        known=known,
    )


def caption_targets(captions: Captions, items: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return which captions `chosen` [B] are right for which records `items` [B], and which pairs do not count.

    A caption is right for its concept's pictures, in its style if it names one. A caption of keywords alone
    can be true of other concepts too ("animal"): such pairs are neither right nor wrong.

    Returns:
        positive and ignored, bool [B, B], record by caption.
    """
    concept, style = captions.concept[items], captions.style[items]
    styled = captions.styled[chosen]
    same = concept[:, None] == concept[None, :]
    fits = (styled < 0)[None, :] | (styled[None, :] == style[:, None])
    pieces = captions.pieces[chosen].float()
    true_of = captions.known[items].float() @ pieces.T >= pieces.sum(1) - 0.5
    positive = same & fits | torch.eye(len(items), dtype=torch.bool)
    return positive, ~same & ~captions.named[chosen][None, :] & true_of


def retrieval(scorer: Scorer, states: Tensor, names: list[str], part: emoji8.Emoji8) -> float:
    """Return the share of pictures whose own name has the largest cosine (R@1), on up to `VALIDATION_PICTURES`.

    Args:
        scorer: on the CPU, in evaluation mode.
        states: vectors of `names` by the text backbone, [M, W].
        names: of all concepts, M.
        part: the pictures.
    """
    picked = np.linspace(0, len(part) - 1, min(VALIDATION_PICTURES, len(part))).astype(int)
    right = torch.tensor([names.index(part.records[i].name) for i in picked])
    with torch.no_grad():
        cosine = scorer.embed_pictures(to_input(part.pictures[picked])) @ scorer.embed_text(states).T
    return float((cosine.argmax(1) == right).float().mean())


def _part(data: emoji8.Emoji8, split: str) -> emoji8.Emoji8:
    rows = [row for row, record in enumerate(data.records) if record.split == split]
    return emoji8.Emoji8(data.pictures[rows], tuple(data.records[row] for row in rows))


def multi_positive_loss(cosine: Tensor, positive: Tensor, ignored: Tensor, scale: Tensor) -> Tensor:
    """Return InfoNCE in both directions with several positives a row and some ignored pairs.

    Args:
        cosine: of picture i and caption j, [B, B].
        positive: caption j is right for picture i, bool [B, B]; every row and column has at least one.
        ignored: the pair is neither right nor wrong, bool [B, B].
        scale: factor of the cosines, the inverse temperature.
    """
    logits = (cosine * scale).masked_fill(ignored, -torch.inf)
    losses = []
    for rows, right in ((logits, positive), (logits.T, positive.T)):
        log_share = F.log_softmax(rows, dim=1).masked_fill(~right, 0.0)
        losses.append((-log_share.sum(1) / right.sum(1)).mean())
    return 0.5 * (losses[0] + losses[1])


def train_scorer(
    config: AgreementConfig,
    folder: Path,
    target: Path | None = None,
    text: SentenceEncoder | None = None,
    data: emoji8.Emoji8 | None = None,
    *,
    quiet: bool = False,
) -> Agreement:
    """Train the scorer, resuming from the run folder's newest checkpoint, and save it.

    Args:
        config: shape, length and rates.
        folder: the run's folder: config, log, checkpoints.
        target: folder of the finished scorer, `folder/scorer` by default.
        text: the frozen text backbone; the bundled teacher's text encoder by default.
        data: pictures to train on, the training split by default. Held-out pictures are for validation.
        quiet: show no progress bar.

    Raises:
        UserError: a held-out picture in `data`, no text encoder, a foreign run folder, or a place that cannot be
            written to.
    """
    text = text or BertStates(location.root() / "teacher")
    data = data or emoji8.load("train")
    for record in data.records:
        if record.split != "train":
            raise UserError(f"picture {record.id} is of the split {record.split!r}; a scorer trains on 'train'")
    seed = config.loop.seed
    captions = draw_captions(data.records, config.captions, seed, text)
    torch.manual_seed(seed)
    scorer = Scorer(config.network, text.width)
    speed_up(scorer)
    accelerator = make_accelerator(config.loop.precision, pick_device("auto"))
    device = accelerator.device
    scorer.to(device)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        return {"pictures": to_input(data.pictures[items]).to(device), "items": torch.from_numpy(items)}

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        items = batch["items"]
        chosen = captions.rows[items, rng.integers("caption", 0, captions.rows.shape[1])]
        positive, ignored = caption_targets(captions, items, chosen)
        pictures = augment(batch["pictures"], rng).contiguous(memory_format=torch.channels_last)
        seen = scorer.embed_pictures(pictures)
        vectors = scorer.embed_text(captions.states[chosen].to(device))
        with torch.autocast(device.type, enabled=False):
            scale = scorer.scale()
            value = multi_positive_loss(seen @ vectors.T, positive.to(device), ignored.to(device), scale)
        return Loss(value, scalars={"scale": scale.detach()})

    names = sorted({record.name for record in emoji8.load_records(emoji8.SPLITS)})
    states = torch.as_tensor(text(names))
    held_out_splits = ("heldout-pair", "heldout-concept")
    held_out = emoji8.load(held_out_splits)
    splits = {"train": data, **{split: _part(held_out, split) for split in held_out_splits}}

    def evaluate(weights: Weights) -> dict[str, float]:
        averaged = Scorer(config.network, text.width)
        averaged.load_state_dict({name: tensor.cpu() for name, tensor in weights["scorer"].items()})
        averaged.eval()
        return {f"r1_{split}": retrieval(averaged, states, names, part) for split, part in splits.items()}

    inputs = {
        "text encoder": text.sha256,
        "pictures": hashlib.sha256(np.ascontiguousarray(data.pictures).data).hexdigest(),
    }
    plan = [Update("scorer", dict(scorer.named_parameters()), loss, config.optim)]
    trained = fit(
        "scorer", plan, fetch, len(data), folder, config, config.loop, accelerator, inputs, evaluate, quiet=quiet
    )
    weights = {name: tensor.cpu() for name, tensor in trained["scorer"].items()}
    notes: dict[str, Any] = {
        "trained_on": f"Emoji-8, {len(data)} pictures of the training split",
        "training": config.model_dump(mode="json"),
        "names": len(names),
        "r1": evaluate(trained),
    }
    target = target or folder / "scorer"
    if accelerator.is_main_process:
        save_scorer(target, config.network, weights, text, notes)
    accelerator.wait_for_everyone()
    return load_scorer(target, text)
