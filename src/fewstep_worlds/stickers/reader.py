"""The reader: a network that finds the stickers and the background of a picture, trained on scenes alone.

A map of centres, one channel a concept, is read for peaks (arXiv 1904.07850); colour, pattern and style are classes.
It shares no weights, text or seed with the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.common.config import validate
from fewstep.common.cpu_kernels import speed_up
from fewstep.common.files import atomic_folder, read_json, write_json
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import load_tensors, save_tensors
from fewstep.training.loss import Loss
from fewstep.training.update import Batch, Update
from fewstep_worlds.common.autoencoder import to_tensor
from fewstep_worlds.common.networks import copy_weights
from fewstep_worlds.common.training import ENDLESS, Weights, fit
from fewstep_worlds.stickers.accuracy import scene_accuracy
from fewstep_worlds.stickers.claim import Facts, facts_of, full_claim
from fewstep_worlds.stickers.dataset import (
    READER_SEED,
    REFERENCE_SEED,
    SceneWorkers,
    draw_scenes,
    fingerprint,
    make_scenes,
)
from fewstep_worlds.stickers.scene import SIDE, Scene
from fewstep_worlds.stickers.settings import ReaderConfig
from fewstep_worlds.stickers.vocabulary import COLOURS, NAMES, PATTERNS, STYLES

CELL = 4
"""Edge of a cell of the map, in pixels."""
CELLS = SIDE // CELL
SPREAD = 0.8
"""Standard deviation of a centre's target in the map, in cells."""
PEAK = 0.4
"""Smallest value of a centre."""
CLASSES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "pattern": PATTERNS, "style": STYLES}
WEIGHTS = "reader.safetensors"
VALIDATION_SCENES = 1000
"""Unseen scenes of a validation."""


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of x, [B, C, h, w]."""
        result: Tensor = x + self.body(x)
        return result


class Reader(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits: `heat` [B, concepts, 16, 16] and one row for each of `CLASSES`.

    `offset` [B, 2, 16, 16] is where in its cell a centre lies, (x, y) in cells.
    """

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.channels

        def blocks(channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(Residual(channels, config.groups) for _ in range(count)))

        self.fine = nn.Sequential(nn.Conv2d(3, fine, 4, 2, 1), blocks(fine, config.blocks[0]))
        self.middle = nn.Sequential(nn.Conv2d(fine, middle, 3, 2, 1), blocks(middle, config.blocks[1]))
        self.coarse = nn.Sequential(nn.Conv2d(middle, coarse, 3, 2, 1), blocks(coarse, config.blocks[2]))
        self.up = nn.Conv2d(coarse, middle, 1)
        self.joined = nn.Sequential(blocks(middle, 1), nn.GroupNorm(config.groups, middle), nn.SiLU())
        self.heat = nn.Conv2d(middle, len(NAMES), 1)
        self.offset = nn.Conv2d(middle, 2, 1)
        self.classes = nn.ModuleDict({name: nn.Linear(2 * middle, len(of)) for name, of in CLASSES.items()})
        nn.init.constant_(self.heat.bias, -5.0)  # type: ignore[arg-type]  # centres are rare

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the outputs that the class describes."""
        middle = self.middle(self.fine(pictures))
        wide = self.joined(middle + F.interpolate(self.up(self.coarse(middle)), scale_factor=2.0))
        pooled = torch.cat([wide.mean((2, 3)), wide.amax((2, 3))], 1)
        result = {"heat": self.heat(wide), "offset": self.offset(wide)}
        return result | {name: head(pooled) for name, head in self.classes.items()}


def make_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return the outputs that a reader is trained towards: `heat` and `offset` as in `Reader`, classes as int64 [B].

    `offset` is NaN where no centre lies.
    """
    heat = np.zeros((len(scenes), len(NAMES), CELLS, CELLS), np.float32)
    offset = np.full((len(scenes), 2, CELLS, CELLS), np.nan, np.float32)
    rows, columns = np.mgrid[:CELLS, :CELLS]
    for number, scene in enumerate(scenes):
        for sticker in scene.stickers:
            x, y = sticker.x / CELL, sticker.y / CELL
            column, row = int(x), int(y)
            bump = np.exp(-((columns - column) ** 2 + (rows - row) ** 2) / (2 * SPREAD**2))
            channel = heat[number, NAMES.index(sticker.concept)]
            np.maximum(channel, bump, out=channel)
            offset[number, :, row, column] = x - column, y - row
    facts = [facts_of(scene) for scene in scenes]
    classes = {name: torch.tensor([of.index(getattr(fact, name)) for fact in facts]) for name, of in CLASSES.items()}
    return {"heat": torch.from_numpy(heat), "offset": torch.from_numpy(offset), **classes}


def reader_loss(found: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Loss:
    """Return the penalty-reduced focal loss of centres (arXiv 1904.07850, eq. 1), offset error and cross-entropies."""
    heat, wanted = found["heat"].float(), targets["heat"]
    centre = wanted == 1
    chance = heat.sigmoid()
    hit = (1 - chance).square() * F.logsigmoid(heat)
    miss = (1 - wanted).pow(4) * chance.square() * F.logsigmoid(-heat)
    centres = -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)
    known = ~targets["offset"].isnan()
    offsets = (found["offset"].float() - targets["offset"])[known].abs().mean()
    classes = {name: F.cross_entropy(found[name].float(), targets[name]) for name in CLASSES}
    value = centres + 0.2 * offsets + torch.stack(list(classes.values())).sum()
    return Loss(value, scalars={"centres": centres, "offsets": offsets, **classes})


def decode(found: Mapping[str, Tensor]) -> list[Facts]:
    """Return the facts of a reader's outputs: a centre is a cell above `PEAK` that none of its 8 neighbours tops."""
    best, concept = found["heat"].float().sigmoid().max(1)
    peaks = (best >= PEAK) & (best == F.max_pool2d(best[:, None], 3, 1, 1)[:, 0])
    classes = {name: found[name].argmax(1).tolist() for name in CLASSES}
    result = []
    for number in range(len(best)):
        places = []
        for row, column in peaks[number].nonzero().tolist():
            x, y = found["offset"][number, :, row, column].float().clamp(0, 1).tolist()
            name = NAMES[int(concept[number, row, column])]
            places.append((name, CELL * (column + x), CELL * (row + y)))
        result.append(Facts(tuple(places), **{name: of[classes[name][number]] for name, of in CLASSES.items()}))
    return result


@torch.inference_mode()
def read_pictures(reader: Reader, pictures: np.ndarray, batch: int = 100) -> list[Facts]:
    """Return the facts of pictures, uint8 [N, 64, 64, 3]."""
    device = reader.heat.weight.device
    parts = (pictures[start : start + batch] for start in range(0, len(pictures), batch))
    return [facts for part in parts for facts in decode(reader(to_tensor(part).to(device)))]


def damage(pictures: Tensor, blur: Tensor, noise: Tensor, normal: Tensor) -> Tensor:
    """Blur each picture and add noise to it.

    Args:
        pictures: [B, 3, H, W] in [-1, 1].
        blur: standard deviation of the Gaussian in pixels, [B]; 0 leaves the picture as it is.
        noise: standard deviation of the noise, [B].
        normal: standard normal numbers like `pictures`.
    """
    b, channels, height, width = pictures.shape
    taps = torch.arange(-4, 5, device=pictures.device)
    kernel = torch.softmax(-(taps**2) / (2 * blur[:, None].clamp(min=1e-3) ** 2), 1).repeat_interleave(channels, 0)
    padded = F.pad(pictures, (4, 4, 4, 4), mode="replicate").reshape(1, b * channels, height + 8, width + 8)
    rows = F.conv2d(padded, kernel[:, None, None, :].to(pictures), groups=b * channels)
    blurred = F.conv2d(rows, kernel[:, None, :, None].to(pictures), groups=b * channels)
    found = blurred.reshape(pictures.shape) + noise[:, None, None, None].to(pictures) * normal
    return found.clamp(-1, 1)


def save_reader(reader: Reader, folder: Path) -> None:
    """Write reader.json and reader.safetensors, atomically."""
    with atomic_folder(folder) as part:
        write_json(part / "reader.json", {"channels": reader.config.channels, "blocks": reader.config.blocks})
        save_tensors(part / WEIGHTS, {k: v.half().contiguous() for k, v in reader.state_dict().items()})


def load_reader(folder: Path) -> Reader:
    """Return a saved reader, on the CPU.

    Raises:
        UserError: it cannot be read.
    """
    reader = Reader(validate(ReaderConfig, read_json(folder / "reader.json")))
    tensors = load_tensors(folder / WEIGHTS)
    reader.load_state_dict({name: value.float() for name, value in tensors.items()})
    speed_up(reader)
    return reader.eval()


def train_reader(config: ReaderConfig, out: Path, accelerator: Accelerator, folder: Path | None = None) -> Reader:
    """Train the reader in the run folder `out`, resuming what is there; return it.

    Raises:
        UserError: the sprite sheets cannot be read, or `out` holds another run.
    """
    torch.manual_seed(config.loop.seed)
    reader, device = Reader(config), accelerator.device
    if config.reader:
        copy_weights(load_reader(Path(config.reader)), reader, "reader")
    speed_up(reader)
    reader.to(device)

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        items = items + config.first_scene
        pictures = to_tensor(workers.pictures(items))
        damaged = rng.chance("damaged", config.damaged).float()
        blur, noise = (damaged * rng.uniform(name, 0, getattr(config, name)).float() for name in ("blur", "noise"))
        pictures = damage(pictures, blur, noise, rng.normal("noise of pictures", (3, SIDE, SIDE)).cpu())
        batch = {"pictures": pictures, **make_targets(make_scenes(READER_SEED, items))}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def loss(batch: Batch, _: KeyedRng) -> Loss:
        return reader_loss(reader(batch["pictures"]), batch)

    def evaluate(weights: Weights) -> dict[str, float]:
        averaged = Reader(config)
        averaged.load_state_dict({name: value.cpu() for name, value in weights["reader"].items()})
        speed_up(averaged)
        pictures = draw_scenes(REFERENCE_SEED, range(VALIDATION_SCENES), folder=folder)
        claims = [full_claim(scene) for scene in make_scenes(REFERENCE_SEED, range(VALIDATION_SCENES))]
        shares = scene_accuracy(read_pictures(averaged.eval(), pictures), claims)
        return {name: share.value for name, share in shares.items()}

    plan = [Update("reader", dict(reader.named_parameters()), loss, config.optim)]
    inputs = {"scenes": fingerprint(folder)}
    with SceneWorkers(config.workers, READER_SEED, folder) as workers:
        weights = fit("reader", plan, fetch, ENDLESS, out, config, config.loop, accelerator, inputs, evaluate)
    reader.load_state_dict(weights["reader"])
    return reader.cpu().eval()
