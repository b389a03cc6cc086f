"""Tensors on disk that are more, and in more files, than a process can hold at once."""

from __future__ import annotations

import gc
import os
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.common import mapped_tensors as mapped
from fewstep.common import rng as rng
from fewstep.common.mapped_tensors import MappedRows, map_tensors, open_tensors, write_rows
from fewstep.common.random_streams import generator
from fewstep.common.rng import KeyedRng, order
from fewstep.common.tensors import save_tensors
from fewstep.distillation import batches as samples
from fewstep.distillation import prepare as preparation
from fewstep.distillation.config import resolve

FILES = mapped.MOST_OPEN + 80


@pytest.fixture
def few_files_open() -> Iterator[None]:
    """What a process may open beside what it has open: less than there are files, more than are kept open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mapped._mapped.cache_clear()  # files that other tests left open would be closed on the way
    gc.collect()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + mapped.MOST_OPEN + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rows_of_more_files_than_may_be_open(tmp_path: Path, few_files_open: None) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(FILES)]
    for number, path in enumerate(paths):
        save_tensors(path, {"x": torch.tensor([[2.0 * number], [2.0 * number + 1]])})
    rows = MappedRows([open_tensors(path)["x"] for path in paths])
    assert (len(rows), rows.nbytes) == (2 * FILES, 8 * FILES)
    assert rows[torch.arange(2 * FILES)][:, 0].tolist() == list(range(2 * FILES))
    assert rows[torch.tensor([-1, 0])][:, 0].tolist() == [2 * FILES - 1, 0]
    with pytest.raises(OSError, match="Too many open files"):
        len([map_tensors(path) for path in paths])  # for good: what the limit does to rows that stay open


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for value in (1.0, 2.0):
        save_tensors(tmp_path / "part", {"x": torch.full((1, 1), value)})
        os.replace(tmp_path / "part", path)
        assert float(MappedRows([open_tensors(path)["x"]])[torch.tensor([0])]) == value


def test_rows_that_come_in_parts_are_the_file_that_they_are_whole(tmp_path: Path) -> None:
    """Byte for byte; a part is let go before the next one is made."""
    whole = {"text": torch.randn(5, 3, 2).half(), "a": torch.randn(5, 7).half()}
    seen: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[dict[str, Tensor]]:
        for start in (0, 2, 4):
            assert all(ref() is None for ref in seen[:-2]), "at most one part beside the one that is being made"
            part = {name: rows[start : start + 2].clone() for name, rows in whole.items()}
            seen.extend(weakref.ref(rows) for rows in part.values())
            yield part

    write_rows(tmp_path / "parts", 5, parts())
    save_tensors(tmp_path / "whole", whole)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(AssertionError, match="5 rows written, 6 expected"):
        write_rows(tmp_path / "short", 6, [whole])


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every range in it and in the next one, in the same order."""
    rng._shuffled.cache_clear()
    made: list[int] = []

    def counting(seed: int, purpose: str, sample: int = 0, step: int = 0) -> np.random.Generator:
        made.append(step)
        return generator(seed, purpose, sample, step)

    monkeypatch.setattr(rng, "generator", counting)
    found = np.concatenate([order(7, 10, start, start + 4) for start in range(0, 20, 4)])
    assert made == [0, 1]
    wanted = np.concatenate([generator(7, "order", step=epoch).permutation(10) for epoch in (0, 1)])
    assert found.tolist() == wanted.tolist()
    order(7, 10, 0, 3)[0] = 5  # its own copy
    assert order(7, 10, 0, 3).tolist() == wanted[:3].tolist()


def test_one_entry_of_a_row_is_read_alone(tmp_path: Path) -> None:
    trajectories = torch.arange(2 * 3 * 5.0).reshape(6, 5, 1).half()
    for number in range(2):
        save_tensors(tmp_path / f"{number}.safetensors", {"x": trajectories[3 * number : 3 * number + 3]})
    rows = MappedRows([open_tensors(tmp_path / f"{number}.safetensors")["x"] for number in range(2)])
    items, index = torch.tensor([5, 0, 3, -1]), torch.tensor([4, 0, 2, 1])
    found = rows.at(items, index)
    assert found.dtype == torch.float16
    assert torch.equal(found, trajectories[items, index])
    with pytest.raises(IndexError):
        rows.at(items, index + 1)


def test_a_step_reads_only_its_points_of_stored_trajectories(
    tiny_overrides: list[str], tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two points of each, in the type they are stored in until they are on the device."""
    words = [*tiny_overrides, "data.trajectories=6", "method.grid=10", "method.k=9", "sampling.grid=10"]
    run = preparation.prepare(resolve("kd", None, words), tiny_cache, torch.device("cpu"))
    numbers = np.array([4, 0, 5])
    held, whole = run.data.latents, MappedRows.__getitem__
    assert isinstance(held, MappedRows)
    trajectories = held[torch.from_numpy(numbers)]
    went: list[tuple[tuple[int, ...], torch.dtype]] = []

    def sent(tensor: Tensor, device: torch.device) -> Tensor:
        went.append((tuple(tensor.shape), tensor.dtype))
        return tensor.to(device)

    def rows(self: MappedRows, wanted: Tensor) -> Tensor:
        assert self is not held, "whole trajectories are read"
        return whole(self, wanted)

    monkeypatch.setattr(samples, "copy_async", sent)
    monkeypatch.setattr(MappedRows, "__getitem__", rows)
    stored = samples.fetch_of(run)(numbers, KeyedRng(0, 0, (0, 1, 2)))["sample"].stored
    for index, point in ((stored.times.index_nk, stored.x_nk), (stored.times.index_n, stored.x_n)):
        assert torch.equal(point, trajectories[torch.arange(3), index + 1].float())
    assert went == [((3, 4, 8, 8), torch.float16)] * 2
