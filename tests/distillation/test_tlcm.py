"""TLCM from end to end on a tiny pipeline: from a prompt file and the teacher alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from fewstep import synthesize
from fewstep.backbones.pipeline_folder import read_folder
from fewstep.common.errors import UserError
from fewstep.common.files import read_json
from fewstep.common.rng import KeyedRng
from fewstep.common.tensors import digest, load_tensors
from fewstep.data import images as pictures
from fewstep.distillation import distill as distillation
from fewstep.distillation.batches import fetch_of
from fewstep.distillation.checks import check_distillation
from fewstep.distillation.config import DistillConfig, resolve
from fewstep.inference.generator import load_image_generator
from fewstep.methods.cost import step_calls
from fewstep.methods.times import in_turn
from fewstep.training.student import unique_bytes
from fewstep_worlds.stickers import dataset as stickers
from support.interrupt import stopped_in_call
from support.scorer_references import write_clip

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("disc", "square", "ring", "bar")]


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


STAGES = ("segments", "joined", "preference", "matching")


@pytest.fixture(scope="session")
def words(tiny_pipeline: Path, prompt_file: Path, scorer: Path) -> list[str]:
    """The shipped recipe at a tiny size: two steps a stage, four of the last."""
    tiny = [f"stages.{name}.share={share}" for name, share in zip(STAGES, (1, 1, 1, 2), strict=True)]
    tiny += [f"stages.{name}.loop.batch=2" for name in ("preference", "matching")]
    tiny += [f"stages.{name}.optim.lr=1e-2" for name in STAGES[1:]]
    tiny += [
        f"stages.preference.method.reward.scorer=clip:{scorer}", "stages.preference.method.reward.s0=30.0",
        "stages.matching.method.matching.every=2", "stages.matching.method.adversarial.every=2",
    ]  # fmt: skip
    return [
        f"teacher={tiny_pipeline}", f"data.source={prompt_file}", "device=cpu", "student.rank=4",
        "student.targets=[to_q,conv1]", "loop.steps=10", "loop.batch=4", "loop.log_every=1", "loop.save_every=1",
        "loop.validate_every=null", "optim.lr=1e-2", *tiny, "latent_lpips.pairs.groups=16",
        "latent_lpips.pairs.steps=2", "latent_lpips.loop.steps=2", "latent_lpips.loop.batch=2",
        "latent_lpips.loop.validate_every=null",
    ]  # fmt: skip


def weights_of(student: Path) -> dict[str, torch.Tensor]:
    return load_tensors(student)


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> tuple[DistillConfig, Path]:
    config = resolve("tlcm", None, words)
    out = tmp_path_factory.mktemp("whole")
    distillation.distill(config, out, cache=tiny_cache, quiet=True)
    return config, out


@pytest.mark.slow
def test_no_picture_is_opened(
    words: list[str], whole: tuple[DistillConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to read one is barred; the end of a stage is then measured against the teacher's pictures."""

    def barred(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a picture was opened")

    for place, name in (
        (PIL.Image, "open"),
        (pictures, "read_picture"),
        (pictures, "from_folder"),
        (stickers, "draw_all"),
        (stickers, "load_sprites"),
    ):
        monkeypatch.setattr(place, name, barred)
    watched = [*words, "loop.validate_every=100", "validation.count=16", "validation.teacher_steps=2"]
    config = resolve("tlcm", None, watched)
    student = distillation.distill(config, tmp_path / "run", quiet=True)
    assert digest(weights_of(student)) == digest(weights_of(whole[1] / "student" / student.name))
    names = ["1-segments", "2-joined", "3-preference", "4-matching"]
    folders = [tmp_path / "run" / "stages" / name for name in names]
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == names
    for folder, steps in zip(folders, (2, 2, 2, 4), strict=True):
        names = sorted(path.name for path in (folder / "grids").iterdir())
        assert names == ["step-00000000.webp", f"step-{steps:08d}.webp"]
        assert "validation/kid" in (folder / "log.jsonl").read_text(encoding="utf-8")
        assert (folder / "student" / student.name).is_file()


def test_the_student_draws_at_two_to_eight_calls(whole: tuple[DistillConfig, Path], tiny_pipeline: Path) -> None:
    config, out = whole
    student = out / "student" / "pytorch_lora_weights.safetensors"
    image_generator = load_image_generator(tiny_pipeline, student)
    assert image_generator.sampling == config.sampling
    assert (image_generator.sampling.spacing, image_generator.sampling.gamma) == ("tlcm", 1.0)
    drawn = {}
    for steps in range(2, 9):
        sampling = image_generator.sampling.model_copy(update={"steps": steps, "gamma": 0.0})
        drawn[steps] = image_generator.draw(["a red disc"], [3], sampling)
    assert len({picture.tobytes() for picture in drawn.values()}) == 7


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 3, 4, 6, 8])
def test_killed_in_any_stage_it_ends_where_the_uninterrupted_run_ends(
    last: int, whole: tuple[DistillConfig, Path], tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second step of each stage, and between two: bit for bit the same student."""
    config, out = whole

    def run() -> Path:
        return distillation.distill(config, tmp_path / "cut", cache=tiny_cache, quiet=True)

    stopped_in_call(monkeypatch, last, run)
    assert list((tmp_path / "cut").rglob("step-*")), "something was kept"
    student = run()
    assert digest(weights_of(student)) == digest(weights_of(out / "student" / student.name))
    for folder in sorted((out / "stages").iterdir()):
        own = read_json(tmp_path / "cut" / "stages" / folder.name / "evaluations.json")
        assert own == read_json(folder / "evaluations.json"), "counted over both halves"


@pytest.mark.slow
def test_stored_trajectories_feed_it(
    words: list[str], prompt_file: Path, tiny_pipeline: Path, tmp_path: Path, tiny_cache: Path
) -> None:
    """The commands of docs/guide/synthesis.md: the first stage makes no teacher calls, the others are unchanged."""
    drawn = ["grid=40", "each=2", "shard=8", "guidance.low=2", "guidance.high=4", "device=cpu"]
    trajectories = synthesize(
        prompt_file,
        out=tmp_path / "trajectories",
        teacher=tiny_pipeline,
        kind="trajectories",
        overrides=[*drawn, "end=clean"],
    )
    own = "stages.segments.method"
    settings = [f"{own}.start=trajectory", f"{own}.point=stored", f"{own}.grid=40", f"{own}.k=1"]
    config = resolve("tlcm", None, [*words, f"data.source={trajectories}", *settings])
    distillation.distill(config, tmp_path / "run", cache=tiny_cache, quiet=True)
    first, second, *_ = sorted((tmp_path / "run" / "stages").iterdir())
    assert read_json(first / "evaluations.json")["a_sample_and_step"] == {"student": 2}
    assert read_json(second / "evaluations.json")["a_sample_and_step"]["teacher"] > 0


def test_evaluations_are_counted_and_as_stated(whole: tuple[DistillConfig, Path]) -> None:
    """The calls counted in each stage are those of the recipe; a target that is the student counts as it."""
    config, out = whole
    for folder, stage in zip(sorted((out / "stages").iterdir()), config.each_stage(), strict=True):
        counted = read_json(folder / "evaluations.json")["a_sample_and_step"]
        stated = step_calls(stage.method)
        if stage.method.start == "rollout":  # as many steps as the points are clean that were drawn
            loop, lengths = stage.loop, torch.tensor(stage.method.rollout_steps)
            rows = 0
            for step in range(loop.steps):
                rng = KeyedRng(loop.seed, step, tuple(range(step * loop.batch, (step + 1) * loop.batch)))
                left = lengths[in_turn(rng, 8, 1000)]
                rows += sum(max(1, int((left > number).sum())) for number in range(8))
            steps = rows / (loop.steps * loop.batch)
            assert steps == pytest.approx(4.5, abs=0.8)
            assert counted == {"student": 2, "teacher": pytest.approx(2 * steps + 2)}
        else:
            assert counted == pytest.approx(stated), folder.name


def test_base_weights_are_stored_once_for_four_roles(words: list[str], tiny_cache: Path) -> None:
    """Teacher, student, fake score and the critic's features: the storage of one network and two adapters."""
    config = resolve("tlcm", None, words).each_stage()[3]
    run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
    (network,) = run.networks
    adapters = {role: run.student.roles.parameters(role) for role in ("student", "fake")}
    sizes = [sum(p.nbytes for p in adapter.values()) for adapter in adapters.values()]
    exclusive = unique_bytes(run.backbone.fresh_network())
    assert unique_bytes(network) == exclusive + sum(sizes)
    assert sizes[0] == sizes[1] > 0
    estimated = distillation.estimate(run, run.update_plan())
    assert estimated.base_bytes == exclusive
    assert list(estimated.trained) == ["student", "fake", "critic"]
    assert estimated.trained["student"] == sizes[0]


def test_the_fake_score_starts_as_the_teacher_and_leaves_it(words: list[str], tiny_cache: Path) -> None:
    """Not as the student of the stage before; its own step moves it and nothing else."""
    config = resolve("tlcm", None, words).each_stage()[3]
    run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
    student = {name: torch.randn_like(p) for name, p in run.student.parameters("student").items()}
    distillation.start_from(config.method, run.student, student)
    fake = run.student.parameters("fake")
    ups = [p for name, p in fake.items() if "lora_B" in name]
    assert all(float(p.detach().abs().max()) == 0 for p in ups)
    plan = {update.name: update for update in run.update_plan()}
    assert [plan[name].every for name in ("student", "fake", "critic")] == [2, 1, 2]
    optimiser = torch.optim.SGD(plan["fake"].parameters.values(), lr=1.0)
    rng = KeyedRng(0, 0, (0, 1))
    plan["fake"].loss(fetch_of(run)(np.arange(2), rng), rng).value.backward(
        inputs=list(plan["fake"].parameters.values())
    )
    optimiser.step()
    assert all(float(p.detach().abs().max()) > 0 for p in ups)
    assert digest(run.student.parameters("student")) == digest(student)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_split_into_micro_batches_is_no_choice(stage: int, words: list[str], tiny_cache: Path) -> None:
    """Roll-outs, own samples, fake score and critic: the mean gradient of two halves is that of the whole batch."""
    config = resolve("tlcm", None, words).each_stage()[stage]
    run = distillation.prepare(config, tiny_cache, torch.device("cpu"))
    for role in ("student", "fake")[: 1 + (stage == 3)]:
        for number, parameter in enumerate(run.student.parameters(role).values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.copy_(0.05 * noise)
    plan = run.update_plan()

    def gradients(indices: tuple[int, ...]) -> list[torch.Tensor]:
        rng = KeyedRng(5, 0, indices)
        batch = fetch_of(run)(np.array(indices), rng)
        found = []
        for update in plan:
            weights = list(update.parameters.values())
            grads = torch.autograd.grad(update.loss(batch, rng).value, weights, allow_unused=True)
            found.append(torch.cat([g.flatten() for g in grads if g is not None]))
        return found

    whole = gradients((0, 1, 2, 3))
    halves = [gradients(part) for part in ((0, 1), (2, 3))]
    for update, one, first, second in zip(plan, whole, *halves, strict=True):
        away = float(((first + second) / 2 - one).norm())
        assert away < 1e-3 * float(one.norm()), update.name
        assert float((first - second).norm()) > 0.1 * float(one.norm()), "the halves are not alike"


def test_stages_see_other_prompts_and_other_noise(words: list[str]) -> None:
    seeds = [stage.loop.seed for stage in resolve("tlcm", None, words).each_stage()]
    assert seeds[0] == 0
    assert len(set(seeds)) == 4
    others = [stage.loop.seed for stage in resolve("tlcm", None, [*words, "loop.seed=1"]).each_stage()]
    assert not set(seeds) & set(others)


def test_another_length_of_a_list_of_stages_is_refused_at_once(
    whole: tuple[DistillConfig, Path], words: list[str]
) -> None:
    """It would split all stages anew, under students that are trained already."""
    from fewstep.training.run_folder import check_same_run

    with pytest.raises(UserError, match=r"another loop\.steps \(10, now 20\)"):
        check_same_run(whole[1], resolve("tlcm", None, [*words, "loop.steps=20"]))


STORED = [
    "method.start=trajectory", "method.grid=10", "method.k=2", "method.segments=1", "method.s=edge",
    "method.end=clean", "method.jump=first_order", "method.distance=l2", "method.guidance.convention=imagen",
    "method.guidance.low=3", "method.guidance.high=3", "method.weight=none", "loop.steps=4", "student.rank=4",
    "sampling.grid=10", "sampling.end=clean", "loop.batch=4", "loop.validate_every=null", "optim.lr=1e-2", "device=cpu",
    "student.targets=[to_q,conv1]",
]  # fmt: skip


def test_from_stored_points_a_step_makes_no_teacher_call(
    tiny_pipeline: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Equal pairs, equal students: once by the teacher's step, once by its stored outputs.

    Students differ by a hundredth of what either learned, which is rounding: AdamW's first steps are of full size
    wherever a gradient is not zero.
    """
    guidance = ["guidance.convention=imagen", "guidance.low=3", "guidance.high=3"]
    drawn = ["grid=10", "end=clean", "each=2", "dtype=fp32", *guidance]
    folder = synthesize(prompt_file, out=tmp_path / "set", teacher=tiny_pipeline, kind="trajectories", overrides=drawn)
    students, counted = {}, {}
    for point in ("solver", "stored"):
        words = [*STORED, f"teacher={tiny_pipeline}", f"data.source={folder}", f"method.point={point}"]
        config = resolve("tcd", None, words)
        out = tmp_path / point
        student = distillation.distill(config, out, quiet=True)
        students[point] = weights_of(student)
        counted[point] = read_json(out / "evaluations.json")["a_sample_and_step"]
    assert counted["stored"] == {"student": 2}
    assert counted["solver"] == {"student": 2, "teacher": 2}
    learned = {name: value.float() for name, value in students["solver"].items() if "lora_B" in name}
    apart = {name: students["stored"][name].float() - value for name, value in learned.items()}
    for name, value in learned.items():  # B begins at zero
        assert float(value.norm()) > 0.01
        assert float(apart[name].norm()) < 0.01 * float(value.norm()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["cd", "ct", "ctm", "lcm", "mcm", "pcm", "shortcut", "tcd", "tcd-2", "tcd-s", "tdd", "tscd"]
)
def test_every_consistency_recipe_trains_from_stored_points(
    recipe: str, tiny_pipeline: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Those that step by Heun by DDIM: then no step of any calls the teacher, by the program's own count."""
    place = tmp_path / "set"
    words = ["method.solver=ddim", "method.substeps=1", "loop.steps=4", "loop.batch=4", "student.rank=2", "device=cpu"]
    words += ["method.start=trajectory", "method.point=stored", "method.grid=40", "sampling.grid=40", "optim.lr=1e-2"]
    words += [f"teacher={tiny_pipeline}", f"data.source={place}", "loop.validate_every=null"]
    beside = {"ctm": ["method.denoising=0", "method.adversarial.real=target"], "shortcut": ["method.k=39"]}
    config = resolve(recipe, None, [*words, *beside.get(recipe, [])])
    drawn = ["grid=40", "each=1", f"end={config.method.end}", "device=cpu"]
    synthesize(prompt_file, out=place, teacher=tiny_pipeline, kind="trajectories", overrides=drawn)
    distillation.distill(config, tmp_path / "run", quiet=True)
    counted = [read_json(file)["a_sample_and_step"] for file in (tmp_path / "run").rglob("evaluations.json")]
    assert len(counted) == max(1, len(config.stages))
    assert all("teacher" not in calls and calls["student"] >= 1 for calls in counted), counted


def test_latents_of_a_set_are_data(tiny_pipeline: Path, prompt_file: Path, tmp_path: Path) -> None:
    folder = synthesize(prompt_file, out=tmp_path / "set", teacher=tiny_pipeline, overrides=["grid=2", "dtype=fp32"])
    words = [f"teacher={tiny_pipeline}", f"data.source={folder}", "loop.steps=2", "loop.batch=4", "student.rank=2"]
    config = resolve("tcd", None, [*words, "device=cpu", "loop.validate_every=null"])
    noisy = synthesize(
        prompt_file, out=tmp_path / "noisy", teacher=tiny_pipeline, overrides=["grid=2", "dtype=fp32", "end=index0"]
    )
    of_noisy = config.model_copy(update={"data": config.data.model_copy(update={"source": str(noisy)})})
    with pytest.raises(UserError, match=r"not clean \(end = 'index0'\)"):
        distillation.prepare(of_noisy, tmp_path / "cache", torch.device("cpu"))
    run = distillation.prepare(config, tmp_path / "cache", torch.device("cpu"))
    assert len(run.data) == len(PROMPTS)
    assert run.data.prompts == tuple(PROMPTS)
    assert float(run.data.latents[torch.arange(len(PROMPTS))].std()) > 0.1
    distillation.distill(config, tmp_path / "run", quiet=True)


def test_a_set_is_of_one_size(tiny_pipeline: Path, prompt_file: Path, tmp_path: Path) -> None:
    folder = synthesize(prompt_file, out=tmp_path / "set", teacher=tiny_pipeline, overrides=["grid=2"])
    common = [f"teacher={tiny_pipeline}", f"data.source={folder}", "loop.validate_every=null"]
    size = read_folder(tiny_pipeline).picture_size
    config = resolve("tcd", None, [*common, f"data.size={2 * size}"])
    with pytest.raises(UserError, match=rf"use {size}") as refused:
        check_distillation(config, read_folder(tiny_pipeline))
    assert refused.value.field == "data.size"
    check_distillation(resolve("tcd", None, [*common, f"data.size={size}"]), read_folder(tiny_pipeline))


def test_what_prompts_alone_cannot_do_is_refused(words: list[str], tiny_pipeline: Path, prompt_file: Path) -> None:
    folder = read_folder(tiny_pipeline)
    for changes, field in (
        (["stages=[]", "method.start=data"], "method.start"),
        (["stages=[]", "method.point=stored", "method.start=trajectory"], "method.point"),
    ):
        config = resolve("tlcm", None, [*words, *changes])
        with pytest.raises(UserError) as refused:
            check_distillation(config, folder)
        assert refused.value.field == field


def test_r1_is_taken_beside_fused_attention(tiny_pipeline: Path) -> None:
    """The teacher as it is loaded: fused attention has no second derivative, which R1's gradient is made of."""
    from fewstep.backbones.base import load_backbone
    from fewstep.methods.adversarial import FeatureCritic, discriminate
    from fewstep.methods.term_config import AdversarialConfig

    backbone = load_backbone(tiny_pipeline)
    text = {"text": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}
    critic = FeatureCritic(lambda x, t, c: backbone.features(backbone.network, x, t, c), backbone.feature_channels)
    with torch.no_grad():  # fresh heads return 0, with zero gradient
        for head in critic.heads:
            head[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.full((2,), 300.0, dtype=torch.float64)
    losses = {}
    for r1 in (0.0, 2.0):
        config = AdversarialConfig(weight=1.0, kind="nonsaturating", r1=r1)
        losses[r1] = discriminate(config, critic, (x, t), (x + 1, t), text).value
    slope = torch.zeros_like(x)
    for i in range(2):  # by hand: half the weight times the squared slope of the mean logit's sum
        own = x[i : i + 1].clone().requires_grad_()
        one = {"text": text["text"][i : i + 1]}
        slope[i] = torch.autograd.grad(critic(own, t[:1], one).sum(), own)[0][0]
    by_hand = slope.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(losses[2.0] - losses[0.0], by_hand, rtol=1e-3, atol=1e-5)
    losses[2.0].backward()
    assert float(critic.heads[0][-1].weight.grad.abs().max()) > 0


def test_stages_and_seeds_share_one_distance(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A world's captions are drawn anew for each; the distance is trained once, and not for a stage without it."""
    from types import SimpleNamespace

    from fewstep.data.images import from_prompts
    from fewstep.data.sources import PromptFile, WorldData
    from fewstep.distillation.frozen_networks import latent_lpips_folder
    from fewstep.distillation.latent_lpips import train

    requests = []

    def make(config: Any, backbone: Any, prompts: Any, place: Path) -> Path:
        requests.append((config, tuple(prompts), place))
        return place

    monkeypatch.setattr(train, "make_latent_lpips", make)
    backbone: Any = SimpleNamespace(folder=SimpleNamespace(identity=lambda: "teacher"))

    def captions_alone(captions: int, seed: int) -> Any:
        return from_prompts([f"caption {number} of seed {seed}" for number in range(captions)])

    world: Any = SimpleNamespace(captions_alone=captions_alone)
    for seed in (0, 3):
        words = ["data.source=captions", "data.captions=2", f"loop.seed={seed}", "stages.matching.method.consistency=0"]
        config = resolve("tlcm", None, words)
        for stage in config.each_stage():
            source = WorldData(world, pictures=False)
            latent_lpips_folder(stage, source, backbone, [f"captions of {stage.loop.seed}"], Path("cache"))
    assert len(requests) == 6  # of four stages one has no consistency loss
    assert {captions for _, captions, _ in requests} == {("caption 0 of seed 0", "caption 1 of seed 0")}
    assert len({place for _, _, place in requests}) == 1
    latent_lpips_folder(config, PromptFile(("a prompt",)), backbone, ["a prompt"], Path("cache"))
    assert requests[-1][1] == ("a prompt",)
    assert requests[-1][2] != requests[0][2]
