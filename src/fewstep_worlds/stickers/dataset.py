"""Scenes of index ranges, drawn by worker processes while a network trains."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from fewstep_worlds.stickers.draw import Picture, draw_scene
from fewstep_worlds.stickers.prompts import training_prompt
from fewstep_worlds.stickers.scene import SIDE, Scene, make_scene
from fewstep_worlds.stickers.sprites import load_sprites, sprite_folder
from fewstep_worlds.stickers.vocabulary import STYLES

Result = TypeVar("Result")

TRAINING_SEED = 0
READER_SEED = 2
REWARD_SEED = 3
REFERENCE_SEED = 1
"""Seed of unseen scenes: references of distances, and validation."""


def draw_scenes(seed: int, indices: Iterable[int], split: str = "train", folder: Path | None = None) -> Picture:
    """Return the pictures of scenes, uint8 [N, 64, 64, 3].

    Raises:
        UserError: the sprite sheets cannot be read.
    """
    return draw_all((make_scene(seed, int(index), split) for index in indices), folder)


def draw_all(scenes: Iterable[Scene], folder: Path | None = None) -> Picture:
    """Return the pictures of given scenes, uint8 [N, 64, 64, 3].

    Raises:
        UserError: the sprite sheets cannot be read.
    """
    sprites = load_sprites(folder or sprite_folder())
    pictures = [draw_scene(scene, sprites) for scene in scenes]
    return np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def make_scenes(seed: int, indices: Iterable[int], split: str = "train") -> list[Scene]:
    """Return the facts of scenes."""
    return [make_scene(seed, int(index), split) for index in indices]


def draw_training_scenes(seed: int, indices: np.ndarray, folder: Path) -> Picture:
    """Return the pictures of training scenes, uint8 [N, 64, 64, 3]."""
    return draw_scenes(seed, indices, folder=folder)


def draw_captioned(seed: int, indices: np.ndarray, folder: Path) -> tuple[Picture, list[str]]:
    """Return the pictures of training scenes, uint8 [N, 64, 64, 3], and an English prompt of each."""
    prompts = [training_prompt(make_scene(seed, index), seed, index) for index in indices.tolist()]
    return draw_scenes(seed, indices, folder=folder), [prompt.text for prompt in prompts if prompt]


def fingerprint(folder: Path | None = None) -> str:
    """Return a SHA-256 of the sprite sheets and of the first pictures that are drawn from them."""
    folder = folder or sprite_folder()
    digest = hashlib.sha256(draw_scenes(REFERENCE_SEED, range(16), folder=folder).tobytes())
    for style in STYLES:
        digest.update((folder / f"{style}.webp").read_bytes())
    return digest.hexdigest()


def _follow_parent() -> None:
    """Make a worker process leave signals of the terminal to its parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


@dataclass(frozen=True)
class ScenePictures:
    """The first training scenes as a `fewstep.data.images.PictureSet`, drawn when they are used."""

    count: int
    size: int = SIDE

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int] | np.ndarray) -> Picture:
        """Return the pictures of some scenes, uint8 [N, 64, 64, 3]."""
        return draw_scenes(TRAINING_SEED, rows)

    def identities(self) -> list[bytes]:
        """Return a SHA-256 for each scene, of the sheets and its number."""
        drawn_from = fingerprint()
        return [hashlib.sha256(f"{drawn_from} {TRAINING_SEED} {row}".encode()).digest() for row in range(self.count)]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the sheets and the number of scenes."""
        return hashlib.sha256(f"{fingerprint()} {TRAINING_SEED} {self.count}".encode()).hexdigest()


class SceneWorkers:
    """Worker processes that draw training scenes; with none, the caller's own process draws.

    `with SceneWorkers(workers, seed) as scenes:` ends them.
    """

    def __init__(self, workers: int, seed: int = TRAINING_SEED, folder: Path | None = None) -> None:
        self.seed = seed
        self.folder = folder or sprite_folder()
        load_sprites(self.folder)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _follow_parent) if workers else None
        self._workers = workers

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Picture:
        """Return the pictures of training scenes, uint8 [N, 64, 64, 3]."""
        return np.concatenate(self.run(draw_training_scenes, indices))

    def captioned(self, indices: Sequence[int] | np.ndarray) -> tuple[Picture, list[str]]:
        """Return the pictures of training scenes, uint8 [N, 64, 64, 3], and an English prompt of each."""
        pictures, prompts = zip(*self.run(draw_captioned, indices), strict=True)
        return np.concatenate(pictures), [prompt for part in prompts for prompt in part]

    def run(self, job: Callable[[int, np.ndarray, Path], Result], indices: Sequence[int] | np.ndarray) -> list[Result]:
        """Return the results of a module's function (seed, indices, folder) on equal parts of the indices, in order."""
        parts = [part for part in np.array_split(np.asarray(indices), self._workers or 1) if len(part)]
        if self._pool is None:
            return [job(self.seed, part, self.folder) for part in parts]
        return list(self._pool.map(job, [self.seed] * len(parts), parts, [self.folder] * len(parts)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
