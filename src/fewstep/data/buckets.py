"""Pictures that keep their aspect ratio: each is cropped to the nearest of a few shapes of one area (SDXL's buckets).

A batch is of one shape, so that it can be one tensor; an epoch visits every picture in batches that are drawn anew.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.pipeline_folder import check_side
from fewstep.common.errors import UserError
from fewstep.common.mapped_tensors import Rows
from fewstep.common.rng import generator
from fewstep.data.images import Captioned, PictureFiles, read_cropped, size_of

Shape = tuple[int, int]
"""(width, height) in pixels."""
WIDEST = 2.0
"""The largest aspect ratio of a bucket."""


def bucket_shapes(size: int, unit: int, widest: float = WIDEST) -> list[Shape]:
    """Shapes of about size x size pixels, sides multiples of `unit`, from the tallest to the widest.

    Raises:
        UserError: `size` is no multiple of `unit`.
    """
    check_side("data.size", size, unit)
    shapes = set()
    for width in range(unit, int(size * math.sqrt(widest)) + unit, unit):
        height = max(unit, round(size * size / width / unit) * unit)
        if max(width / height, height / width) <= widest:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape))


def nearest_shape(width: int, height: int, shapes: Sequence[Shape]) -> int:
    """The number of the shape whose aspect ratio is nearest, in logarithms."""
    return min(range(len(shapes)), key=lambda i: abs(math.log(width * shapes[i][1] / (height * shapes[i][0]))))


@dataclass(frozen=True)
class BucketedFiles(PictureFiles):
    """Pictures on disk, each with a shape of its own.

    Where all must be alike (the quality watch) they are read as squares, as any `PictureFiles`.

    Attributes:
        shapes: of the buckets.
        of: number of each picture's shape.
    """

    shapes: tuple[Shape, ...] = ()
    of: tuple[int, ...] = ()

    def read_shaped(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some pictures of one shape, uint8 [n, height, width, 3].

        Raises:
            UserError: one is no whole picture.
        """
        with ThreadPoolExecutor() as pool:
            read = pool.map(lambda row: read_cropped(self.files[int(row)], *self.shapes[self.of[int(row)]]), rows)
            return np.stack(list(read))

    def groups(self) -> list[list[int]]:
        """The pictures of each shape that has any."""
        by_shape: dict[int, list[int]] = {}
        for row, shape in enumerate(self.of):
            by_shape.setdefault(shape, []).append(row)
        return [by_shape[shape] for shape in sorted(by_shape)]

    def fingerprint(self) -> str:
        """sha256 of the shapes and of the files' bytes."""
        return hashlib.sha256(f"{super().fingerprint()} {self.shapes} {self.of}".encode()).hexdigest()


def filled(ratios: Sequence[Shape], shapes: Sequence[Shape], least: int) -> list[int]:
    """The nearest shape of each picture among those that hold at least so many; the fullest one where none does.

    A bucket that cannot fill a batch would be seen too often: its batches are filled up by its own pictures.
    """
    of = [nearest_shape(*ratio, shapes) for ratio in ratios]
    counts = Counter(of)
    kept = sorted(shape for shape, count in counts.items() if count >= least) or [counts.most_common(1)[0][0]]
    return [kept[nearest_shape(*ratio, [shapes[shape] for shape in kept])] for ratio in ratios]


def bucketed(captioned: Captioned, size: int, unit: int, least: int = 1) -> Captioned:
    """The same pictures, sorted into buckets by their files' own sizes.

    Args:
        size: pixels a side of a square of every bucket's area.
        unit: what sides are multiples of.
        least: pictures that a bucket must hold; those of smaller ones go to the nearest that does.

    Raises:
        UserError: pictures that are no files.
    """
    files = captioned.pictures
    if not isinstance(files, PictureFiles):
        raise UserError("data.buckets = True wants a folder of pictures in data.source; the nearest is False")
    shapes = bucket_shapes(size, unit)
    of = tuple(filled([size_of(file) for file in files.files], shapes, least))
    return Captioned(BucketedFiles(files.files, size, tuple(shapes), of), captioned.captions, captioned.left_out)


class BucketedLatents:
    """Latents of several shapes, asked for by batches of one shape.

    Attributes:
        parts: rows [C, h, w] of each bucket that holds any.
        group: the bucket of each item, int64 [N].
    """

    def __init__(self, parts: Sequence[Rows], rows: Sequence[Sequence[int]]) -> None:
        count = sum(len(part) for part in parts)
        self.parts = list(parts)
        self.group, self._place = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        for number, items in enumerate(rows):
            where = torch.as_tensor(list(items), dtype=torch.int64)
            self.group[where] = number
            self._place[where] = torch.arange(len(where))

    def __len__(self) -> int:
        return len(self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of all buckets."""
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, items: Tensor) -> Tensor:
        """The latents of items of one bucket, [b, C, h, w]."""
        groups = set(self.group[items].tolist())
        if len(groups) != 1:
            raise ValueError(f"items of {len(groups)} shapes cannot be one batch")
        chosen: Tensor = self.parts[groups.pop()][self._place[items]]
        return chosen

    def order(self, seed: int, batch: int) -> Callable[[int, int], np.ndarray]:
        """As `shape_order`, of these latents."""
        group = self.group.numpy()
        return shape_order([np.flatnonzero(group == number) for number in range(len(self.parts))], seed, batch)


def shape_order(
    members: Sequence[Sequence[int] | np.ndarray], seed: int, batch: int
) -> Callable[[int, int], np.ndarray]:
    """As `rng.order`, in batches of one shape each: (start, stop) -> items.

    Each bucket is shuffled and filled up to whole batches by its own first items; then the batches are shuffled.

    Args:
        members: the items of each bucket, in rising order.
    """
    length = sum(-(-len(own) // batch) for own in members) * batch

    @lru_cache(maxsize=2)  # batches are asked for one by one, and may lie across two epochs
    def epoch(number: int) -> np.ndarray:
        draw = generator(seed, "order", step=number)
        batches = []
        for own in members:
            shuffled = draw.permutation(np.asarray(own))
            short = -len(shuffled) % batch
            batches.append(np.resize(shuffled, len(shuffled) + short).reshape(-1, batch))
        every = np.concatenate(batches)
        ordered: np.ndarray = every[draw.permutation(len(every))].reshape(-1)
        return ordered

    def items(start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        found = np.empty_like(positions)
        for number in np.unique(positions // length):
            chosen = positions // length == number
            found[chosen] = epoch(int(number))[positions[chosen] % length]
        return found

    return items
