"""Each standard metric against the formula of its reference implementation, on random weights of the real classes."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.common.errors import UserError
from fewstep.common.files import sha256
from fewstep.evaluation.evaluate import Reference, evaluate_pictures
from fewstep.evaluation.features import Features
from fewstep.evaluation.kid import KernelDistance
from fewstep.evaluation.metric import Identity, Metric
from fewstep.evaluation.standard import inception
from fewstep.evaluation.standard.loader import Loader, load_metrics
from fewstep.evaluation.standard.pixels import framed
from fewstep.evaluation.standard.registry import METRICS, NETWORKS, SUITES, choose
from fewstep.scorers.preprocess import Framing
from support import metric_references as reference
from support import standard_references as standard
from support.standard_references import PROMPTS, some

needs_inception = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights as the guide describes it."""
    return standard.write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def loader() -> Loader:
    return Loader(torch.device("cpu"))


def loaded(weights: Path, loader: Loader, *names: str) -> list[Metric]:
    return load_metrics(choose(None, names, weights), loader).metrics


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
    expected = standard.padded(pictures, 28)
    torch.testing.assert_close(framed(pictures, Framing(28, "pad")).double(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- Inception


@needs_inception
def test_features_are_torch_fidelitys(weights: Path, loader: Loader) -> None:
    network = standard.torch_fidelitys(weights)
    pictures = some(2, 64, 48)
    expected = standard.inception_features(network, pictures)
    (metric,) = loaded(weights, loader, "fid_legacy")
    found = metric.features(pictures, ())
    assert found.shape == (2, 2048)
    assert np.abs(expected.numpy()).mean() > 1e-3
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    (clean,) = loaded(weights, loader, "fid")
    resized = clean.features(pictures, ())
    assert np.abs(resized - found).max() > 1e-3, "another resize"
    expected = standard.inception_features(network, pictures, "clean")
    np.testing.assert_allclose(resized, expected.numpy(), rtol=1e-5, atol=1e-6)


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
    expected, kernel = standard.torch_fidelitys_numbers(weights, ours, theirs, tmp_path)
    fid, kid = loaded(weights, loader, "fid_legacy", "kid_legacy")
    assert isinstance(fid, inception.InceptionFrechet)
    fid.fewest = 2
    found = evaluate_pictures(ours, [""] * 24, [fid, kid], Reference(theirs))
    assert found["FID, legacy resize"].value == pytest.approx(expected, rel=1e-5)
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "complexity" else name for name in standard.SCORES],
)
def test_scores_are_the_references(weights: Path, name: str) -> None:
    """Of its model, weights and preprocessing, in fp64."""
    pictures = {"complexity": some(2), "hpsv2": some()}.get(name, some(3, 42, 42))
    (metric,) = loaded(weights, Loader(torch.device("cpu")), name)
    standard.in_double(metric)
    expected, found = standard.SCORES[name](weights, pictures).numpy(), metric.features(pictures, PROMPTS)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)
    assert np.ptp(expected) > 1e-4 * largest
    assert metric.reduce(found, None, 0).value == pytest.approx(float(expected.mean()), abs=1e-6 * largest)


def test_the_aesthetic_record_names_the_published_file(weights: Path, loader: Loader) -> None:
    (metric,) = loaded(weights, loader, "aesthetic")
    assert "sac.pth, sha256 0123456789abcdef" in metric.identity.backbone


def test_the_aesthetic_predictor_refuses_another_clip(weights: Path, loader: Loader, tmp_path: Path) -> None:
    reference.write(tmp_path / "aesthetic", reference.aesthetic_state(17))
    (metric,) = loaded(weights, loader, f"aesthetic:{tmp_path / 'aesthetic'}")
    with pytest.raises(UserError, match="embeddings of 17 numbers, the CLIP network has 16"):
        metric.features(some(), ())


def test_scores_are_of_each_picture_with_its_own_prompt(weights: Path, loader: Loader) -> None:
    pictures = some()
    for name in ("clip", "pickscore", "hpsv2", "image_reward", "mps"):
        (metric,) = loaded(weights, Loader(torch.device("cpu")), name)
        together = metric.features(pictures, PROMPTS)
        apart = [metric.features(pictures[row : row + 1], [PROMPTS[row]])[0] for row in range(3)]
        np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
        assert np.abs(together - metric.features(pictures, PROMPTS[::-1]))[[0, 2]].min() > 1e-4


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
    assert refused("networks of complexity;", "complexity", place=tmp_path).field == "weights"
    assert refused("networks of clip:nobody/nothing;", "clip:nobody/nothing").field == "weights"
    refused("is not of 'aesthetic'", f"aesthetic:{weights / 'ic9600'}")
    (tmp_path / "inception").mkdir()
    (tmp_path / "inception" / "pt_inception.pth").write_bytes(b"x")
    refused("convert this pickle once", "fid", place=tmp_path)


def test_every_network_is_used_and_named() -> None:
    used = {network for metric in METRICS.values() for network in metric.networks}
    assert used == set(NETWORKS)
