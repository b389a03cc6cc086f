"""What each standard metric must return: the formula of its reference implementation, on weights that `write_weights`
writes, in fp64. Tests and `benchmarks/metric_differences.py` compare with it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fewstep.evaluation.metric import Pictures
from fewstep.evaluation.standard import inception
from fewstep.scorers.preprocess import CLIP_MEAN, CLIP_STD
from support import metric_references as reference
from support import scorer_references as scorers

PROMPTS = ["a red disc", "blue square", "a red square"]
SIDE = 28
"""Pixels that the tiny CLIP networks see."""


def write_weights(base: Path) -> Path:
    """Write a folder of weights as the guide describes it; Inception's where torch-fidelity is installed."""
    scorers.write_clip(base / "clip-vit-large-patch14", seed=1)
    scorers.write_clip(base / "CLIP-ViT-g-14-laion2B-s12B-b42K", seed=3)
    scorers.write_clip(base / "PickScore_v1", seed=5)
    scorers.write_hpsv2(base / "hpsv2", scorers.open_clip_state())
    scorers.write_image_reward(base / "image_reward", scorers.image_reward_state())
    scorers.write_mps(base / "mps", scorers.mps_state())
    reference.write(base / "aesthetic", reference.aesthetic_state(16), "sac.pth, sha256 0123456789abcdef")
    reference.write(base / "ic9600", reference.icnet_state())
    if find_spec("torch_fidelity"):
        kind = inception.backend("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        reference.write(base / "inception", reference.inception_state(kind))
    return base


def some(n: int = 3, height: int = 40, width: int = 33, seed: int = 0) -> Pictures:
    """Smooth pictures with hard edges, not square."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (n, 5, 4, 3), dtype=np.uint8)
    fine = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)).copy() for one in coarse]
    pictures = np.stack(fine)
    pictures[:, height // 3 : height // 2, width // 4 :] = draw.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8)
    return pictures


def to_unit(pictures: Pictures) -> Tensor:
    """Pictures as float64 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255


def normal(x: Tensor) -> Tensor:
    """Subtract CLIP's means and divide by its deviations."""
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def by_pillow(pictures: Pictures, size: int) -> Tensor:
    """torchvision's Resize and CenterCrop on PIL pictures of an even margin, then ToTensor and Normalize."""
    cut = []
    for picture in pictures:
        image = Image.fromarray(picture)
        short = min(image.size)
        image = image.resize(tuple(size * side // short for side in image.size), Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in image.size)
        cut.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return normal(to_unit(np.stack(cut)))


def padded(pictures: Pictures, size: int) -> Tensor:
    """HPS v2's own: the longer side to `size` by torchvision's antialiased bicubic of tensors, black around."""
    longer = max(pictures.shape[1:3])
    height, width = (round(side * size / longer) for side in pictures.shape[1:3])
    small = F.interpolate(to_unit(pictures), (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return normal(F.pad(small, (left, size - width - left, top, size - height - top)))


def clip_ids(prompts: list[str]) -> Tensor:
    """Token ids by hand: letters, their end-of-word forms, and the one merge."""
    rows = []
    for prompt in prompts:
        pieces = ["<|startoftext|>"]
        for word in prompt.split():
            pieces += ["red</w>"] if word == "red" else [*word[:-1], f"{word[-1]}</w>"]
        pieces = [*pieces[: scorers.CONTEXT - 1], "<|endoftext|>"]
        rows.append(pieces + ["<|endoftext|>"] * (scorers.CONTEXT - len(pieces)))
    return torch.tensor([[scorers.PIECES.index(piece) for piece in row] for row in rows])


def clip_model(folder: Path) -> Any:
    """transformers' own class, in fp64."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, local_files_only=True).double().eval()


def clip_logits(folder: Path, pictures: Pictures) -> Tensor:
    """transformers' own cosines of pictures and PROMPTS, times exp(logit scale)."""
    with torch.no_grad():
        seen = by_pillow(pictures, SIDE)
        found: Tensor = clip_model(folder)(input_ids=clip_ids(PROMPTS), pixel_values=seen).logits_per_image.diagonal()
    return found


def clip(weights: Path, pictures: Pictures) -> Tensor:
    """torchmetrics' CLIP score: 100 x cosine, by transformers' model and preprocessing."""
    return clip_logits(weights / "clip-vit-large-patch14", pictures) * 100 / np.exp(2.0)


def pickscore(weights: Path, pictures: Pictures) -> Tensor:
    """transformers' logit."""
    return clip_logits(weights / "PickScore_v1", pictures)


def aesthetic(weights: Path, pictures: Pictures) -> Tensor:
    """The published program: CLIP's embeddings of length 1 through its layers."""
    model = clip_model(weights / "clip-vit-large-patch14")
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=by_pillow(pictures, SIDE)).pooler_output
        embeddings = model.visual_projection(pooled)
    state = load_file(weights / "aesthetic" / "weights.safetensors")
    return reference.aesthetic({key: value.double() for key, value in state.items()}, embeddings)


def hpsv2(weights: Path, pictures: Pictures) -> Tensor:
    """open_clip's cosine x 100."""
    return 100 * scorers.open_clip_cosine(scorers.open_clip_state(), padded(pictures, SIDE), clip_ids(PROMPTS))


def image_reward(weights: Path, pictures: Pictures) -> Tensor:
    """The published reward of BLIP's networks."""
    words = {"a": 5, "red": 6, "blue": 7, "disc": 8, "square": 9}
    ids = torch.zeros(len(PROMPTS), 35, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        tokens = [2, *(words[word] for word in prompt.split()), 3]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    state = scorers.image_reward_state()
    return scorers.image_reward(state, by_pillow(pictures, SIDE), ids, (ids > 0).long())


def complexity(weights: Path, pictures: Pictures) -> Tensor:
    """ICNet's score of Pillow's bilinear 512 x 512, ToTensor and Normalize in fp32."""
    wide = np.stack([np.asarray(Image.fromarray(p).resize((512, 512), Image.Resampling.BILINEAR)) for p in pictures])
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = (torch.from_numpy(wide).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return reference.icnet(reference.icnet_state(), seen)


SCORES: dict[str, Callable[[Path, Pictures], Tensor]] = {
    "clip": clip,
    "aesthetic": aesthetic,
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "image_reward": image_reward,
    "complexity": complexity,
}
"""Name of a metric of single pictures -> the numbers of its reference for pictures of PROMPTS, float64 [3]."""


def in_double(metric: Any) -> Any:
    """The metric with its network in fp64, and its pixels as they are."""
    if hasattr(metric, "_network"):
        network, forward = metric._network.double(), metric._network.forward
        network.forward = lambda x: forward(x.double())
    else:
        own = metric._scorer if hasattr(metric, "_scorer") else metric._features.network.scorer
        own.network.double()
    return metric


def torch_fidelitys(weights: Path, precision: str = "float32") -> Any:
    """torch-fidelity's own extractor on the folder's weights: uint8 [N, 3, H, W] -> ([N, 2048],)."""
    import io

    kind = inception.backend("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    file = io.BytesIO()
    torch.save(load_file(weights / "inception" / "weights.safetensors"), file)
    file.seek(0)
    return kind("theirs", ["2048"], feature_extractor_weights_path=file, feature_extractor_internal_dtype=precision)


def inception_features(network: Any, pictures: Pictures, resize: str = "legacy") -> Tensor:
    """Features of torch-fidelity's extractor: its own resize, clean-fid's in its place, or a patch without one."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    if resize == "patch":
        top, left = (round((side - 299) / 2) for side in x.shape[2:])  # as torchvision's CenterCrop
        x = x[:, :, top : top + 299, left : left + 299]
    with torch.no_grad():
        if resize != "clean":
            return network(x)[0]  # type: ignore[no-any-return]
        module = inception.backend("feature_extractor_inceptionv3")
        own, module.interpolate_bilinear_2d_like_tensorflow1x = (
            module.interpolate_bilinear_2d_like_tensorflow1x,
            lambda x, **_: clean_fids(pictures).to(x.dtype),
        )
        try:
            return network(x)[0]  # type: ignore[no-any-return]
        finally:
            module.interpolate_bilinear_2d_like_tensorflow1x = own


def clean_fids(pictures: Pictures) -> Tensor:
    """clean-fid's resize: each plane by Pillow's bicubic in floating point, clipped."""
    rows = []
    for picture in pictures:
        planes = [Image.fromarray(picture[:, :, c].astype(np.float32), mode="F") for c in range(3)]
        wide = [np.asarray(plane.resize((299, 299), resample=Image.Resampling.BICUBIC)) for plane in planes]
        rows.append(np.stack(wide).clip(0, 255))
    return torch.from_numpy(np.stack(rows))


def torch_fidelitys_fid(ours: Tensor, theirs: Tensor) -> float:
    """The Frechet distance of two sets of features by torch-fidelity's program, in fp64."""
    with reference.without_torchvision():
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        stats = [fid_features_to_statistics(side.double()) for side in (ours, theirs)]
        return float(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"])


def mmd(ours: Tensor, theirs: Tensor) -> float:
    """The unbiased squared distance of KID with the kernel (x . y / D + 1)^3, in fp64."""
    x, y = ours.double(), theirs.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    own = [(kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(own[0] + own[1] - 2 * kernel(x, y).mean())


def torch_fidelitys_numbers(weights: Path, ours: Pictures, theirs: Pictures, folder: Path) -> tuple[float, float]:
    """FID and KID by torch-fidelity's own command, from pictures to numbers: legacy resize, 2,048 features."""
    file = folder / "inception.pth"
    torch.save(load_file(weights / "inception" / "weights.safetensors"), file)

    class Set(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, pictures: Pictures) -> None:
            self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, row: int) -> Tensor:
            return self.pictures[row]

    with reference.without_torchvision():
        import torch_fidelity

        found = torch_fidelity.calculate_metrics(
            input1=Set(ours), input2=Set(theirs), cuda=False, fid=True, kid=True, kid_subsets=1,
            kid_subset_size=len(ours), feature_extractor_weights_path=str(file), cache=False, verbose=False,
            save_cpu_ram=True,
        )  # fmt: skip
    return found["frechet_inception_distance"], found["kernel_inception_distance_mean"]
