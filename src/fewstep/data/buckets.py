"""Aspect ratio buckets (as SDXL's): each picture is cropped to the best-fitting of a few shapes of one area.

A batch has one shape, so that it is one tensor; batches are drawn anew in each epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.pipeline_folder import check_side
from fewstep.common.mapped_tensors import Rows
from fewstep.common.random_streams import generator
from fewstep.common.rng import endless
from fewstep.data.images import Captioned, PictureFiles, read_picture, size_of

Shape = tuple[int, int]
"""(width, height) in pixels."""
WIDEST = 2.0
"""The largest aspect ratio of a bucket."""


def bucket_shapes(size: int, unit: int) -> list[Shape]:
    """Return shapes of about size x size pixels, sides multiples of `unit`, from the tallest to the widest.

    Raises:
        UserError: `size` is no multiple of `unit`.
    """
    check_side("data.size", size, unit)
    shapes = set()
    for width in range(unit, int(size * math.sqrt(WIDEST)) + unit, unit):
        height = max(unit, round(size * size / width / unit) * unit)
        if max(width / height, height / width) <= WIDEST:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape))


def nearest_shape(width: int, height: int, shapes: Sequence[Shape]) -> int:
    """Return the number of the shape whose log aspect ratio is nearest."""
    return min(range(len(shapes)), key=lambda i: abs(math.log(width * shapes[i][1] / (height * shapes[i][0]))))


@dataclass(frozen=True)
class BucketedFiles(PictureFiles):
    """Pictures on disk, each cropped to its bucket's shape by `read_shaped`, or to a square by `read`.

    Attributes:
        shapes: of the buckets.
        of: number of each picture's shape.
    """

    shapes: tuple[Shape, ...] = ()
    of: tuple[int, ...] = ()

    def read_shaped(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return some pictures of one shape, uint8 [n, height, width, 3].

        Raises:
            UserError: a picture is broken.
        """
        with ThreadPoolExecutor() as pool:
            read = pool.map(lambda row: read_picture(self.files[int(row)], *self.shapes[self.of[int(row)]]), rows)
            return np.stack(list(read))

    def groups(self) -> list[list[int]]:
        """Return the pictures of each shape that has any."""
        by_shape: dict[int, list[int]] = {}
        for row, shape in enumerate(self.of):
            by_shape.setdefault(shape, []).append(row)
        return [by_shape[shape] for shape in sorted(by_shape)]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the shapes and of the files' bytes."""
        return hashlib.sha256(f"{super().fingerprint()} {self.shapes} {self.of}".encode()).hexdigest()


def filled(ratios: Sequence[Shape], shapes: Sequence[Shape], least: int) -> list[int]:
    """Return each picture's nearest shape among those with at least so many pictures; the fullest shape if none has.

    Batches are filled up by pictures of their own bucket, so that those of a smaller bucket would be seen too often.
    """
    of = [nearest_shape(*ratio, shapes) for ratio in ratios]
    counts = Counter(of)
    kept = sorted(shape for shape, count in counts.items() if count >= least) or [counts.most_common(1)[0][0]]
    return [kept[nearest_shape(*ratio, [shapes[shape] for shape in kept])] for ratio in ratios]


def bucketed(captioned: Captioned, size: int, unit: int, least: int = 1) -> Captioned:
    """Sort pictures, which must be files, into buckets by their sizes.

    Args:
        size: pixels a side of a square of every bucket's area.
        unit: divisor of all sides.
        least: fewest pictures of a bucket; those of smaller ones join the bucket of nearest shape.

    Raises:
        UserError: `size` is no multiple of `unit`, or a picture is broken.
    """
    files = captioned.pictures
    assert isinstance(files, PictureFiles)
    shapes = bucket_shapes(size, unit)
    of = tuple(filled([size_of(file) for file in files.files], shapes, least))
    return Captioned(BucketedFiles(files.files, size, tuple(shapes), of), captioned.captions, captioned.left_out)


class BucketedLatents:
    """Latents of several shapes, read in batches of one shape (`mapped_tensors.Rows`).

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
        """Return the latents of items of one bucket, [b, C, h, w]."""
        groups = set(self.group[items].tolist())
        if len(groups) != 1:
            raise ValueError(f"items of {len(groups)} shapes cannot be one batch")
        chosen: Tensor = self.parts[groups.pop()][self._place[items]]
        return chosen

    def order(self, seed: int, batch: int) -> Callable[[int, int], np.ndarray]:
        """Return the `shape_order` of these latents."""
        group = self.group.numpy()
        return shape_order([np.flatnonzero(group == number) for number in range(len(self.parts))], seed, batch)


def shape_order(
    members: Sequence[Sequence[int] | np.ndarray], seed: int, batch: int
) -> Callable[[int, int], np.ndarray]:
    """Return the order of visits in batches of one shape, as `rng.order`: (start, stop) -> items.

    Each bucket is shuffled and filled up to whole batches by its own first items; then the batches are shuffled.

    Args:
        members: items of each bucket, in rising order.
    """
    length = sum(-(-len(own) // batch) for own in members) * batch

    @lru_cache(maxsize=2)  # a range may span two epochs
    def epoch(number: int) -> np.ndarray:
        draw = generator(seed, "order", step=number)
        batches = []
        for own in members:
            shuffled = draw.permutation(np.asarray(own))
            short = -len(shuffled) % batch
            batches.append(np.resize(shuffled, len(shuffled) + short).reshape(-1, batch))
        every = np.concatenate(batches)
        return every[draw.permutation(len(every))].reshape(-1)

    return partial(endless, epoch, length)
