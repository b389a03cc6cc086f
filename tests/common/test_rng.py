"""KeyedRng depend on (seed, purpose, step, sample) and on nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng, order


def everything(rng: KeyedRng) -> dict[str, Tensor]:
    return {
        "normal": rng.normal("noise", (2, 3)),
        "uniform": rng.uniform("omega", 2.0, 14.0),
        "integers": rng.integers("n", 0, 50),
        "chance": rng.chance("drop", 0.5),
    }


INDICES = tuple(range(8))


def test_rows_do_not_depend_on_who_draws_them() -> None:
    """All at once; in micro-batches; dealt out to two ranks; backwards; one by one."""
    whole = everything(KeyedRng(7, 3, INDICES))
    for pieces in (
        [INDICES[:3], INDICES[3:]],
        [INDICES[:4], INDICES[4:]],
        [INDICES[0::2], INDICES[1::2]],
        [INDICES[::-1]],
        [(i,) for i in INDICES],
    ):
        for indices in pieces:
            for name, value in everything(KeyedRng(7, 3, tuple(indices))).items():
                assert torch.equal(value, whole[name][list(indices)]), (name, indices)


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    rng = KeyedRng(7, 3, INDICES)
    first = everything(rng)
    for _ in range(3):
        rng.normal("something else", (5,))
    torch.manual_seed(99)
    np.random.seed(99)
    again = everything(rng)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_global_randomness_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    everything(KeyedRng(7, 3, INDICES))
    order(0, 10, 0, 25)
    assert torch.equal(torch.random.get_rng_state(), before)


def normals(seed: int = 7, step: int = 3, purpose: str = "noise", indices: tuple[int, ...] = INDICES) -> Tensor:
    return KeyedRng(seed, step, indices).normal(purpose, (64,))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"step": 4},
        {"purpose": "Noise"},
        {"indices": tuple(range(8, 16))},
        {"seed": 3, "step": 7},
        {"indices": tuple(i + 2**33 for i in INDICES)},
        {"step": 3 + 2**33},
    ],
)
def test_streams_of_other_seeds_steps_purposes_and_samples_share_nothing(other: dict[str, Any]) -> None:
    a, b = normals(), normals(**other)
    assert not set(a.flatten().tolist()) & set(b.flatten().tolist())
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.15


def test_sample_and_step_are_not_interchangeable() -> None:
    a = generator(0, "noise", sample=1, step=2).standard_normal(16)
    b = generator(0, "noise", sample=2, step=1).standard_normal(16)
    assert not set(a) & set(b)


def test_neighbouring_streams_do_not_overlap() -> None:
    """The counter's low words are the stream's own: no number of sample 0 comes back in sample 1."""
    a = generator(0, "noise", sample=0).integers(0, 2**63, 20_000)
    b = generator(0, "noise", sample=1).integers(0, 2**63, 20_000)
    assert not set(a.tolist()) & set(b.tolist())


def test_a_known_stream_stays_what_it_is() -> None:
    """A resumed run needs the numbers of the run before, also from a later version of the project."""
    assert KeyedRng(7, 3, (5,)).integers("n", 0, 1_000_000).item() == 513322
    assert KeyedRng(7, 3, (5,)).uniform("s").item() == pytest.approx(0.8680554816906337, abs=1e-15)
    assert order(0, 7, 0, 7).tolist() == [6, 5, 3, 4, 0, 1, 2]


def test_shapes_and_types() -> None:
    drawn = everything(KeyedRng(0, 0, INDICES))
    assert (drawn["normal"].shape, drawn["normal"].dtype) == ((8, 2, 3), torch.float32)
    assert (drawn["uniform"].shape, drawn["uniform"].dtype) == ((8,), torch.float64)
    assert (drawn["integers"].shape, drawn["integers"].dtype) == ((8,), torch.int64)
    assert (drawn["chance"].shape, drawn["chance"].dtype) == ((8,), torch.bool)


def test_statistics() -> None:
    """Across samples, where every row is a stream of its own; bounds are four standard errors."""
    rng = KeyedRng(1, 0, tuple(range(4000)))
    z = rng.normal("noise", (25,)).double()
    n = z.numel()
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5
    column = z[:, 0]
    assert abs(float((column[:-1] * column[1:]).mean())) < 4 / 4000**0.5
    u = rng.uniform("omega", 2.0, 14.0)
    assert bool(((u >= 2) & (u < 14)).all())
    assert float(u.mean()) == pytest.approx(8, abs=4 * 12 / 12**0.5 / 4000**0.5)
    k = torch.bincount(rng.integers("n", 0, 50), minlength=50).double()
    assert len(k) == 50
    assert float(((k - 80) ** 2 / 80).sum()) < 49 + 4 * (2 * 49) ** 0.5
    share = float(rng.chance("drop", 0.1).double().mean())
    assert share == pytest.approx(0.1, abs=4 * (0.09 / 4000) ** 0.5)
    assert not bool(rng.chance("drop", 0.0).any())
    assert bool(rng.chance("drop", 1.0).all())


def test_order_is_a_fresh_permutation_each_epoch() -> None:
    epochs = [order(3, 97, 97 * e, 97 * (e + 1)) for e in range(5)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(97))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    assert order(4, 97, 0, 97).tolist() != epochs[0].tolist()
    assert epochs[0].tolist() != list(range(97))


def test_slices_of_the_order_agree() -> None:
    whole = order(3, 10, 0, 57)
    assert whole.dtype == np.int64
    for start in range(57):
        for stop in (start, start + 1, min(start + 13, 57), 57):
            assert order(3, 10, start, stop).tolist() == whole[start:stop].tolist()


def test_a_batch_larger_than_the_set_runs_through_epochs() -> None:
    assert order(0, 1, 0, 4).tolist() == [0, 0, 0, 0]
    assert sorted(order(0, 3, 0, 9).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
