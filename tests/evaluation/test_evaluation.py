"""The reductions: closed forms, unbiasedness, intervals, refusals, and what evaluate puts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.evaluation.bootstrap import mean_figure, paired_difference
from fewstep.evaluation.detail import (
    EdgeDensity,
    WebpBytes,
    blurred,
    detail_scale,
    edge_density,
    noised,
    webp_bytes,
)
from fewstep.evaluation.diversity import diversity, pairwise_distance
from fewstep.evaluation.evaluate import (
    Reference,
    Suite,
    TeacherPictures,
    evaluate_pictures,
    save_figures,
    score_pictures,
    standard_suite,
)
from fewstep.evaluation.features import Features
from fewstep.evaluation.frechet import FrechetDistance, Projection, frechet, moments
from fewstep.evaluation.kid import KernelDistance, between, within
from fewstep.evaluation.metric import TO_TEACHER, Array, Figure, Identity, Pictures, check_pictures
from fewstep.evaluation.teacher_distance import TeacherFeatures, TeacherPixels, cosine_distance, pixel_rmse
from fewstep_worlds.stickers.dataset import draw_scenes


class Coarse:
    """A backbone without weights: mean colours of 8x8 cells."""

    name = "8x8 mean colours"
    weights_sha256 = "none"
    licence = "none"
    input = "as given"
    calls = 0

    def __call__(self, pictures: Pictures) -> Array:
        self.calls += len(pictures)
        n, h, w, _ = pictures.shape
        cells = pictures.reshape(n, 8, h // 8, 8, w // 8, 3).mean((2, 4), dtype=np.float32)
        return cells.reshape(n, -1) / np.float32(255)


@pytest.fixture(scope="module")
def real() -> Pictures:
    """Sticker scenes."""
    return draw_scenes(1, range(1600))


@pytest.fixture(scope="module")
def coarse() -> Features:
    return Features(Coarse(), progress=False)


def some(real: Pictures, n: int, seed: int = 0) -> Pictures:
    return real[np.random.default_rng(seed).permutation(len(real))[:n]]


# ---------------------------------------------------------------------------------------------------- FD


def test_frechet_equals_closed_forms() -> None:
    rng = np.random.default_rng(0)
    zero, eye = np.zeros(4), np.eye(4)
    a, b = np.array([1.0, 4.0, 9.0, 0.25]), np.array([4.0, 1.0, 1.0, 0.25])
    shift = np.array([3.0, 0.0, -4.0, 0.0])
    assert frechet(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet(shift, eye, zero, eye) == pytest.approx(25)
    # Axis-aligned: sum of squared differences of standard deviations: 1 + 1 + 4 + 0.
    assert frechet(shift, np.diag(a), zero, np.diag(b)) == pytest.approx(25 + 6)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    turned = frechet(turn @ shift, turn @ np.diag(a) @ turn.T, zero, turn @ np.diag(b) @ turn.T)
    assert turned == pytest.approx(31)
    # Covariances that do not commute: the trace of a square root is the sum of roots of the eigenvalues.
    x, y = (m @ m.T + 0.1 * eye for m in rng.normal(size=(2, 4, 4)))
    roots = np.sqrt(np.linalg.eigvals(x @ y).real)
    assert frechet(zero, x, zero, y) == pytest.approx(np.trace(x + y) - 2 * roots.sum(), rel=1e-9)
    flat = np.diag([1.0, 1.0, 0.0, 0.0])
    assert frechet(zero, flat, zero, eye) == pytest.approx(2), "singular covariances"


def test_fd_of_samples_from_known_gaussians(coarse: Features) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20000, 6))
    y = 2 * rng.normal(size=(20000, 6)) + 1
    every_axis = Projection(np.zeros(6), np.eye(6), 1.0, 20000)
    assert FrechetDistance(coarse, every_axis).distance(y, x) == pytest.approx(6 + 6, rel=0.03)
    moved = FrechetDistance(coarse, every_axis).distance(x + np.arange(6), x)
    assert moved == pytest.approx(55, rel=1e-9), "equal covariances: the squared shift alone"
    weights = rng.integers(0, 3, len(x)).astype(float)
    repeated = np.repeat(x, weights.astype(int), axis=0)
    for one, two in zip(moments(x, weights), moments(repeated), strict=True):
        assert np.allclose(one, two)


def test_projection_keeps_the_largest_directions() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3000, 100)) * np.where(np.arange(100) < 64, 10.0, 0.1) + 5
    projection = Projection.fit(x.astype(np.float32))
    assert projection.axes.shape == (100, 64)
    assert np.allclose(projection.axes.T @ projection.axes, np.eye(64))
    assert projection.explained > 0.999
    assert np.abs(projection.axes[64:]).max() < 0.05
    assert np.allclose(projection(x).mean(0), 0, atol=1e-5)
    assert Projection.fit(x[::-1].astype(np.float32)).sha256 == projection.sha256, "order does not count"
    assert Projection.fit(x[1:].astype(np.float32)).sha256 != projection.sha256
    with pytest.raises(UserError, match="64 principal components"):
        Projection.fit(x[:64])


def test_fd_is_refused_below_500_and_has_an_identity(real: Pictures, coarse: Features) -> None:
    features = coarse(some(real, 1200))
    metric = FrechetDistance(coarse, Projection.fit(features))
    with pytest.raises(UserError, match=r"FD-Lite0 of 499 pictures .* at least 500"):
        metric.distance(features[:499], features[500:])
    with pytest.raises(UserError, match="499 pictures to measure against"):
        metric.reduce(features[:600], features[:499], 0)
    with pytest.raises(UserError, match="0 pictures to measure against"):
        metric.reduce(features[:600], None, 0)
    figure = metric.reduce(features[:500], features[500:], 0)
    assert figure.low is not None
    assert figure.high is not None
    assert 0 <= figure.low <= figure.value <= figure.high
    assert figure == metric.reduce(features[:500], features[500:], 0), "the bootstrap is seeded"
    assert "FID" not in metric.identity.name
    assert metric.projection.sha256[:16] in metric.identity.reduction


def test_fd_and_kid_show_blur_noise_and_mode_drop(real: Pictures, coarse: Features) -> None:
    pictures = some(real, 1500)
    ours, rest = pictures[:500], coarse(pictures[500:])
    kid = KernelDistance(coarse)
    fd = FrechetDistance(coarse, Projection.fit(coarse(pictures)))
    dropped = np.repeat(ours[:50], 10, axis=0)
    for metric in (fd, kid):
        floor = metric.distance(coarse(ours), rest)
        assert metric.distance(coarse(dropped), rest) > 2 * abs(floor), "50 pictures ten times each"
        fades = [metric.distance(coarse((ours * s + 255 * (1 - s)).astype(np.uint8)), rest) for s in (0.9, 0.7)]
        assert floor < fades[0] < fades[1], "paler pictures"


# --------------------------------------------------------------------------------------------------- KID


def mmd2(x: Array, y: Array) -> float:
    """Unbiased squared MMD between the rows of [N, D] and [M, D]; it can be a little below 0."""
    ones_x, ones_y = np.ones((1, len(x))), np.ones((1, len(y)))
    return float((within(x, ones_x) + within(y, ones_y) - 2 * between(x, y, ones_x, ones_y))[0])


def brute_mmd2(x: Array, y: Array) -> float:
    def k(a: Array, b: Array) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_equals_its_definition_in_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(17, 5)), rng.normal(size=(23, 5)) + 0.4
    expected = brute_mmd2(x, y)
    assert mmd2(x, y) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("fewstep.evaluation.kid.ROWS", 7)
    assert mmd2(x, y) == pytest.approx(expected, rel=1e-12)
    assert KernelDistance(Features(Coarse())).distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_weights_of_kid_count_rows_but_never_pair_a_row_with_itself() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    counts = np.array([2.0, 0, 1, 3, 0, 1])
    times = counts.astype(int)
    pairs = [((x[i] @ x[j] / 3 + 1) ** 3, counts[i] * counts[j]) for i in range(6) for j in range(6) if i != j]
    mean = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    assert within(x, counts[None])[0] == pytest.approx(mean)
    repeated = np.repeat(x, times, axis=0)
    expected = between(repeated, y, np.ones((1, len(repeated))), np.ones((1, 5)))[0]
    assert between(x, y, counts[None], np.ones((1, 5)))[0] == pytest.approx(expected)


def test_kid_is_unbiased_and_grows_with_the_shift() -> None:
    rng = np.random.default_rng(5)
    found = np.array([mmd2(rng.normal(size=(40, 8)), rng.normal(size=(60, 8))) for _ in range(400)])
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean()) < 3 * error
    assert found.min() < 0, "an unbiased estimate of 0 falls on both sides"
    x, y = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    distances = [mmd2(x + shift, y) for shift in (0.0, 0.2, 0.4, 0.8)]
    assert distances == sorted(distances)


def test_kid_of_answers_to_the_same_prompts_is_unbiased() -> None:
    """Two draws for each of 40 prompts: equal laws are at distance 0, though rows of one number are alike."""
    rng = np.random.default_rng(7)
    metric = KernelDistance(Features(Coarse()))
    matched, plain = [], []
    for _ in range(200):
        prompts = rng.normal(size=(40, 8))
        x, y = (prompts + 0.3 * rng.normal(size=(40, 8)) for _ in range(2))
        matched.append(metric.reduce(x, y, 0, matched=True).value)
        plain.append(metric.distance(x, y))
    error = np.std(matched) / np.sqrt(len(matched))
    assert abs(np.mean(matched)) < 3 * error
    assert np.mean(plain) < -10 * error, "pairs of one prompt would lower it"
    shifted = metric.reduce(x + 0.5, y, 0, matched=True)
    assert shifted.low is not None
    assert shifted.low > 0
    with pytest.raises(UserError, match="40 and 30 pictures cannot have the same prompts"):
        metric.reduce(x, y[:30], 0, matched=True)


def test_kid_interval_covers_the_true_distance() -> None:
    rng = np.random.default_rng(6)
    metric = KernelDistance(Features(Coarse()))
    # x ~ N(c 1, I), y ~ N(0, I): x.x'/D is no simple law, so the truth comes from a large sample.
    truth = mmd2(rng.normal(size=(4000, 4)) + 0.5, rng.normal(size=(4000, 4)))
    hits = 0
    for _ in range(40):
        figure = metric.reduce(rng.normal(size=(100, 4)) + 0.5, rng.normal(size=(150, 4)), 0)
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= truth <= figure.high
    assert hits >= 33, "of 40 intervals that should cover 95 % of the time"


def test_kid_refuses_a_handful() -> None:
    x = np.ones((9, 3))
    with pytest.raises(UserError, match=r"KID-Lite0 of 9 pictures .* at least 10"):
        KernelDistance(Features(Coarse())).distance(x, np.ones((50, 3)))


# --------------------------------------------------------------------------------------------- bootstrap


def test_mean_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(8)
    hits = 0
    for seed in range(200):
        figure = mean_figure(rng.exponential(size=80), seed)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low < figure.value < figure.high
        hits += figure.low <= 1.0 <= figure.high
    assert 178 <= hits <= 199
    narrow, wide = mean_figure(rng.normal(size=1600), 0), mean_figure(rng.normal(size=100), 0)
    assert (narrow.high or 0) - (narrow.low or 0) < 0.5 * ((wide.high or 0) - (wide.low or 0))
    assert mean_figure(np.array([2.0]), 0) == Figure(2.0, None, None, 1)
    with pytest.raises(UserError, match="score 1 is not finite"):
        mean_figure(np.array([1.0, np.nan]), 0)


def test_pairing_sees_what_separate_intervals_hide() -> None:
    rng = np.random.default_rng(9)
    prompts = rng.normal(size=200)
    ours, theirs = prompts + 0.1 + 0.05 * rng.normal(size=200), prompts
    paired = paired_difference(ours, theirs, 0)
    assert paired.low is not None
    assert paired.low > 0
    assert (mean_figure(ours, 0).low or 0) < (mean_figure(theirs, 0).high or 0)
    with pytest.raises(UserError, match="200 scores cannot be paired with 199"):
        paired_difference(ours, theirs[1:], 0)


# ------------------------------------------------------------------------------------------------ detail


def ramp(step: int) -> Pictures:
    row = (np.arange(64) * step).astype(np.uint8)
    return np.broadcast_to(row[None, None, :, None], (1, 64, 64, 3)).copy()


def test_edge_density_of_known_pictures() -> None:
    assert edge_density(np.full((2, 64, 64, 3), 90, np.uint8)).tolist() == [0, 0]
    assert edge_density(ramp(1))[0] == pytest.approx(1)
    assert edge_density(ramp(3))[0] == pytest.approx(3)
    assert edge_density(ramp(3).swapaxes(1, 2))[0] == pytest.approx(3), "down as across"


def test_detail_scale_orders_copies(real: Pictures) -> None:
    scale = detail_scale(some(real, 60))
    edges = {name: figures[EdgeDensity.identity.name].value for name, figures in scale.items()}
    order = ["blurred, radius 1", "blurred, radius 0.5", "real", "noised, sigma 5", "noised, sigma 10"]
    assert sorted(edges, key=edges.__getitem__) == order
    sizes = {name: figures[WebpBytes.identity.name].value for name, figures in scale.items()}
    assert sizes["real"] < sizes["noised, sigma 5"] < sizes["noised, sigma 10"]


def test_webp_bytes_measure_a_lossless_file() -> None:
    plain = np.full((1, 64, 64, 3), 200, np.uint8)
    noise = np.random.default_rng(10).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    assert webp_bytes(plain)[0] < 100
    assert webp_bytes(noise)[0] > 64 * 64 * 3 * 0.95


def test_noise_and_blur_by_known_pictures() -> None:
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    assert noised(grey, 5, 0).astype(float).std() == pytest.approx(5, rel=0.03)
    assert (noised(grey, 5, 0) == noised(grey, 5, 0)).all()
    assert (blurred(grey, 1.0) == grey).all()


# -------------------------------------------------------------------------------------- diversity, teacher


def test_diversity_of_known_sets(coarse: Features, real: Pictures) -> None:
    rng = np.random.default_rng(11)
    same = np.repeat(rng.normal(size=(3, 1, 7)), 5, axis=1)
    assert pairwise_distance(same) == pytest.approx(0, abs=1e-12)
    assert pairwise_distance(np.eye(4)[None]) == pytest.approx(1)
    x = rng.normal(size=(2, 4, 7))
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    expected = [np.mean([1 - u[i] @ u[j] for i in range(4) for j in range(i)]) for u in unit]
    assert pairwise_distance(x) == pytest.approx(expected)
    with pytest.raises(UserError, match="noises >= 2"):
        pairwise_distance(x[:, :1])
    pictures = some(real, 24).reshape(6, 4, 64, 64, 3)
    ((name, figure),) = diversity(coarse, pictures, floor=0.5).items()
    assert (figure.n, figure.floor) == (6, 0.5)
    assert figure.identity is not None
    assert "4 noises" in figure.identity.reduction
    assert diversity(coarse, np.repeat(pictures[:, :1], 4, axis=1))[name].value < 1e-6 < figure.value


def test_distance_to_teacher_is_paired(coarse: Features, real: Pictures) -> None:
    ours = np.zeros((2, 8, 8, 3), np.uint8)
    theirs = ours.copy()
    theirs[1] = 10
    theirs[0, :4] = 20
    assert pixel_rmse(ours, theirs) == pytest.approx([20 / np.sqrt(2), 10])
    assert cosine_distance(np.eye(2), np.array([[3.0, 0], [0, -2]])) == pytest.approx([0, 2])
    pictures = some(real, 30)
    for metric in (TeacherPixels(), TeacherFeatures(coarse)):
        features = metric.features(pictures, ())
        assert metric.reduce(features, features, 0).value == pytest.approx(0, abs=1e-9)
        assert metric.reduce(features, metric.features(pictures[::-1], ()), 0).value > 0
        with pytest.raises(UserError, match="30 pictures came with 29 of the teacher"):
            metric.reduce(features, features[1:], 0)


# ---------------------------------------------------------------------------------------------- evaluate


def test_features_are_computed_once_and_survive_on_disk(tmp_path: Path, real: Pictures) -> None:
    pictures = some(real, 40)
    backbone = Coarse()
    features = Features(backbone, tmp_path)
    first = features(pictures)
    assert features(pictures.copy()) is first
    assert backbone.calls == 40
    assert not first.flags.writeable
    changed = pictures.copy()
    changed[0, 0, 0, 0] ^= 1
    features(changed)
    assert backbone.calls == 80, "one bit makes another set"
    fresh = Coarse()
    assert np.array_equal(Features(fresh, tmp_path)(pictures), first)
    assert fresh.calls == 0
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(Features(fresh, tmp_path)(pictures), first)
    assert fresh.calls == 40
    other = Coarse()
    other.weights_sha256 = "other weights"
    Features(other, tmp_path)(pictures)
    assert other.calls == 40


class Redness:
    """A user's own metric: three members are enough."""

    identity = Identity("redness", "mean red", "higher", "levels", "mean", "detail")

    def features(self, pictures: Pictures, prompts: Sequence[str]) -> Array:
        return pictures[..., 0].mean((1, 2))

    def reduce(self, features: Array, against: Array | None, seed: int) -> Figure:
        return mean_figure(features, seed)


def test_evaluate_puts_everything_beside_each_figure(real: Pictures, coarse: Features, tmp_path: Path) -> None:
    pictures, prompts = some(real, 600), ["x"] * 600
    reference = Reference.split(some(real, 1300, 2), 600, seed=1)
    assert len(reference.pictures) == 700
    projection = Projection.fit(coarse(reference.pictures))
    metrics = [FrechetDistance(coarse, projection), KernelDistance(coarse), TeacherPixels(), Redness()]
    teacher = TeacherPictures(same=noised(pictures, 10, 0), other=reference.floor)
    figures = evaluate_pictures(pictures, prompts, metrics, reference, teacher, seed=5)  # type: ignore[arg-type]
    fd, kid = "FD-Lite0", "KID-Lite0"
    assert set(figures) == {fd, kid, fd + TO_TEACHER, kid + TO_TEACHER, "to teacher: pixels", "redness"}
    for name, figure in figures.items():
        assert figure.identity is not None
        assert figure.identity.name == name
        assert (figure.n, figure.identity.n, figure.identity.seed) == (600, 600, 5)
    for name in (fd, kid, "redness"):
        assert figures[name].floor is not None
    assert figures[fd + TO_TEACHER].floor is None
    assert figures["to teacher: pixels"].floor is None
    assert reference.floor is not None
    assert figures["redness"].floor == pytest.approx(reference.floor[:600, :, :, 0].mean())
    floor = metrics[1].distance(coarse(reference.floor[:600]), coarse(reference.pictures))  # type: ignore[union-attr]
    assert figures[kid].floor == pytest.approx(floor)
    to_teacher = metrics[1].reduce(coarse(pictures), coarse(reference.floor), 5, matched=True)  # type: ignore[call-arg]
    assert figures[kid + TO_TEACHER] == replace(to_teacher, identity=figures[kid + TO_TEACHER].identity), (
        "sets are compared with those of other noise"
    )
    assert figures["to teacher: pixels"].value == pytest.approx(10, rel=0.2), "pairs with those of the same noise"
    exclusive = evaluate_pictures(pictures, prompts, metrics)  # type: ignore[arg-type]
    assert set(exclusive) == {"redness"}
    assert exclusive["redness"].floor is None

    results = {"TCD | 4": figures, "only red": exclusive}
    save_figures(tmp_path / "figures.json", results)
    kept = read_json(tmp_path / "figures.json")
    assert {
        row: {name: TypeAdapter(Figure).validate_python(f) for name, f in saved.items()} for row, saved in kept.items()
    } == results

    with pytest.raises(UserError, match="600 pictures need as many real ones set aside for the floor, not 30"):
        evaluate_pictures(pictures, prompts, metrics[:1], replace(reference, floor=reference.floor[:30], _floors={}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="600 pictures came with 599 prompts"):
        evaluate_pictures(pictures, prompts[1:], metrics, reference)  # type: ignore[arg-type]


def test_small_sets_have_no_fd_and_tiny_ones_no_suite(real: Pictures, coarse: Features) -> None:
    small, large = ({metric.identity.name for metric in standard_suite(coarse, n, real)} for n in (499, 500))
    assert large - small == {"FD-Lite0"}
    assert "KID-Lite0" in small
    metrics = standard_suite(coarse, 10, real)
    assert Suite(Reference(real[:10]), metrics, coarse).metrics == metrics
    with pytest.raises(UserError, match="9 real pictures"):
        Suite(Reference(real[:9]), metrics, coarse)


def test_scores_pair_methods_by_prompt(real: Pictures, coarse: Features) -> None:
    teacher = some(real, 50)
    prompts = ["x"] * 50
    metrics = [TeacherPixels(), TeacherFeatures(coarse), EdgeDensity()]
    soft, softer = (score_pictures(blurred(teacher, r), prompts, metrics, teacher) for r in (0.5, 1.0))
    for name in ("to teacher: pixels", "to teacher: Lite0"):
        difference = paired_difference(softer[name], soft[name], 0)
        assert difference.low is not None
        assert difference.low > 0
    edges = paired_difference(softer["detail: edges"], soft["detail: edges"], 0)
    assert edges.high is not None
    assert edges.high < 0
    assert set(score_pictures(teacher, prompts, metrics)) == {"detail: edges"}


def test_metrics_are_selected_by_group_and_reference(real: Pictures, coarse: Features) -> None:
    """Set distances to real and to the teacher's pictures differ in `against`; older files lack both fields."""
    pictures = some(real, 20)
    metrics = [KernelDistance(coarse), TeacherPixels(), EdgeDensity()]
    figures = evaluate_pictures(
        pictures, ["x"] * 20, metrics, Reference(pictures[::-1]), TeacherPictures(pictures, pictures[::-1])
    )
    found = {
        name: [f.is_of("quality", "real"), f.is_of("quality", "teacher"), f.is_of("teacher"), f.is_of("detail")]
        for name, f in figures.items()
    }
    kid = "KID-Lite0"
    assert [name for name, of in found.items() if of[0]] == [kid]
    assert [name for name, of in found.items() if of[1]] == [kid + TO_TEACHER]
    assert [name for name, of in found.items() if of[2]] == ["to teacher: pixels"]
    assert [name for name, of in found.items() if of[3]] == ["detail: edges"]
    old = asdict(figures[kid])
    for key in ("group", "against"):
        del old["identity"][key]
    assert TypeAdapter(Figure).validate_python(old) == figures[kid]


def test_what_is_no_picture_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"float32 \[2, 8, 8, 3\]; give uint8"):
        check_pictures(np.zeros((2, 8, 8, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"uint8 \[8, 8, 3\]"):
        check_pictures(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="0 pictures"):
        check_pictures(np.zeros((0, 8, 8, 3), np.uint8))


def test_some_real_pictures_are_drawn_from_all_of_them() -> None:
    """A folder is often sorted: its first pictures are one style's."""
    styles = np.repeat(np.arange(4, dtype=np.uint8), (1000, 500, 300, 200))
    reference = Reference(styles[:, None, None, None] * np.ones((8, 8, 3), np.uint8))
    chosen = reference.some(500)[:, 0, 0, 0]
    for style in range(4):
        assert abs((chosen == style).mean() - (styles == style).mean()) < 0.06
    assert not np.array_equal(reference.some(500, seed=1), reference.some(500))
    assert len(Reference(reference.pictures[:7]).some(500)) == 7
