"""Each standard metric against the formula of its reference implementation, on random weights of the real classes."""

from __future__ import annotations

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.evaluation.evaluate import Reference, evaluate_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.metric import Identity, Metric, Pictures
from fewstep.evaluation.standard import inception
from fewstep.evaluation.standard.loader import Loader, load_metrics
from fewstep.evaluation.standard.pixels import framed
from fewstep.evaluation.standard.registry import METRICS, NETWORKS, SUITES, choose
from fewstep.scorers.preprocess import CLIP_MEAN, CLIP_STD, Framing
from support import metric_references as reference
from support import scorer_references as scorers

needs_inception = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
PROMPTS = ["a red disc", "blue square", "a red square"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights as the guide describes it."""
    base = tmp_path_factory.mktemp("weights")
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


@pytest.fixture(scope="module")
def loader() -> Loader:
    return Loader(torch.device("cpu"))


def some(n: int = 3, height: int = 40, width: int = 33, seed: int = 0) -> Pictures:
    """Smooth pictures with hard edges, not square."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (n, 5, 4, 3), dtype=np.uint8)
    fine = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)).copy() for one in coarse]
    pictures = np.stack(fine)
    pictures[:, height // 3 : height // 2, width // 4 :] = draw.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8)
    return pictures


def loaded(weights: Path, loader: Loader, *names: str) -> list[Metric]:
    return load_metrics(choose(None, names, weights), loader).metrics


def to_unit(pictures: Pictures) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255


def normal(x: Tensor) -> Tensor:
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


# ------------------------------------------------------------------------------------------------- pixels


def test_framing_is_the_librarys_image_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    own = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for height, width in ((40, 33), (33, 41), (28, 28), (20, 25)):
        pictures = some(height=height, width=width)
        expected = own([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(framed(pictures, Framing(28)), expected, rtol=0, atol=1e-6)


def test_padded_framing_is_hps_v2s() -> None:
    pictures = some(height=40, width=33)
    small = F.interpolate(to_unit(pictures), (28, 23), mode="bicubic", antialias=True)
    expected = normal(F.pad(small, (2, 3, 0, 0)))
    torch.testing.assert_close(framed(pictures, Framing(28, "pad")).double(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- Inception


@needs_inception
def test_features_are_torch_fidelitys(weights: Path, loader: Loader) -> None:
    kind = inception.backend("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    file = io.BytesIO()
    from safetensors.torch import load_file

    torch.save(load_file(weights / "inception" / "weights.safetensors"), file)
    file.seek(0)
    network = kind("theirs", ["2048"], feature_extractor_weights_path=file)
    pictures = some(2, 64, 48)
    with torch.no_grad():
        (expected,) = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    (metric,) = loaded(weights, loader, "fid_legacy")
    found = metric.features(pictures, ())
    assert found.shape == (2, 2048)
    assert np.abs(expected.numpy()).mean() > 1e-3
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    (clean,) = loaded(weights, loader, "fid")
    assert np.abs(clean.features(pictures, ()) - found).max() > 1e-3, "another resize"


@pytest.mark.parametrize(("height", "width"), [(64, 48), (512, 341), (299, 299)])
def test_the_clean_resize_is_an_antialiased_bicubic_without_rounding(height: int, width: int) -> None:
    picture = some(1, height, width)
    found = inception.clean(picture)[0].numpy()
    expected = np.stack([reference.clean_resize(picture[0, :, :, c].astype(np.float64), 299) for c in range(3)])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert height == 299 or np.abs(found - found.round()).max() > 0.3


def test_a_patch_is_the_middle_at_full_size() -> None:
    picture = some(1, 310, 301)
    assert torch.equal(inception.patch(picture)[0], torch.from_numpy(picture[0, 6:305, 1:300]).permute(2, 0, 1).float())
    with pytest.raises(UserError, match="299 pixels a side, not 64 x 400"):
        inception.patch(some(1, 400, 64))


@needs_inception
def test_fid_and_kid_of_features_are_torch_fidelitys() -> None:
    draw = np.random.default_rng(0)
    mixed = draw.normal(size=(24, 24))
    ours = (draw.normal(size=(600, 24)) @ mixed).clip(0) + 0.3
    theirs = (draw.normal(size=(500, 24)) @ mixed * 1.1).clip(0)
    features = Features(reference.Numbered(ours))
    with reference.without_torchvision():
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric

        sides = [torch.from_numpy(rows.astype(np.float32)) for rows in (ours, theirs)]
        stats = [fid_features_to_statistics(side) for side in sides]
        fid = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        equal = [side[:500] for side in sides]
        kid = kid_features_to_metric(*equal, kid_subsets=1, kid_subset_size=500, verbose=False)
        wide = [fid_features_to_statistics(side.double()) for side in sides]
        exact = fid_statistics_to_metric(*wide, verbose=False)["frechet_inception_distance"]
    found = inception.InceptionFrechet(features, "FID").reduce(*(side.numpy() for side in sides), seed=0)
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert found.value == pytest.approx(fid, rel=1e-5), "its mean is taken in fp32"
    assert (found.low, found.high, found.n) == (None, None, 600)
    kernel = KernelDistance(features, "KID").reduce(*(side.numpy() for side in equal), seed=0)
    assert kernel.value == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-4)
    with pytest.raises(UserError, match="FID of 499 pictures"):
        inception.InceptionFrechet(features, "FID").reduce(sides[0].numpy()[:499], sides[1].numpy(), 0)


@needs_inception
@pytest.mark.slow
def test_fid_is_torch_fidelitys_own_number(weights: Path, loader: Loader, tmp_path: Path) -> None:
    """From pictures to the number, by its own program: legacy resize, 2,048 features."""
    ours, theirs = some(24, 64, 64), some(24, 64, 64, seed=1)
    file = tmp_path / "inception.pth"
    from safetensors.torch import load_file

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

        expected = torch_fidelity.calculate_metrics(
            input1=Set(ours), input2=Set(theirs), cuda=False, fid=True, kid=True, kid_subsets=1, kid_subset_size=24,
            feature_extractor_weights_path=str(file), cache=False, verbose=False, save_cpu_ram=True,
        )  # fmt: skip
    fid, kid = loaded(weights, loader, "fid_legacy", "kid_legacy")
    assert isinstance(fid, inception.InceptionFrechet)
    fid.fewest = 2
    found = evaluate_pictures(ours, [""] * 24, [fid, kid], Reference(theirs))
    assert found["FID, legacy resize"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    kernel = expected["kernel_inception_distance_mean"]
    assert found["KID, legacy resize"].value == pytest.approx(kernel, abs=1e-6), "its kernel of size 1 is in fp32"
    assert abs(kernel) > 1e-4


@needs_inception
def test_another_networks_weights_are_refused(weights: Path, loader: Loader, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(weights / "inception" / "weights.safetensors")
    del state["Mixed_7c.branch1x1.conv.weight"]
    reference.write(tmp_path / "inception", state)
    with pytest.raises(UserError, match="Mixed_7c"):
        loaded(tmp_path, loader, "fid")


# ---------------------------------------------------------------------------------- CLIP and preferences


def clip_ids(prompts: list[str]) -> Tensor:
    rows = []
    for prompt in prompts:
        pieces = ["<|startoftext|>"]
        for word in prompt.split():
            pieces += ["red</w>"] if word == "red" else [*word[:-1], f"{word[-1]}</w>"]
        pieces = [*pieces[: scorers.CONTEXT - 1], "<|endoftext|>"]
        rows.append(pieces + ["<|endoftext|>"] * (scorers.CONTEXT - len(pieces)))
    return torch.tensor([[scorers.PIECES.index(piece) for piece in row] for row in rows])


def clip_logits(folder: Path, pictures: Pictures) -> Tensor:
    """transformers' own cosines of pictures and PROMPTS, times exp(logit scale)."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True).double().eval()
    with torch.no_grad():
        seen = by_pillow(pictures, 28)
        found: Tensor = model(input_ids=clip_ids(PROMPTS), pixel_values=seen).logits_per_image.diagonal()
    return found


def in_double(metric: Any, network: Any) -> Any:
    network.double()
    return metric


def test_clip_score_is_torchmetrics(weights: Path) -> None:
    """100 x cosine, by transformers' model and preprocessing."""
    pictures = some(3, 42, 42)
    (metric,) = loaded(weights, Loader(torch.device("cpu")), "clip")
    in_double(metric, metric._scorer.network)
    expected = clip_logits(weights / "clip-vit-large-patch14", pictures) * 100 / np.exp(2.0)
    np.testing.assert_allclose(metric.features(pictures, PROMPTS), expected.numpy(), atol=1e-5)
    assert np.ptp(expected.numpy()) > 1
    figure = metric.reduce(metric.features(pictures, PROMPTS), None, 0)
    assert figure.value == pytest.approx(float(expected.mean()), abs=1e-5)


def test_the_aesthetic_predictor_reads_unit_embeddings_of_clip(weights: Path) -> None:
    from safetensors.torch import load_file
    from transformers import CLIPModel

    pictures = some(3, 42, 42)
    (metric,) = loaded(weights, Loader(torch.device("cpu")), "aesthetic")
    in_double(metric, metric._features.network.scorer.network)
    model = CLIPModel.from_pretrained(weights / "clip-vit-large-patch14", local_files_only=True).double().eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=by_pillow(pictures, 28)).pooler_output
        embeddings = model.visual_projection(pooled)
    state = load_file(weights / "aesthetic" / "weights.safetensors")
    expected = reference.aesthetic({key: value.double() for key, value in state.items()}, embeddings)
    np.testing.assert_allclose(metric.features(pictures, ()), expected.numpy(), rtol=1e-6)
    assert "sac.pth, sha256 0123456789abcdef" in metric.identity.backbone


def test_the_aesthetic_predictor_refuses_another_clip(weights: Path, loader: Loader, tmp_path: Path) -> None:
    reference.write(tmp_path / "aesthetic", reference.aesthetic_state(17))
    (metric,) = loaded(weights, loader, f"aesthetic:{tmp_path / 'aesthetic'}")
    with pytest.raises(UserError, match="embeddings of 17 numbers, the CLIP network has 16"):
        metric.features(some(), ())


def test_pickscore_is_the_librarys_logit(weights: Path, loader: Loader) -> None:
    pictures = some(3, 42, 42)
    (metric,) = loaded(weights, loader, "pickscore")
    in_double(metric, metric._scorer.network)
    expected = clip_logits(weights / "PickScore_v1", pictures)
    np.testing.assert_allclose(metric.features(pictures, PROMPTS), expected.numpy(), atol=1e-6)


def test_hpsv2_is_its_formula_on_its_own_pixels(weights: Path, loader: Loader) -> None:
    pictures = some(3, 40, 33)
    (metric,) = loaded(weights, loader, "hpsv2")
    in_double(metric, metric._scorer.network)
    small = F.interpolate(to_unit(pictures), (28, 23), mode="bicubic", antialias=True)
    cosine = scorers.open_clip_cosine(scorers.open_clip_state(), normal(F.pad(small, (2, 3))), clip_ids(PROMPTS))
    np.testing.assert_allclose(metric.features(pictures, PROMPTS), (100 * cosine).numpy(), atol=1e-5)


def test_image_reward_is_its_formula_on_its_own_pixels(weights: Path, loader: Loader) -> None:
    pictures = some(3, 42, 42)
    (metric,) = loaded(weights, loader, "image_reward")
    in_double(metric, metric._scorer.network)
    words = {"a": 5, "red": 6, "blue": 7, "disc": 8, "square": 9}
    ids = torch.zeros(3, 35, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        tokens = [2, *(words[word] for word in prompt.split()), 3]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    expected = scorers.image_reward(scorers.image_reward_state(), by_pillow(pictures, 28), ids, (ids > 0).long())
    np.testing.assert_allclose(metric.features(pictures, PROMPTS), expected.numpy(), atol=1e-6)


def test_scores_are_of_each_picture_with_its_own_prompt(weights: Path, loader: Loader) -> None:
    pictures = some()
    for name in ("clip", "pickscore", "hpsv2", "image_reward", "mps"):
        (metric,) = loaded(weights, Loader(torch.device("cpu")), name)
        together = metric.features(pictures, PROMPTS)
        apart = [metric.features(pictures[row : row + 1], [PROMPTS[row]])[0] for row in range(3)]
        np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
        assert np.abs(together - metric.features(pictures, PROMPTS[::-1]))[[0, 2]].min() > 1e-4


# ---------------------------------------------------------------------------------------------- complexity


def test_complexity_is_icnets_score(weights: Path, loader: Loader) -> None:
    pictures = some(2, 40, 33)
    (metric,) = loaded(weights, loader, "complexity")
    in_double(metric, metric._network)
    forward = metric._network.forward
    metric._network.forward = lambda x: forward(x.double())
    wide = np.stack([np.asarray(Image.fromarray(p).resize((512, 512), Image.Resampling.BILINEAR)) for p in pictures])
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = (torch.from_numpy(wide).permute(0, 3, 1, 2).float() / 255 - mean) / std  # ToTensor and Normalize, in fp32
    expected = reference.icnet(reference.icnet_state(), seen)
    np.testing.assert_allclose(metric.features(pictures, ()), expected.numpy(), rtol=1e-6)
    assert (expected[0] - expected[1]).abs() > 1e-4


# ------------------------------------------------------------------------------------ records and choices


def test_a_record_states_model_weights_input_n_and_prompts(weights: Path, loader: Loader) -> None:
    pictures = some()
    figures = evaluate_pictures(pictures, PROMPTS, loaded(weights, loader, "clip", "hpsv2"))
    identity = figures["CLIP score"].identity
    assert isinstance(identity, Identity)
    assert identity.backbone.startswith("openai/clip-vit-large-patch14 (CLIP: ViT of 2 x 32")
    assert identity.weights_sha256 == sha256(weights / "clip-vit-large-patch14" / "model.safetensors")
    assert identity.prompts_sha256 == hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()[:16]
    assert identity.n == 3
    line = identity.line()
    for stated in (identity.backbone, identity.weights_sha256[:16], identity.input, "n = 3", identity.prompts_sha256):
        assert stated in line
    other = evaluate_pictures(pictures, PROMPTS[::-1], loaded(weights, loader, "clip"))["CLIP score"].identity
    assert other is not None
    assert other.prompts_sha256 != identity.prompts_sha256
    assert figures["HPSv2"].identity != identity


def test_fit_to_prompts_has_no_floor_where_real_pictures_have_none(weights: Path, loader: Loader) -> None:
    metrics = loaded(weights, loader, "clip", "aesthetic")
    pictures, real = some(), some(4, seed=2)
    without = evaluate_pictures(pictures, PROMPTS, metrics, Reference(real, some(3, seed=3), [""] * 3))
    assert without["CLIP score"].floor is None
    assert without["aesthetic v2"].floor == pytest.approx(metrics[1].features(some(3, seed=3), ()).mean())
    told = evaluate_pictures(pictures, PROMPTS, metrics, Reference(real, some(3, seed=3), PROMPTS))
    assert told["CLIP score"].floor == pytest.approx(metrics[0].features(some(3, seed=3), PROMPTS).mean())


def test_suites_are_columns_of_known_metrics(weights: Path) -> None:
    if not find_spec("torch_fidelity"):
        reference.write(weights / "inception", {"Conv2d_1a_3x3.conv.weight": torch.zeros(1)})
    for suite, columns in SUITES.items():
        chosen = choose(suite, ["kid", columns[0].metric], weights)
        assert [each.column.heading for each in chosen] == [*(column.heading for column in columns), ""]
        assert all(set(each.models) == set(METRICS[each.name].networks) for each in chosen)
    assert {each.name: each.to_teacher for each in choose("sdxl", [], weights)} == {
        **{"fid": True, "patch_fid": True, "clip": False, "hpsv2": False, "pickscore": False, "image_reward": False}
    }
    (clip,) = (each for each in choose("tlcm", [], weights) if each.name == "clip")
    assert clip.models["clip"].model == "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    assert clip.models["clip"].files.folder == weights / "CLIP-ViT-g-14-laion2B-s12B-b42K"


def test_what_cannot_be_chosen(weights: Path, tmp_path: Path) -> None:
    def refused(words: str, *names: str, suite: str | None = None, place: Path = weights) -> UserError:
        with pytest.raises(UserError, match=words) as caught:
            choose(suite, names, place)
        return caught.value

    assert refused("must be one of tcd, tlcm, sdxl", suite="tdc").field == "suite"
    assert refused("did you mean 'pickscore'", "pikscore").field == "metrics"
    assert refused("must be one of", "clip_teacher").field == "metrics"
    assert refused("holds no folder 'ic9600'", "complexity", place=tmp_path).field == "weights"
    assert refused("could not be fetched", "clip:nobody/nothing").field == "weights"
    refused("is not of 'aesthetic'", f"aesthetic:{weights / 'ic9600'}")
    (tmp_path / "inception").mkdir()
    (tmp_path / "inception" / "pt_inception.pth").write_bytes(b"x")
    refused("convert this pickle once", "fid", place=tmp_path)


def test_every_network_is_used_and_named() -> None:
    used = {network for metric in METRICS.values() for network in metric.networks}
    assert used == set(NETWORKS)
