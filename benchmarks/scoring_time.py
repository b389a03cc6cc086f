"""How long 1,000 pictures take to score: every figure of the benchmark's table, features and intervals included.

Usage: python benchmarks/scoring_time.py [pictures]

The pictures are real ones with a little noise, each new to the cache; those of the teacher, and the real ones, are
scored beforehand, as they are in a benchmark, where all rows share them.
"""

from __future__ import annotations

from fewstep.common.threads import limit_spinning

limit_spinning()  # before torch

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fewstep.common.defaults import world
from fewstep.common.provenance import commit, hardware
from fewstep.evaluation.evaluate import TeacherPictures, evaluate_pictures
from fewstep_worlds.studies.comparison import Comparison


def noised(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Pictures that are in no cache."""
    noise = np.random.default_rng(seed).normal(0, 4, pictures.shape)
    return (pictures + noise).clip(0, 255).round().astype(np.uint8)


def main() -> None:
    """Score three sets and print the median."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    prompts = world().read_prompts("benchmark")[:count]
    with tempfile.TemporaryDirectory() as cache:
        judge = Comparison(prompts, Path(cache))
        real = judge.reference.some(count)
        teacher = TeacherPictures(noised(real, 1), noised(real, 2))
        evaluate_pictures(teacher.same, prompts, judge.metrics, judge.reference, teacher)
        times = []
        for seed in (3, 4, 5):
            pictures = noised(real, seed)
            start = time.perf_counter()
            figures = evaluate_pictures(pictures, prompts, judge.metrics, judge.reference, teacher)
            times.append(time.perf_counter() - start)
    print(f"commit {commit()}; {hardware()}")
    print(
        f"{len(figures)} figures of {count} pictures: median {sorted(times)[1]:.1f} s of {[round(t, 1) for t in times]}"
    )


if __name__ == "__main__":
    main()
