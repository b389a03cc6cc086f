"""The standard metrics by name, the suites of papers, and where networks are looked for. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.backbones.teachers import HUB_ID, hub_reason
from fewstep.common.errors import UserError, did_you_mean
from fewstep.common.files import cache_root
from fewstep.common.messages import logger
from fewstep.common.safetensors_header import read_safetensors_header
from fewstep.evaluation.limits import FD_FEWEST, KID_FEWEST
from fewstep.scorers.registry import (
    CLIP_FOLDER,
    HPSV2_FOLDER,
    IMAGE_REWARD_FOLDER,
    MPS_FOLDER,
    FolderLayout,
    ScorerFiles,
    find_files,
)

GUIDE = "docs/guide/metrics.md"
TEACHER = "_teacher"
"""Suffix of a set distance that is taken from the teacher's pictures instead of real ones."""
PUBLISHED = "converted_from"
"""Metadata of a converted file: the name of the published one."""
FETCHED = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)
"""Patterns of the files that are fetched of a repository on the hub."""


@dataclass(frozen=True)
class Network:
    """A network that metrics are computed by.

    Attributes:
        source: hub id, or the name of its folder in the folder of weights where the hub has pickles only.
        layout: of its files.
        remedy: how its folder is filled; empty for a hub id.
    """

    source: str
    layout: FolderLayout
    remedy: str = ""


def _one_file(mark: str) -> FolderLayout:
    return FolderLayout(mark, tokenizer="", guide=GUIDE)


def _convert(published: str) -> str:
    return f"get {published} and convert it by tools/convert_weights.py"


VIT_L_14, VIT_G_14 = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
NETWORKS = {
    "inception": Network(
        "inception",
        _one_file("Conv2d_1a_3x3.conv.weight"),
        _convert("pt_inception-2015-12-05-6726825d.pth (releases of mseitzer/pytorch-fid)"),
    ),
    "clip": Network(VIT_L_14, CLIP_FOLDER),
    "aesthetic": Network(
        "aesthetic",
        _one_file("layers.0.weight"),
        _convert("sac+logos+ava1-l14-linearMSE.pth (christophschuhmann/improved-aesthetic-predictor)"),
    ),
    "ic9600": Network(
        "ic9600", _one_file("b2_4_slam.linear.0.weight"), _convert("ck.pth (linked from tinglyfeng/IC9600)")
    ),
    "pickscore": Network("yuvalkirstain/PickScore_v1", CLIP_FOLDER),
    "hpsv2": Network("hpsv2", HPSV2_FOLDER, _convert("HPS_v2.1_compressed.pt (hub: xswu/HPSv2)")),
    "image_reward": Network("image_reward", IMAGE_REWARD_FOLDER, _convert("ImageReward.pt (hub: THUDM/ImageReward)")),
    "mps": Network("mps", MPS_FOLDER, "convert MPS_overall_checkpoint.pth as docs/guide/rewards.md#folders shows"),
}


@dataclass(frozen=True)
class StandardMetric:
    """A metric by name.

    Attributes:
        build: module.function of this package, (Loader, files by network) -> Metric; for "noises", -> Features.
        networks: keys of `NETWORKS`; NAME:WHERE replaces the source of the last one.
        of: what it reads: each "picture", or a set of them beside "real" ones, or pictures of several "noises".
        fewest: pictures that it needs.
        smallest: side of a picture that it needs, in pixels.
    """

    build: str
    networks: tuple[str, ...]
    of: Literal["picture", "real", "noises"] = "picture"
    fewest: int = 1
    smallest: int = 1


METRICS = {
    "fid": StandardMetric("inception.fid", ("inception",), "real", FD_FEWEST),
    "fid_legacy": StandardMetric("inception.fid_legacy", ("inception",), "real", FD_FEWEST),
    "patch_fid": StandardMetric("inception.patch_fid", ("inception",), "real", FD_FEWEST, 299),
    "kid": StandardMetric("inception.kid", ("inception",), "real", KID_FEWEST),
    "kid_legacy": StandardMetric("inception.kid_legacy", ("inception",), "real", KID_FEWEST),
    "diversity": StandardMetric("inception.features", ("inception",), "noises"),
    "clip": StandardMetric("clip.score", ("clip",)),
    "aesthetic": StandardMetric("clip.aesthetic", ("clip", "aesthetic")),
    "complexity": StandardMetric("complexity.complexity", ("ic9600",)),
    "pickscore": StandardMetric("preference.preference", ("pickscore",)),
    "hpsv2": StandardMetric("preference.preference", ("hpsv2",)),
    "image_reward": StandardMetric("preference.preference", ("image_reward",)),
    "mps": StandardMetric("preference.preference", ("mps",)),
}


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the metric as `choose` reads it, and the factor of the printed number."""

    heading: str
    metric: str
    factor: float = 1


SUITES = {
    "tcd": (
        Column("FID", "fid"),
        Column("IC", "complexity"),
        Column("ImageReward x100", "image_reward", 100),
        Column("PickScore", "pickscore"),
    ),
    "tlcm": (
        Column("FID", "fid"),
        Column("CS", f"clip:{VIT_G_14}"),
        Column("AS", "aesthetic"),
        Column("IR", "image_reward"),
    ),
    "sdxl": (
        Column("FID-T", f"fid{TEACHER}"),
        Column("Patch FID-T", f"patch_fid{TEACHER}"),
        Column("CLIP", f"clip:{VIT_G_14}", 0.01),
        Column("HPSv2", "hpsv2", 0.01),
        Column("PickScore", "pickscore"),
        Column("ImageReward", "image_reward"),
    ),
}
"""The columns of Table 1 of TCD (arXiv 2402.19159) and of TLCM (arXiv 2406.05768), and of the usual table of few-step
students of SDXL beside their teacher (SenseFlow, arXiv 2506.00523), in the papers' units."""


@dataclass(frozen=True)
class ModelFiles:
    """The checked files of a network, and the name that records print."""

    model: str
    files: ScorerFiles


@dataclass(frozen=True)
class Chosen:
    """A metric that was chosen, with the files of its networks.

    Attributes:
        name: key of `METRICS`.
        column: of the table.
        to_teacher: whether sets are compared with the teacher's pictures.
        models: by network.
    """

    name: str
    column: Column
    to_teacher: bool
    models: Mapping[str, ModelFiles]

    @property
    def metric(self) -> StandardMetric:
        """The metric's entry."""
        return METRICS[self.name]

    @property
    def to_real(self) -> bool:
        """Whether sets are compared with real pictures."""
        return self.metric.of == "real" and not self.to_teacher


class MissingNetworkError(UserError):
    """A network's files are nowhere."""


def choose(
    suite: str | None, names: Sequence[str], weights: Path | None = None, *, skip_unavailable: bool = False
) -> list[Chosen]:
    """Return the metrics of a suite and of names, with their networks' files; fetch those that the hub has.

    Args:
        suite: key of `SUITES`.
        names: NAME, NAME_teacher or NAME:WHERE; WHERE is a folder, its name below `weights`, or a hub id.
        weights: folder of the networks' folders; None for $FEWSTEP_CACHE/weights.
        skip_unavailable: leave metrics without their network out.

    Raises:
        UserError: an unknown name; a network whose files belong to another; missing networks, with a line for each.
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"suite = {suite!r} must be one of {', '.join(SUITES)}{did_you_mean(suite, SUITES)}")
    columns: dict[str, Column] = {}
    for column in (*(SUITES[suite] if suite else ()), *(Column("", name) for name in names)):
        columns.setdefault(column.metric, column)
    place = weights or cache_root() / "weights"
    found, missing = [], []
    for column in columns.values():
        try:
            found.append(_chosen(column, place))
        except MissingNetworkError as error:
            missing.append(column.metric)
            logger.info("%s %s: %s", "left out" if skip_unavailable else "missing", column.metric, error)
    if missing and not (skip_unavailable and found):
        rest = "leave them out with --skip-unavailable" if found else "use the usual metrics, which need none"
        raise UserError(
            f"weights = {str(place)!r} lacks the networks of {', '.join(missing)}; bring them ({GUIDE}), or {rest}",
            field="weights",
        )
    return found


def _chosen(column: Column, weights: Path) -> Chosen:
    named, _, where = column.metric.partition(":")
    name = named.removesuffix(TEACHER)
    if name not in METRICS or (name != named and METRICS[name].of != "real"):
        legal = [*METRICS, *(f"{key}{TEACHER}" for key, entry in METRICS.items() if entry.of == "real")]
        raise UserError(f"metrics = {named!r} must be one of {', '.join(legal)}{did_you_mean(named, legal)}")
    places = dict.fromkeys(METRICS[name].networks, "")
    places[METRICS[name].networks[-1]] = where
    return Chosen(name, column, name != named, {key: find_model(key, place, weights) for key, place in places.items()})


def find_model(network: str, where: str, weights: Path) -> ModelFiles:
    """Return a network's files.

    Args:
        where: a folder, its name below `weights`, or a hub id; "" for the network's own source.

    Raises:
        MissingNetworkError: there is no such folder, or the hub cannot be reached.
        UserError: a file in it is missing or belongs to another.
    """
    own = NETWORKS[network]
    source, layout = where or own.source, own.layout
    places = [*([Path(where)] if where else []), weights / Path(source).name]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None and not HUB_ID.fullmatch(source):
        remedy = f"{where} is no folder" if where else f"{own.remedy}, into {weights / source}"
        raise MissingNetworkError(remedy, field="weights")
    files = find_files(folder or _fetched(source, weights), network, layout)
    published = read_safetensors_header(files.weights[0])[0].get(PUBLISHED)
    return ModelFiles(published or source, files)


def _fetched(source: str, weights: Path) -> Path:
    """Return the folder of a hub id, fetched if missing."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub's own classes change from version to version
        place = weights / Path(source).name
        reason = f"put {source} into {place}, which could not be fetched: {hub_reason(error)}"
        raise MissingNetworkError(reason, field="weights") from error
