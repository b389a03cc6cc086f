"""How far each standard metric is from its reference implementation: `python benchmarks/metric_differences.py`.

Tiny random networks of the real classes (Inception and ICNet whole). Prints a Markdown table: the largest difference as
a share of the reference's largest number, with networks in fp32 as `fewstep evaluate` runs them, and in fp64.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.diversity import pairwise_distance
from fewstep.evaluation.evaluate import Reference, TeacherPictures, evaluate_pictures
from fewstep.evaluation.metric import TO_TEACHER, Metric, Pictures
from fewstep.evaluation.standard.inception import InceptionFrechet
from fewstep.evaluation.standard.loader import Loader, load_metrics
from fewstep.evaluation.standard.registry import choose
from support import standard_references as standard

REFERENCES = {
    "clip": "transformers' CLIPModel, Pillow's bicubic",
    "aesthetic": "the published program's layers on transformers' CLIPModel",
    "pickscore": "transformers' CLIPModel, Pillow's bicubic",
    "hpsv2": "open_clip's formula, its own padding",
    "image_reward": "the published formula (BLIP)",
    "complexity": "ICNet's layers, Pillow's bilinear",
}
SET = 12
"""Pictures of a set for FID and KID."""
Row = tuple[str, str, int, float, float | None]
"""Metric, reference, pictures, difference in fp32, and in fp64 (None where the reference is in fp32 itself)."""


def metric_of(name: str, weights: Path) -> Metric:
    """Return a metric on networks of its own."""
    (metric,) = load_metrics(choose(None, [name], weights), Loader(torch.device("cpu"))).metrics
    return metric


def share(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, as a share of the largest number expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def score_rows(weights: Path) -> Iterator[Row]:
    """Yield the metrics of single pictures."""
    for name, scores in standard.SCORES.items():
        own = {"complexity": standard.some(2), "hpsv2": standard.some()}
        pictures = own.get(name, standard.some(3, 42, 42))
        expected = scores(weights, pictures).numpy()
        metrics = metric_of(name, weights), standard.in_double(metric_of(name, weights))
        narrow, wide = (share(metric.features(pictures, standard.PROMPTS), expected) for metric in metrics)
        yield name, REFERENCES[name], len(pictures), narrow, wide


def fid_of(name: str, weights: Path, ours: Pictures, theirs: Pictures) -> float:
    """Return a Frechet distance of few pictures; `..._teacher` compares with the teacher's pictures."""
    metric = metric_of(name.removesuffix("_teacher"), weights)
    assert isinstance(metric, InceptionFrechet)
    metric.fewest = 2
    to_teacher = name.endswith("_teacher")
    own = {"teacher": TeacherPictures(other=theirs)} if to_teacher else {"reference": Reference(theirs)}
    figures = evaluate_pictures(ours, [""] * len(ours), [metric], **own)  # type: ignore[arg-type]
    return figures[metric.identity.name + TO_TEACHER * to_teacher].value


def inception_rows(weights: Path, folder: Path) -> Iterator[Row]:
    """Yield the distances of sets, and diversity."""
    ours, theirs = standard.some(SET, 64, 64), standard.some(SET, 64, 64, seed=1)
    own_fid, own_kid = standard.torch_fidelitys_numbers(weights, ours, theirs, folder)
    legacy = fid_of("fid_legacy", weights, ours, theirs)
    yield "fid_legacy", "torch-fidelity's own number", SET, abs(legacy / own_fid - 1), None
    kid = metric_of("kid_legacy", weights)
    found = evaluate_pictures(ours, [""] * SET, [kid], Reference(theirs))[kid.identity.name].value
    yield "kid_legacy", "torch-fidelity's own number (fp32 kernel)", SET, abs(found / own_kid - 1), None
    network = standard.torch_fidelitys(weights)

    def features(pictures: Pictures, resize: str) -> torch.Tensor:
        return standard.inception_features(network, pictures, resize)

    clean = features(ours, "clean")
    large = [standard.some(SET, 320, 330, seed) for seed in (2, 3)]
    other = features(theirs, "clean")
    found = evaluate_pictures(ours, [""] * SET, [metric_of("kid", weights)], Reference(theirs))["KID"].value
    yield "kid", "its formula in fp64, torch-fidelity's network", SET, abs(found / standard.mmd(clean, other) - 1), None
    expected = standard.torch_fidelitys_fid(clean, other)
    words = "torch-fidelity's network and distance"
    for name in ("fid", "fid_teacher"):
        found = fid_of(name, weights, ours, theirs)
        yield name, f"clean-fid's resize, {words}", SET, abs(found / expected - 1), None
    expected = standard.torch_fidelitys_fid(*(features(each, "patch") for each in large))
    found = fid_of("patch_fid", weights, large[0], large[1])
    yield "patch_fid", f"middle 299 pixels, {words}", SET, abs(found / expected - 1), None
    rows = clean.double().numpy().reshape(3, 4, -1)
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    expected_of = np.array([np.mean([1 - each[i] @ each[j] for i, j in pairs]) for each in unit])
    found_of = pairwise_distance(metric_of("fid", weights).features(ours, ()).reshape(3, 4, -1))
    yield "diversity", "its formula, pair by pair", SET, share(found_of, expected_of), None


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        weights = standard.write_weights(Path(folder))
        print(f"commit {commit()}; {hardware()}\n")
        print("| metric | reference | pictures | in fp32 | in fp64 |\n| --- | --- | --- | --- | --- |")
        for name, reference, n, narrow, wide in chain(score_rows(weights), inception_rows(weights, Path(folder))):
            last = "" if wide is None else f"{wide:.1e}"
            print(f"| `{name}` | {reference} | {n} | {narrow:.1e} | {last} |", flush=True)


if __name__ == "__main__":
    main()
