"""How long the networks of `fewstep evaluate --suite` take for a picture: `python benchmarks/suite_time.py`.

Random weights of the published sizes, one thread, fp32; preprocessing and prompts are not included. Prints seconds of
the processor, and hours for 5,000 pictures at that rate, which is an extrapolation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.standard.complexity import ICNet
from fewstep.evaluation.standard.inception import backend
from fewstep.scorers.hpsv2 import VIT_H_14
from support.metric_references import inception_state

COUNT = 5000
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VIT_G = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}


def vision(**sizes: int) -> nn.Module:
    """Return the picture's half of a CLIPModel, which takes nearly all of its time."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        network = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14))
    network = network.to_empty(device="cpu")
    for tensor in network.parameters():
        nn.init.constant_(tensor, 1e-3)
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return network


def inception() -> nn.Module:
    """Return torch-fidelity's network."""
    import io

    kind = backend("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    file = io.BytesIO()
    torch.save(inception_state(kind), file)
    file.seek(0)
    network: nn.Module = kind("random", ["2048"], feature_extractor_weights_path=file)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "FID, KID: Inception": (inception, lambda n: torch.zeros(n, 3, 299, 299, dtype=torch.uint8), 8),
    "IC: ICNet": (ICNet, lambda n: torch.zeros(n, 3, 512, 512), 4),
    "CLIP, aesthetic: ViT-L/14": (lambda: vision(**VIT_L), lambda n: torch.zeros(n, 3, 224, 224), 2),
    "PickScore, HPSv2: ViT-H/14": (lambda: vision(**VIT_H), lambda n: torch.zeros(n, 3, 224, 224), 2),
    "CS of tlcm and sdxl: ViT-g/14": (lambda: vision(**VIT_G), lambda n: torch.zeros(n, 3, 224, 224), 2),
}
"""Metrics: network -> (made, its pictures, how many of them are timed)."""


def rows() -> Iterator[tuple[str, int, float]]:
    """Yield each network's seconds of the processor for a picture, the better of two rounds."""
    assert VIT_H_14["vision_cfg"]["layers"] == VIT_H["num_hidden_layers"]
    for name, (make, pictures, count) in NETWORKS.items():
        network: Any = make().eval().requires_grad_(False)
        x, times = pictures(count), []
        for _ in range(2):
            start = time.process_time()
            with torch.inference_mode():
                network(x)
            times.append((time.process_time() - start) / count)
        yield name, count, min(times)


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    print(f"commit {commit()}; {hardware()}; one thread\n")
    print(f"| network | pictures | seconds a picture | {COUNT:,} pictures, hours |\n| --- | --- | --- | --- |")
    for name, count, seconds in rows():
        print(f"| {name} | {count} | {seconds:.2f} | {COUNT * seconds / 3600:.1f} |", flush=True)


if __name__ == "__main__":
    main()
