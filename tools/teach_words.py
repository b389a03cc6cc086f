"""Train the bundled text encoder on other nouns, so that they get the states of the concept that they mean.

    python tools/build_text_encoder.py --out runs/distilled
    python tools/teach_words.py --encoder runs/distilled --out runs/words

A developers' tool, run once on the output of `build_text_encoder.py`; about twenty minutes on two cores. A denoiser
generalises little beyond the states of its captions, even to "a doggy", whose states are near those of "dog". So the
encoder is trained once more, with its own frozen copy as target. Captions keep their states, and networks trained on
them stay valid. Common nouns without a picture, with or without an article or a style, get the states of the nearest
concept, by MiniLM's similarity to its name and keywords or by WordNet's synonyms. Other text keeps its states. A name
is combined with a style only where the training split has that picture.

The words of Emoji-8's `synonyms.json` are among the nouns, with MiniLM's nearest concept as meaning. Those of
`new_words.json` are left out, to measure unknown words.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from build_text_encoder import SHARD, familiar, mean_state, minilm, pad
from fewstep.common.files import atomic_folder, read_json
from fewstep_worlds.emoji8.dataset import caption_table, folder, load_records, style_words
from text_encoder_words import Words, plain, read_words

SEED = 3
STEPS = 1400
BATCH = 256
RATE = 5e-4
TOKENS = 20
LIKE = 0.5
"""Cosine to a concept's name from which on a noun counts as another word for it."""
DESCRIBED = 0.5
"""Weight of the likeness to a concept's keywords beside that to its name; both chosen on WordNet's synonyms."""
WRAPS = ("{}", "{}", "{}", "a {}", "the {}", "one {}", "my {}", "cute {}", "picture of a {}", "drawing of a {}")
CAPTIONS = 4
"""Captions drawn of each picture."""


@dataclass(frozen=True)
class Lines:
    """Training lines.

    Attributes:
        captions: as the denoiser is trained on.
        meant: noun -> name of the concept that it means.
        styles: name -> the styles that the training split has of it, in words.
        others: text that keeps its states.
    """

    captions: tuple[str, ...]
    meant: dict[str, str]
    styles: dict[str, tuple[str, ...]]
    others: tuple[str, ...]

    def draw(self, draw: random.Random) -> tuple[str, str]:
        """Draw a line, and the line whose states are its target."""
        kind = draw.random()
        if kind < 0.45:
            caption = draw.choice(self.captions)
            return caption, caption
        if kind >= 0.93:
            text = draw.choice(self.others)
            return text, text
        word, name = draw.choice(list(self.meant.items())) if kind < 0.83 else (draw.choice(list(self.styles)),) * 2
        line = draw.choice(WRAPS).format(word)
        if draw.random() < 0.5:
            return line, name
        style = draw.choice(self.styles[name])
        return f"{line}, {style}", f"{name}, {style}"


def concepts() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Return the keywords of each training concept by name, and its styles in the training split."""
    keywords: dict[str, tuple[str, ...]] = {}
    styles: dict[str, dict[str, None]] = {}
    for record in load_records("train"):
        name = plain(record.name)
        if name.isascii():
            keywords.setdefault(name, tuple(plain(word) for word in record.keywords))
            styles.setdefault(name, {})[style_words(record.style)] = None
    return keywords, {name: tuple(sorted(found)) for name, found in styles.items()}


@torch.no_grad()
def embed(model: BertModel, full: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return MiniLM's unit vectors of texts, [N, 384]."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), 384)
    for start in range(0, len(texts), 256):
        rows = order[start : start + 256]
        batch = pad([(e.ids, [0] * len(e.ids)) for e in full.encode_batch([texts[i] for i in rows])])
        states = model(batch.ids, batch.mask).last_hidden_state
        found[rows] = F.normalize(mean_state(states, batch.mask), dim=1)
    return found


def meanings(words: Words, keywords: dict[str, tuple[str, ...]], small: Tokenizer) -> dict[str, str]:
    """Return the concept of each noun that no caption has."""
    source = minilm()
    full = Tokenizer.from_file(str(source / "tokenizer.json"))
    full.no_padding()
    full.no_truncation()
    model: BertModel = BertModel.from_pretrained(source)
    model.eval()  # type: ignore[no-untyped-call]
    extra = {plain(item["word"]) for item in read_json(folder() / "synonyms.json")}
    tested = test_words()
    words = familiar(words, full)
    names = sorted(keywords)
    synonyms = {
        word: name
        for pair in words.synonyms
        for name, word in (pair, pair[::-1])
        if name in keywords and word not in keywords
    }
    whole = full.get_vocab()  # MiniLM has a piece of its own for each common word
    listed = [w for w in words.lemmas if w in words.drawable and w not in keywords and w.isascii()]
    nouns = known([w for w in listed if (w in whole or w in synonyms or w in extra) and w not in tested], small)
    vectors = embed(model, full, nouns)
    by_name = vectors @ embed(model, full, names).T
    described = vectors @ embed(model, full, [f"{name}: {', '.join(keywords[name])}" for name in names]).T
    best = (by_name + DESCRIBED * described).argmax(1)
    like = by_name[torch.arange(len(nouns)), best]
    meant = {word: names[int(i)] for word, i, cosine in zip(nouns, best, like, strict=True) if cosine >= LIKE}
    return meant | {word: synonyms[word] for word in nouns if word in synonyms}


def test_words() -> set[str]:
    """Return the test words of Emoji-8, which are no training lines."""
    return {plain(item["word"]) for item in read_json(folder() / "new_words.json")}


def known(texts: Sequence[str], small: Tokenizer) -> list[str]:
    """Return the texts that are short and have known pieces."""
    return [t for t, e in zip(texts, small.encode_batch(list(texts))) if "[UNK]" not in e.tokens and len(e.ids) <= 12]


def train(encoder: BertModel, frozen: BertModel, tokenizer: AutoTokenizer, lines: Lines, steps: int) -> None:
    """Train in place: the target of each line's states, padding included, is the frozen encoder's of its meaning."""
    draw = random.Random(SEED)
    trained = [value for name, value in encoder.named_parameters() if value.requires_grad and "pooler" not in name]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))

    def states(model: BertModel, texts: Sequence[str]) -> Tensor:
        batch = tokenizer(  # type: ignore[operator]
            list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return found.float()

    began = time.monotonic()
    for step in range(steps):
        ramp = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.param_groups[0]["lr"] = RATE * ramp
        texts, meant = zip(*(lines.draw(draw) for _ in range(BATCH)), strict=True)
        with torch.no_grad():
            wanted = states(frozen, meant)
        loss = F.mse_loss(states(encoder, texts), wanted) / wanted.var()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - began
            print(
                f"step {step + 1}/{steps} error {float(loss.detach()):.4f} of the variance, {spent:.0f} s", flush=True
            )


def main() -> None:
    """Collect the lines, train and write the encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder with text_encoder/ and tokenizer/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the new text_encoder/")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.encoder / "tokenizer")
    small = Tokenizer.from_file(str(options.encoder / "tokenizer" / "tokenizer.json"))
    small.no_padding()
    small.no_truncation()
    place = options.encoder / "text_encoder"
    frozen, encoder = (
        BertModel.from_pretrained(place, attn_implementation="eager", dtype=torch.float32).eval() for _ in range(2)
    )
    frozen.requires_grad_(False)
    words = read_words(options.wordnet)
    keywords, styles = concepts()
    table = caption_table(load_records("train"), CAPTIONS, 0)
    tested = test_words()
    lines = Lines(
        tuple(sorted({plain(caption) for row in table for caption in row})),
        meanings(words, keywords, small),
        styles,
        tuple(text for text in known([*words.lemmas[::7], *words.glosses[::9]], small) if text not in tested),
    )
    print(f"{len(lines.captions)} captions, {len(lines.meant)} nouns", flush=True)
    train(encoder, frozen, tokenizer, lines, options.steps)
    encoder.half()
    with atomic_folder(options.out / "text_encoder") as part:
        encoder.save_pretrained(part, max_shard_size=SHARD)
        for shard in part.glob("*.safetensors"):
            shard.chmod(0o644)
        (part / "config.json").write_text((place / "config.json").read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
