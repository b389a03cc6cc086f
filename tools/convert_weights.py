"""Convert the published pickle of a metric's network to safetensors, after comparing its SHA-256.

    python tools/convert_weights.py inception pt_inception-2015-12-05-6726825d.pth

The file is opened with weights_only=True, which loads tensors and runs no code. The folder is written below the weights
folder of `fewstep evaluate`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.common.errors import UserError
from fewstep.common.files import atomic_write, cache_root, sha256
from fewstep.common.tensors import save_tensors
from fewstep.evaluation.standard.registry import NETWORKS, PUBLISHED


@dataclass(frozen=True)
class Pickle:
    """A published file.

    Attributes:
        network: key of `NETWORKS`.
        where: page that it is published on.
        besides: what else its folder needs.
        key: of the weights in it; empty where it holds nothing else.
    """

    network: str
    where: str
    besides: str = ""
    key: str = ""


CLIP_TOKENIZER = "vocab.json and merges.txt of openai/clip-vit-large-patch14"
BERT = "med_config.json of the same page, vocab.txt and tokenizer_config.json of bert-base-uncased"
KNOWN = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": Pickle(
        "inception", "releases of mseitzer/pytorch-fid, and of toshas/torch-fidelity under another name"
    ),
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0": Pickle(
        "aesthetic", "christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth"
    ),
    "2d4098b4adb3b299f5422a6201d0caed9ff9fff2a4eb8c25a0b67fe85485fdaa": Pickle(
        "ic9600", "ck.pth, linked from tinglyfeng/IC9600 (no licence)"
    ),
    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6": Pickle(
        "image_reward", "hub: THUDM/ImageReward, ImageReward.pt", BERT
    ),
    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837": Pickle(
        "hpsv2", "hub: xswu/HPSv2, HPS_v2.1_compressed.pt", CLIP_TOKENIZER, "state_dict"
    ),
    "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1": Pickle(
        "hpsv2", "hub: xswu/HPSv2, HPS_v2_compressed.pt (version 2.0)", CLIP_TOKENIZER, "state_dict"
    ),
}
"""SHA-256 of a published file -> what it is."""


def convert(network: str, file: Path, weights: Path) -> Path:
    """Write the network's folder below `weights`; return the file.

    Raises:
        UserError: another file than the published ones.
    """
    found = sha256(file)
    known = KNOWN.get(found)
    if known is None or known.network != network:
        listed = "; ".join(f"{digest[:16]} ({each.where})" for digest, each in KNOWN.items() if each.network == network)
        raise UserError(f"{file} has sha256 {found[:16]}, which is not that of {network}: {listed}", field=str(file))
    loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    state = {key: value.clone() for key, value in (loaded[known.key] if known.key else loaded).items()}
    target = weights / NETWORKS[network].source / f"{network}.safetensors"
    with atomic_write(target) as part:
        save_tensors(part, state, {PUBLISHED: f"{file.name}, sha256 {found[:16]}"})
    return target


def main() -> None:
    """Convert the file that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("network", choices=sorted({each.network for each in KNOWN.values()}))
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--weights", type=Path, default=cache_root() / "weights", help="folder of the networks' folders"
    )
    given = parser.parse_args()
    try:
        print(f"wrote {convert(given.network, given.file, given.weights)}")
    except UserError as error:
        raise SystemExit(f"convert_weights: {error}") from None
    besides = next(each.besides for each in KNOWN.values() if each.network == given.network)
    if besides:
        print(f"put beside it: {besides}")


if __name__ == "__main__":
    main()
