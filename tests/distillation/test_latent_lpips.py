"""The distance between latents: its axioms, its target, the pairs that it is trained on, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from fewstep.backbones.base import Backbone, load_backbone
from fewstep.commands.train_latent_lpips import train_latent_lpips, train_perceptual
from fewstep.common.accelerator import make_accelerator
from fewstep.common.config import validate
from fewstep.common.device import pick_device
from fewstep.common.errors import UserError
from fewstep.common.files import read_json, write_json
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.schedule import VariancePreserving
from fewstep.distillation.latent_lpips import network as networks
from fewstep.distillation.latent_lpips import pair_set as pair_sets
from fewstep.distillation.latent_lpips import train as training
from fewstep.distillation.latent_lpips.network import LatentLPIPS, calibrate, group_distances, load_latent_lpips
from fewstep.distillation.latent_lpips.pair_set import PairSet, distinct_prompts, draw_groups, split
from fewstep.distillation.latent_lpips.pairs import (
    KINDS,
    MEMBERS,
    PAIRS,
    changes,
    estimate_times,
    partner,
    patches,
    shifted,
)
from fewstep.distillation.latent_lpips.pixel_features import Lite0Stages, decoder, pair_distances
from fewstep.distillation.latent_lpips.rank_comparison import ENDS, compare_distances, draw_figure, rank_correlation
from fewstep.distillation.latent_lpips.settings import LatentLpipsTrainConfig, NetworkConfig, PairConfig
from fewstep.distillation.latent_lpips.train import fit, log_error, make_latent_lpips, pair_weights
from fewstep.methods.distances import feature_distance
from fewstep.training.run_folder import RunLog, checkpoints

SMALL = NetworkConfig(widths=(8, 12), blocks=(1, 1))
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "yellow") for shape in ("disc", "ring", "bar")]


def network(channels: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> LatentLPIPS:
    torch.manual_seed(seed)
    return LatentLPIPS(SMALL, channels).to(dtype)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the distance


def test_the_distance_is_symmetric_positive_and_0_only_where_latents_are_equal() -> None:
    net = network()
    a, b = normal(5, 3, 6, 6), normal(5, 3, 6, 6, seed=2)
    torch.testing.assert_close(net(a, b), net(b, a), rtol=1e-12, atol=0)
    assert (net(a, b) > 0).all()
    assert net(a, a).tolist() == [0.0] * 5
    for size in (1e-3, 1e-6):  # one number of one latent, and what is seen of it falls with its square
        nudged = a.clone()
        nudged[:, 1, 2, 3] += size
        assert (net(a, nudged) > 1e-7 * size**2).all()
        assert (net(a, nudged) < 10 * size**2).all()


def test_blind_features_do_not_make_it_flat() -> None:
    """Where the network sees nothing, the latents' own share still points the way."""
    net = network()
    with torch.no_grad():
        for parameter in (*net.stem.parameters(), *net.downs.parameters(), *net.levels.parameters()):
            parameter.zero_()
    a, b = normal(2, 3, 4, 4).requires_grad_(), normal(2, 3, 4, 4, seed=2)
    assert (net(a, b) > 0).all()
    (gradient,) = torch.autograd.grad(net(a, b).sum(), a)
    assert (gradient.sign() == (a - b).sign()).all()


def test_its_gradient_is_0_at_equal_latents_and_right_elsewhere() -> None:
    net = network()
    a = normal(2, 3, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(net(a, a.detach()).sum(), a)
    assert gradient.abs().max() == 0
    zero = torch.zeros(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(zero, zero.detach()).sum(), zero)
    assert gradient.abs().max() == 0, "vectors of length 0 have finite slopes"
    b = normal(2, 3, 4, 4, seed=2)
    assert torch.autograd.gradcheck(lambda x: net(x, b), (a,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (128, 128)])
def test_latents_of_any_size(size: tuple[int, int]) -> None:
    net = network(4, torch.float32)
    a = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = net(a, a.detach() + 0.1)
    assert found.shape == (2,)
    assert torch.isfinite(torch.autograd.grad(found.sum(), a)[0]).all()


def test_it_has_at_most_a_million_parameters_and_is_the_same_under_autocast() -> None:
    net = LatentLPIPS(NetworkConfig(), 16)
    assert sum(p.numel() for p in net.parameters()) <= 1_000_000
    a = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = net(a, a + 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(a, a + 0.01), plain)


def test_groups_are_measured_as_pairs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    groups = normal(2, 4, 3, 5, 5)
    ends = torch.tensor([[0, 0, 2], [1, 3, 3]])
    found = group_distances(net, groups, ends)
    for g in range(2):
        for p, (i, j) in enumerate(ends.T.tolist()):
            torch.testing.assert_close(found[g, p], net(groups[g, i][None], groups[g, j][None])[0])
    slope = torch.autograd.grad(found.log().sum(), net.stem.weight)[0]
    monkeypatch.setattr(networks, "LARGE", 24)  # one group at a time
    again = group_distances(net, groups, ends)
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(torch.autograd.grad(again.log().sum(), net.stem.weight)[0], slope)
    wanted = found.detach() * torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64)
    calibrate(net, found.detach(), wanted)
    ratio = (group_distances(net, groups, ends) / wanted).log()
    assert abs(float(ratio.detach().mean())) < 0.05, "one factor, up to the least share"


# the target


def test_the_pixel_distance_by_hand() -> None:
    one = torch.tensor(
        [[[[3.0, 1.0]], [[4.0, 0.0]]], [[[4.0, 5.0]], [[-3.0, 0.0]]]]
    )  # 2 pictures, 2 channels, 2 places
    other = torch.tensor([[[[2.0]]], [[[-5.0]]]])
    # first map: (.6, .8) against (.8, -.6) is .04 + 1.96 = 2, equal at the other place: mean 1; second: 1 against -1, 4
    assert pair_distances([one, other], [(0, 1)]).tolist() == pytest.approx([5.0], abs=1e-6)
    maps = [normal(3, 4, 5, 5).float(), normal(3, 6, 2, 2).float()]
    expected = feature_distance([m[[0, 1]] for m in maps], [m[[2, 2]] for m in maps])
    torch.testing.assert_close(pair_distances(maps, [(0, 2), (1, 2)]).float(), expected)


def test_lite0_is_read_before_the_layers_that_fd_and_kid_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    pixel = Lite0Stages()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = pixel(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 64, 64), (24, 32, 32), (40, 16, 16), (112, 8, 8)]
    seen = F.interpolate(x, (128, 128), mode="bicubic", antialias=True).mul(255).sub(127).div(128)
    every = list(pixel.network.blocks(seen))
    assert len(every) == 18
    for found, block in zip(maps, (1, 3, 5, 11), strict=True):
        torch.testing.assert_close(found, every[block])
    assert pixel(torch.rand(1, 3, 512, 512))[0].shape[-1] == 128, "larger pictures are brought to 256"
    # pictures that reach it are not rounded: differences of 1e-4 of a level survive
    backbone = load_backbone(tiny_pipeline)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    near = decoder(backbone)(torch.cat([latents, latents + 1e-4]))
    assert 0 < float((near[0] - near[1]).abs().max()) < 1 / 255
    assert 0 <= float(near.min()) <= float(near.max()) <= 1
    assert np.abs((near * 255).round().permute(0, 2, 3, 1).numpy() - backbone.to_pictures(latents)).max() <= 1


# the pairs


def test_members_and_kinds() -> None:
    assert len(PAIRS) == 66
    assert len(set(KINDS.values())) == 11
    assert {i for pair in KINDS.values() for i in pair} == set(range(12))


def test_changes_are_of_the_drawn_sizes() -> None:
    rng = KeyedRng(3, 0, tuple(range(40)))
    x, other, far = (normal(40, 4, 8, 8, seed=s).float() * 2 for s in (1, 2, 3))
    white, smooth, patch, shift, mixture = changes(x, other, far, rng)
    size = ((white - x).flatten(1).std(1) / x.flatten(1).std(1)).sort().values
    assert 0.015 < size[0] < 0.05 < 0.3 < size[-1] < 0.75
    assert (size < 0.11).float().mean() == pytest.approx(0.5, abs=0.2), "even in the logarithm: half below .11"

    def roughness(change: Tensor) -> Tensor:
        steps = change[..., 1:] - change[..., :-1]
        return steps.square().flatten(1).mean(1) / change.square().flatten(1).mean(1)

    assert (roughness(smooth - x) < 0.7).all()
    assert (roughness(white - x) > 1.4).all()
    changed = (patch != x).any(1)
    mask = patches((4, 8, 8), rng)[:, 0]
    assert torch.equal(changed, mask)
    assert torch.equal(patch, torch.where(mask[:, None], other, x))
    assert 1 <= mask.flatten(1).sum(1).min() < mask.flatten(1).sum(1).max() <= 25
    share = ((mixture - x) * (far - x)).flatten(1).sum(1) / (far - x).square().flatten(1).sum(1)
    torch.testing.assert_close(mixture, x + share[:, None, None, None] * (far - x), rtol=1e-4, atol=1e-4)
    assert 0.02 <= share.min() < 0.2 < 0.8 < share.max() <= 0.98
    assert torch.equal(shift, shifted(x, rng))


def test_a_shift_moves_a_ramp_by_at_most_its_width() -> None:
    ramp = torch.arange(8.0).expand(60, 1, 8, 8)
    moved = (shifted(ramp, KeyedRng(0, 0, tuple(range(60)))) - ramp)[:, 0, 4, 4]  # by the way along x, away from edges
    assert 1.0 < moved.abs().max() <= 1.5
    assert moved.min() < 0 < moved.max()
    assert len(moved.unique()) == 60


def test_estimates_are_taken_on_the_training_grid() -> None:
    def times(indices: int) -> Tensor:
        return estimate_times(VariancePreserving.from_betas(torch.full((indices,), 0.01)))

    assert times(1000).tolist() == list(range(19, 1000, 20))
    assert times(20).tolist() == list(range(20))
    assert len(times(128)) == 64, "the divisor nearest to 50"


def test_split_keeps_prompts_apart_and_partners_together() -> None:
    for groups, prompts, share in ((16, 9, 0.125), (256, 8346, 0.125), (64, 20, 0.125), (50, 50, 0.125), (8, 8, 0.4)):
        rows, (train, validation, heldout) = split(groups, min(groups, prompts), share)
        assert [*train, *validation, *heldout] == list(range(groups))
        sets = [{rows[i] for i in part} for part in (train, validation, heldout)]
        assert len(set.union(*sets)) == sum(map(len, sets))
        assert min(map(len, sets)) >= 2
        assert max(rows) < prompts
        for part in (train, validation, heldout):
            for item in part:
                assert partner(item) in part
                assert rows[partner(item)] != rows[item]
    assert len(set(distinct_prompts(["a", *PROMPTS, "a"], 8, 0))) == 8


class Blocky:
    """A toy network on pixels: colours of blocks and their contrasts."""

    name, weights_sha256, licence, input = "toy", "0" * 64, "none", "as it is"

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        small = F.avg_pool2d(pictures, 4) - 0.4
        return [small, F.avg_pool2d(small, 4).tanh() * 2]


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> Backbone:
    return load_backbone(tiny_pipeline)


def test_a_group_does_not_depend_on_its_batch(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sets, "pick_precision", lambda *_: "fp32")
    config = PairConfig(groups=16, steps=3)
    every = draw_groups(config, backbone, PROMPTS[:6], range(4, 10))
    two = draw_groups(config, backbone, PROMPTS[2:4], range(6, 8))
    assert every.shape == (6, 12, 4, 8, 8)
    torch.testing.assert_close(every[2:4], two, rtol=0, atol=5e-3)  # guidance enlarges rounding
    assert torch.equal(every[0, 11], every[1, 0]), "the other prompt's latent is the partner's"
    for i, j in PAIRS:
        assert (every[:, i] - every[:, j]).flatten(1).abs().amax(1).min() > 1e-4, (MEMBERS[i], MEMBERS[j])
    other = draw_groups(config.model_copy(update={"seed": 1}), backbone, PROMPTS[2:4], range(6, 8))
    assert (other - two).abs().amax((2, 3, 4)).min() > 1e-3


# learning


def toy_pair_set(groups: int = 48, seed: int = 0) -> PairSet:
    """Latents of which two of six channels are to be seen, and these saturate: L2 is misled."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(groups, 1, 6, 4, 4, generator=g)
    size = torch.exp(torch.empty(groups, 12, 6, 1, 1).uniform_(-4, 1, generator=g))
    latents = base + size * torch.randn(groups, 12, 6, 4, 4, generator=g)
    maps = [torch.cat([3 * x[:, :2].tanh(), torch.ones_like(x[:, :1])], 1) for x in latents]
    distances = torch.stack([pair_distances([x], PAIRS) for x in maps])
    parts = torch.arange(groups).split([groups - 24, 8, 16])
    return PairSet(latents, distances, *parts)


def toy_config(**loop: Any) -> LatentLpipsTrainConfig:
    config = {
        "network": SMALL.model_dump(),
        "mirror": 0.5,
        "loop": {"steps": 60, "batch": 8, "save_every": 20, "log_every": 20, "validate_every": 20, **loop},
        "optim": {"lr": 1e-2, "warmup": 5, "decay": "cosine", "ema": 0.9},
    }
    return validate(LatentLpipsTrainConfig, config)


def learn(config: LatentLpipsTrainConfig, folder: Path) -> LatentLPIPS:
    accelerator = make_accelerator("fp32", pick_device("cpu"))
    with RunLog(folder, config, title="toy", quiet=True) as log:
        return fit(config, toy_pair_set(), 6, log, accelerator)


def test_training_orders_held_out_pairs_better_than_latent_l2(tmp_path: Path) -> None:
    pair_set = toy_pair_set()
    heldout = pair_set.heldout
    trained = learn(toy_config(), tmp_path)
    found = compare_distances(trained, pair_set.latents[heldout], pair_set.distances[heldout])
    overall = found.overall()
    assert overall["l2"] < 0.8, "the toy world misleads L2"
    assert overall["network"] > max(overall["l2"], overall["huber"]) + 0.1
    kinds = found.by_kind()
    assert np.mean([k["network"] for k in kinds.values()]) > np.mean([k["l2"] for k in kinds.values()]) + 0.1
    error = log_error(torch.tensor(found.predicted["network"]), torch.tensor(found.pixel), torch.ones(11)).mean()
    assert float(error) < 0.5, "the distance itself, not only its order"
    assert draw_figure(found, tmp_path / "figure.webp").is_file()
    assert Image.open(tmp_path / "figure.webp").width > 800


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(steps=12, save_every=4, validate_every=None)
    whole = learn(config, tmp_path / "whole").state_dict()

    class KilledError(Exception):
        pass

    calls = 0
    right = training.log_error

    def fails(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KilledError
        return right(*arguments)

    monkeypatch.setattr(training, "log_error", fails)
    with pytest.raises(KilledError):
        learn(config, tmp_path / "killed")
    assert [path.name for path in checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-00000004"]
    monkeypatch.setattr(training, "log_error", right)
    again = learn(config, tmp_path / "killed").state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_error_is_of_logarithms_and_named_pairs_weigh_more() -> None:
    weights = pair_weights(3.0)
    assert weights.sum() == 55 + 3 * 11
    wanted = torch.ones(1, 66)
    off = wanted.clone()
    off[0, PAIRS.index(KINDS["noise"])] = float(np.exp(0.3))
    assert float(log_error(off, wanted, weights)) == pytest.approx(0.3**2 * 3 / 88, rel=1e-3)
    assert float(log_error(off * 1e-3, wanted * 1e-3, weights)) == pytest.approx(0.3**2 * 3 / 88, rel=0.2)
    assert float(log_error(wanted * np.e, wanted, weights)) == pytest.approx(0.75, rel=1e-3), "linear from .5 on"


def test_rank_correlation_is_spearmans() -> None:
    draw = np.random.default_rng(0)
    a = draw.integers(0, 12, 200).astype(float)
    b = a + draw.integers(0, 9, 200)
    assert rank_correlation(a, b) == pytest.approx(float(spearmanr(a, b).statistic), abs=1e-12)
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert np.isnan(rank_correlation(a, np.ones(200)))


# the whole way


TINY = {
    "network": SMALL.model_dump(),
    "pairs": {"groups": 16, "steps": 2},
    "loop": {"steps": 4, "batch": 4, "save_every": 2, "log_every": 1, "validate_every": 4, "precision": "fp32"},
    "optim": {"lr": 1e-2, "decay": "constant"},
}


@pytest.fixture(scope="module")
def made(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distance for the tiny pipeline; pictures cannot be opened while it is made."""
    out = tmp_path_factory.mktemp("perceptual")

    def closed(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", closed)
        folder = make_latent_lpips(
            validate(LatentLpipsTrainConfig, TINY), backbone, PROMPTS, out / "run", pixel=Blocky(), quiet=True
        )
    assert folder == out / "run" / "perceptual"
    return folder


@pytest.mark.slow
def test_from_prompts_and_a_teacher_alone(made: Path, backbone: Backbone) -> None:
    record = read_json(made / "perceptual.json")
    assert record["vae"] == backbone.folder.identity("vae")
    assert (record["channels"], record["prompts"]) == (4, 12)
    assert record["pixel"]["name"] == "toy"
    assert not record["pixel"]["shared"]
    assert set(record["heldout"]["rank_correlation"]) == {"network", "l2", "huber"}
    assert set(record["heldout"]["by_kind"]) == set(KINDS)
    assert record["heldout"]["n"] == 11 * record["heldout"]["groups"] == 22
    assert (made.parent / "heldout.webp").is_file()
    net = load_latent_lpips(made, 4, record["vae"])
    assert not any(p.requires_grad for p in net.parameters())
    cached = sorted((made.parent / "cache").iterdir())
    assert len(cached) == 1, "the pairs are kept"
    # the record holds the figures of the file
    pair_set = pair_sets.make_pair_set(
        PairConfig(groups=16, steps=2), backbone, PROMPTS, Blocky(), made.parent / "cache", quiet=True
    )
    found = compare_distances(net, pair_set.latents[pair_set.heldout], pair_set.distances[pair_set.heldout]).overall()
    assert found == pytest.approx(record["heldout"]["rank_correlation"], abs=1e-9)


def test_a_finished_one_is_returned_and_another_refused(
    made: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "make_pair_set", None)
    config = validate(LatentLpipsTrainConfig, TINY)
    again = make_latent_lpips(config, backbone, PROMPTS, made.parent, pixel=Blocky(), quiet=True)
    assert again == made
    with pytest.raises(UserError, match="distance of another training"):
        make_latent_lpips(config, backbone, PROMPTS[1:], made.parent, pixel=Blocky(), quiet=True)


@pytest.mark.slow
def test_pairs_that_were_cut_off_go_on(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between shards and during training: the same bytes."""
    config = validate(LatentLpipsTrainConfig, TINY)
    monkeypatch.setattr(pair_sets, "SHARD", 8)
    right = pair_sets.picture_distances
    calls = 0

    def once(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(pair_sets, "picture_distances", once)
    with pytest.raises(KeyboardInterrupt):
        make_latent_lpips(config, backbone, PROMPTS, tmp_path, pixel=Blocky(), quiet=True)
    kept = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(kept) == 1
    make_latent_lpips(config, backbone, PROMPTS, tmp_path, pixel=Blocky(), quiet=True)
    assert calls == 3, "the first shard was not made again"
    whole = tmp_path / "whole"  # in shards of the same size: on some machines a batch of another one rounds otherwise
    make_latent_lpips(config, backbone, PROMPTS, whole, pixel=Blocky(), quiet=True)
    weights = [(folder / "perceptual" / "perceptual.safetensors").read_bytes() for folder in (whole, tmp_path)]
    assert weights[0] == weights[1]


def test_refusals(made: Path, tmp_path: Path, tiny_pipeline: Path) -> None:
    record = read_json(made / "perceptual.json")
    with pytest.raises(UserError, match=r"another autoencoder \(4 channels, .*\(4 channels, fff"):
        load_latent_lpips(made, 4, "f" * 64)
    with pytest.raises(UserError, match=r"\(16 channels"):
        load_latent_lpips(made, 16, record["vae"])
    with pytest.raises(UserError, match=r"holds no perceptual.json"):
        load_latent_lpips(tmp_path, 4, record["vae"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "perceptual.safetensors").write_bytes((made / "perceptual.safetensors").read_bytes())
    write_json(broken / "perceptual.json", {**record, "weights_sha256": "0" * 64})
    with pytest.raises(UserError, match="is not the file that"):
        load_latent_lpips(broken, 4, record["vae"])
    write_json(broken / "perceptual.json", {k: v for k, v in record.items() if k != "vae"})
    with pytest.raises(UserError, match="'vae'"):
        load_latent_lpips(broken, 4, record["vae"])
    few = tmp_path / "few.txt"
    few.write_text("a\nb\na\n")
    with pytest.raises(UserError, match=r"2 distinct prompts; .* at least 8"):
        train_perceptual(out=tmp_path / "out", prompts=few, teacher=tiny_pipeline)
    with pytest.raises(UserError) as error:
        train_latent_lpips(out=tmp_path / "out", teacher=tiny_pipeline)
    assert error.value.field == "prompt_file"
    with pytest.raises(UserError, match=r"groups = 17 must be even"):
        train_perceptual(out=tmp_path / "out", overrides="pairs.groups=17")
    with pytest.raises(UserError, match=r"blocks = \[2\] .* widths = \[8, 8\]"):
        train_perceptual(out=tmp_path / "out", overrides=["network.widths=[8, 8]", "network.blocks=[2]"])
    assert not (tmp_path / "out").exists()


def test_all_pairs_are_ranked_by_their_ends() -> None:
    assert [tuple(pair) for pair in ENDS.T.tolist()] == list(PAIRS)
