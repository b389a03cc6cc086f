"""Add-ons on students: measures on constructed pictures, and each add-on trained, written, read back and drawn with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from conftest import write_text_encoder
from fewstep.backbones.base import load_backbone
from fewstep.common.errors import UserError
from fewstep.common.tensors import save_tensors
from fewstep_worlds.common.autoencoder import make_vae, to_tensor
from fewstep_worlds.common.denoiser import make_unet
from fewstep_worlds.common.pipeline import write_teacher
from fewstep_worlds.stickers.claim import Facts, facts_of
from fewstep_worlds.stickers.heldout import held_out_kinds
from fewstep_worlds.stickers.scene import SIDE
from fewstep_worlds.stickers.settings import AutoencoderConfig, TeacherConfig
from fewstep_worlds.stickers.vocabulary import HELD_OUT_STYLE, NAMES, STYLES
from fewstep_worlds.studies import api
from fewstep_worlds.studies.addons import measures, scenes, training
from fewstep_worlds.studies.addons import tasks as tasks_module
from fewstep_worlds.studies.addons.figure import kept_share, kept_text, measure_task, table
from fewstep_worlds.studies.addons.ip_adapter import TOKENS, initial_projection
from fewstep_worlds.studies.addons.pipelines import Model, call_arguments, can_draw, draw_pictures, images, pipeline
from fewstep_worlds.studies.addons.tasks import TASKS, Study, Task, bare
from fewstep_worlds.studies.settings import AddOnConfig, VersatilityConfig
from support.random_lora import random_lora
from support.shapes import draw_shape
from support.sticker_world import make_world, tiny_reader

# ---------------------------------------------------------------------------------------------------- pictures alone


def test_edges_lie_between_levels_and_are_compared_with_slack() -> None:
    pictures = np.stack([draw_shape("red", "disc"), draw_shape("blue", "bar")])
    outline = measures.edges(pictures)
    assert outline[0, 32, 32] < 1e-6
    assert outline[0, 32, 31 - 22] == 1
    np.testing.assert_allclose(measures.edge_likeness(pictures, outline), 1, atol=1e-6)
    assert (measures.edge_likeness(pictures[::-1], outline) < 0.6).all()
    assert (measures.edge_likeness(np.roll(pictures, 1, axis=2), outline) > 0.8).all(), "a pixel aside is the same edge"
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 64, 3))
    np.testing.assert_allclose(measures.edges(ramp)[0, 1:-1], 8 / 255, rtol=1e-5)
    np.testing.assert_allclose(measures.edges(ramp.swapaxes(1, 2)), measures.edges(ramp).swapaxes(1, 2), rtol=1e-5)


def test_detail_is_right_in_so_far_as_it_is_what_was_lost() -> None:
    pictures = np.stack([draw_shape("red", "disc"), draw_shape("blue", "bar")])
    rough = measures.blurred(pictures, 4)
    assert measures.detail_likeness(rough, rough, pictures).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(measures.detail_likeness(pictures, rough, pictures), 1)
    halfway = ((rough.astype(float) + pictures) / 2).round().astype(np.uint8)
    assert (measures.detail_likeness(halfway, rough, pictures) > 0.98).all(), "the right detail, too faint"
    assert (measures.detail_likeness(pictures[::-1], rough, pictures) < 0.5).all(), "another picture's"


def test_distances_and_what_is_kept_outside_a_mask() -> None:
    black, grey = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 51, np.uint8)
    assert measures.distance(black, grey).tolist() == [0.2]
    mask = np.zeros((1, 4, 4), bool)
    mask[:, :, 2:] = True
    half = np.where(mask[..., None], grey, black)
    assert measures.kept(half, black, mask).tolist() == [1.0]
    assert measures.kept(half, black, ~mask).tolist() == [0.8]


# ------------------------------------------------------------------------------------------------------------ scenes


def test_arranged_scenes_have_their_arrangement_and_others_seldom_do() -> None:
    for index in range(150):
        prompt = scenes.make_prompt("arranged", 3, index)
        stickers = prompt.scene.stickers
        name = prompt.text.rpartition(", in a ")[2]
        assert scenes.arrangement([(s.x, s.y) for s in stickers]) == name
        assert prompt.claim.things == ((stickers[0].concept, len(stickers)),)
        for number, one in enumerate(stickers):
            assert one.size / 2 <= min(one.x, one.y)
            assert max(one.x, one.y) <= SIDE - one.size / 2
            assert all(math.hypot(one.x - s.x, one.y - s.y) >= one.size for s in stickers[:number])
        background = prompt.scene.background
        assert not held_out_kinds(set(prompt.scene.counts), prompt.scene.style, background.colour)
    others = [scenes.make_prompt("open", 3, index).scene.stickers for index in range(1000)]
    found = [scenes.arrangement([(s.x, s.y) for s in some]) for some in others if len(some) >= 3]
    assert sum(name is not None for name in found) < 0.03 * len(found)


def test_prompts_of_the_held_out_style_state_it() -> None:
    for index in range(30):
        prompt = scenes.make_prompt("style", 3, index)
        assert prompt.claim.style == prompt.scene.style == HELD_OUT_STYLE
        assert HELD_OUT_STYLE in prompt.text


def moved(facts: Facts, by: float) -> Facts:
    """The same stickers elsewhere."""
    return replace(facts, places=tuple((concept, x + by, y) for concept, x, y in facts.places))


def renamed(facts: Facts) -> Facts:
    """Stickers of other concepts at the same places."""
    other = {name: NAMES[(number + 7) % len(NAMES)] for number, name in enumerate(NAMES)}
    return replace(facts, places=tuple((other[concept], x, y) for concept, x, y in facts.places))


@pytest.mark.parametrize("kind", ["open", "style", "arranged"])
def test_measures_are_1_for_the_scene_itself_and_0_for_others(kind: scenes.Kind) -> None:
    for prompt in scenes.unseen_prompts(kind, 20):
        facts = facts_of(prompt.scene)
        seen = replace(facts, style=STYLES[0]) if kind == "style" else facts  # what a reader without that style finds
        empty = replace(facts, places=())
        assert scenes.agrees(seen, prompt) == 1
        assert scenes.agrees(renamed(facts), prompt) == 0
        assert scenes.same_places(moved(renamed(facts), 5), prompt) == 1
        assert scenes.same_places(moved(facts, 100), prompt) == scenes.same_places(empty, prompt) == 0
        assert scenes.same_stickers(moved(facts, 100), prompt) == 1
        assert scenes.same_stickers(renamed(facts), prompt) == scenes.same_stickers(empty, prompt) == 0
        if kind == "arranged":
            assert scenes.is_arranged(facts, prompt) == 1
            squeezed = replace(facts, places=tuple((name, x / 20, y / 20) for name, x, y in facts.places))
            assert scenes.is_arranged(renamed(facts), prompt) == scenes.is_arranged(squeezed, prompt) == 0


def test_half_the_stickers_count_half() -> None:
    prompt = next(p for p in scenes.unseen_prompts("open", 99) if tuple(p.scene.counts.values()) == (4,))
    facts = facts_of(prompt.scene)
    one = replace(facts, places=facts.places[:1])
    assert scenes.same_stickers(one, prompt) == pytest.approx(2 / 5)
    assert scenes.same_places(replace(facts, places=(*facts.places, ("cat", 500.0, 0.0))), prompt) == 8 / 9


@pytest.fixture
def sheets(sticker_sheets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sheets that scenes are drawn from."""
    monkeypatch.setenv("FEWSTEP_STICKERS", str(sticker_sheets))
    return sticker_sheets


def test_silhouettes_cover_the_stickers(sheets: Path) -> None:
    prompts = scenes.unseen_prompts("open", 20)
    pictures = scenes.pictures_of(prompts)
    for prompt, picture, covered in zip(prompts, pictures, scenes.silhouettes(pictures, prompts), strict=True):
        sizes = [sticker.size for sticker in prompt.scene.stickers]  # of discs, whose rims are a blurred pixel
        assert sum(math.pi / 4 * size**2 for size in sizes) < covered.sum()
        assert covered.sum() < sum(math.pi / 4 * (size + 3) ** 2 for size in sizes)
        assert (picture[~covered] > 60).all()


def test_incomplete_pictures_lack_what_their_mask_covers(sheets: Path) -> None:
    prompts, given, masks = scenes.incomplete(20)
    changed = (given != scenes.pictures_of(prompts)).any(3)
    assert changed.any((1, 2)).all()
    assert not (changed & ~masks).any()
    cells = masks.reshape(-1, 16, 4, 16, 4)
    assert (cells.all((2, 4)) == cells.any((2, 4))).all()
    for prompt in prompts:
        first = replace(facts_of(prompt.scene), places=facts_of(prompt.scene).places[:1])
        assert (scenes.agrees(facts_of(prompt.scene), prompt), scenes.agrees(first, prompt)) == (1, 0)


@pytest.mark.slow
def test_a_style_reader_recognises_the_held_out_style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, style in enumerate(STYLES):
        sheet = Image.new("RGBA", (512, 512))
        ImageDraw.Draw(sheet).rectangle((0, 0, 511, 511), fill=(80 * number, 0, 240 - 80 * number, 255))
        sheet.save(tmp_path / f"{style}.webp", lossless=True)
    monkeypatch.setenv("FEWSTEP_STICKERS", str(tmp_path))
    reader = tiny_reader()
    config = AddOnConfig(steps=240, batch=16, lr=1e-2)
    trained = scenes.train_style_reader(reader, config, tmp_path / "run")
    prompts = [scenes.make_prompt(kind, 1, index) for index in range(40) for kind in ("open", "style")]
    pictures = scenes.pictures_of(prompts)
    assert scenes.by_reader(trained, scenes.same_style, prompts)(pictures).mean() > 0.8
    x = to_tensor(pictures)
    heat = reader(x)["heat"]
    torch.testing.assert_close(heat, tiny_reader()(x)["heat"])  # the other one stays
    again = scenes.train_style_reader(reader, config, tmp_path / "run")
    torch.testing.assert_close(again(x)["style"], trained(x)["style"])


# ------------------------------------------------------------------------------------------------------------ figures


def test_the_share_that_is_kept() -> None:
    """(student's effect)/(base's effect) of means; none where the base does nothing."""
    rng = np.random.default_rng(0)
    base = rng.normal(1, 0.1, 50)
    kept = kept_share(0.9 * base, base, 0)
    assert kept is not None
    assert (kept.low, kept.value) == (pytest.approx(0.9), pytest.approx(0.9))
    for seed in (26, 137, 228):  # a base whose own effect is hardly one: some resamples' shares are far off
        faint, own = (np.random.default_rng(start + seed).normal(0.06, 0.28, 96) for start in (0, 1000))
        kept = kept_share(own, faint, 0)
        assert kept is not None
        assert kept.low is not None
        assert kept.high is not None
        assert kept.low <= kept.value <= kept.high
    assert kept_share(base, rng.normal(0, 1e-3, 50), 0) is None
    assert kept_share(base, -base, 0) is None, "a base that does harm keeps no score"


def test_calls_below_a_strength(tmp_path: Path) -> None:
    assert call_arguments(Model("base", None, 25, 3.0)) == {"guidance_scale": 3.0, "num_inference_steps": 25}
    assert call_arguments(Model("base", None, 4, 3.0), 0.3)["num_inference_steps"] == 14
    assert can_draw(Model("base", None, 25), 0.3)
    place = {}
    for name, own in (("tlcm", {"spacing": "tlcm"}), ("grid", {}), ("even", {"grid": 8})):
        place[name] = tmp_path / name / "pytorch_lora_weights.safetensors"
        place[name].parent.mkdir()
        save_tensors(place[name], {"x": torch.zeros(1)}, {"fewstep": json.dumps({"sampling": {"steps": 3, **own}})})
    # 4 calls below .5 are times 5 to 8 of a list of 8; below .3 they would be of a list of 14, which TLCM has not
    for name in ("tlcm", "even"):
        assert [can_draw(Model("TLCM", place[name], 4), share) for share in (1.0, 0.5, 0.3)] == [True, True, False]
    assert can_draw(Model("TCD", place["grid"], 4), 0.3)


class Painter:
    """A study whose models paint plain grey levels: (with the add-on, without it)."""

    config = VersatilityConfig()

    def __init__(self, out: Path, levels: dict[str, tuple[int, int]], base: Any) -> None:
        self.out, self.levels, self.base, self.drawn = out, levels, base, 0

    def draw(self, task: Task, model: Model) -> np.ndarray:
        self.drawn += 1
        level = self.levels[model.name][not task.name]
        return np.full((8, 4, 4, 3), level, np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None]


def test_a_row_is_measured_against_the_base_and_its_pictures_are_kept(tmp_path: Path, teacher: Path) -> None:
    lora = random_lora(teacher, tmp_path / "student")
    study: Any = Painter(tmp_path, {"base": (100, 40), "TCD": (90, 45)}, load_backbone(teacher))
    level: Callable[[np.ndarray], np.ndarray] = lambda pictures: pictures.mean((1, 2, 3))  # noqa: E731
    task = Task(
        "add-on", scenes.unseen_prompts("open", 8), np.zeros((8, 4, 4, 3), np.uint8), ("a", level), ("b", level)
    )
    models = [Model("base", None, 4), Model("TCD", lora, 2)]
    cells, sheets = measure_task(study, task, models)
    base, student = cells
    assert (base.value - base.without, student.value - student.without) == (60, 45)
    assert (base.kept, base.distance) == (None, None)
    assert student.kept is not None
    assert student.kept.value == pytest.approx(0.75)
    assert (student.distance, student.distance_without) == (pytest.approx(10 / 255), pytest.approx(5 / 255))
    assert student.change.value == pytest.approx(45)
    assert [int(sheet[0, 0, 0, 0]) for sheet in sheets] == [100, 90]
    text = table(cells, task, np.full((8, 4, 4, 3), 7, np.uint8))
    assert "| real scenes | 7.000 |" in text
    assert f"| TCD 2 | {student.without:.3f} to {student.value:.3f} | {kept_text(student)} |" in text
    drawn = study.drawn
    again, _ = measure_task(study, task, models)
    assert (again, study.drawn) == (cells, drawn)
    other = replace(task, prompts=task.prompts[::-1])
    measure_task(study, other, models)
    assert study.drawn == 2 * drawn
    given, _ = measure_task(study, replace(task, from_given=True), models)
    assert given[1].distance_without is None


# --------------------------------------------------------------------------------------- trained, read back and drawn


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of sticker scenes' classes with random weights: 64x64 pictures, 16x16x4 latents."""
    folder = tmp_path_factory.mktemp("addons")
    write_text_encoder(folder / "text")
    torch.manual_seed(1)
    unet = make_unet(TeacherConfig(channels=(16, 32, 32), heads=2, groups=8), 4, 16, 32, plain=1)
    vae = make_vae(AutoencoderConfig(channels=(8, 8, 8), groups=4))
    with torch.no_grad():
        unet.conv_out.weight.mul_(8)
        vae.quant_conv.weight[:4].mul_(4)
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-30)  # a posterior without noise
    write_teacher(folder / "teacher", vae, unet, folder / "text", omega=2.0)
    return folder / "teacher"


def encoder() -> Callable[[np.ndarray], torch.Tensor]:
    """A picture's levels in 4 x 4 blocks."""
    return lambda pictures: torch.from_numpy(pictures.reshape(-1, 4, 16, 4, 16, 3).mean((2, 4)).reshape(-1, 48)).float()


ADD_ONS = ("community", "style", "edges", "shapes", "picture")


@pytest.fixture
def study(teacher: Path, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Add-ons of a few steps, measured by a random reader."""
    monkeypatch.setattr(tasks_module, "FITTED", 16)
    lessons: Any = dict.fromkeys((*ADD_ONS, "style_reader"), AddOnConfig(steps=6, batch=4, lr=1e-2))
    config = VersatilityConfig(steps=(2,), base_steps=2, prompts=8, **lessons)
    return Study(config, tmp_path / "study", load_backbone(teacher), tiny_reader(), encoder())


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_changes_what_base_and_student_draw(study: Study, teacher: Path, name: str) -> None:
    """The add-on is trained on the base alone, read back by its own loader, and drawn with in diffusers' pipelines."""
    lora = random_lora(teacher, study.out / "student")
    task = TASKS[name](study)
    for model in (Model("base", None, 2, 3.0), Model("TCD", lora, 2)):
        pictures = study.draw(task, model)
        plain = task.given if task.from_given else study.draw(bare(task), model)
        assert pictures.shape == plain.shape == (8, 64, 64, 3)
        assert (np.abs(pictures.astype(int) - plain).max((1, 2, 3)) > 2).all()
        np.testing.assert_array_equal(study.draw(task, model), pictures)
        assert task.effect[1](pictures).shape == task.beside[1](pictures).shape == (8,)
    if name in ADD_ONS:
        changed = replace(study, config=study.config.model_copy(update={name: AddOnConfig(steps=6, batch=5, lr=1e-2)}))
        with pytest.raises(UserError, match="batch"):
            TASKS[name](changed)


def test_inpainting_leaves_what_is_outside_the_mask(study: Study, teacher: Path) -> None:
    task = TASKS["inpainting"](study)
    _, given, masks = scenes.incomplete(8)
    lora = random_lora(teacher, study.out / "student")
    for model in (Model("base", None, 2, 3.0), Model("TCD", lora, 2)):
        pipe = pipeline(task.kind, teacher, model)
        call = call_arguments(model) | {"image": images(given), "mask_image": images(masks), "strength": 1.0}
        latents = pipe([prompt.text for prompt in task.prompts], output_type="latent", **call).images
        apart = (latents - study.base.to_latents(given)).abs().amax(1).detach().numpy()
        hole = masks[:, ::4, ::4]
        assert apart[~hole].max() < 1e-3 < apart[hole].mean()
        drawn = task.beside[1](study.draw(task, model))
        assert (drawn > task.beside[1](study.restore(given)) - 0.1).all()


@pytest.mark.slow
def test_pictures_of_an_ip_adapter_follow_their_own_features(study: Study, teacher: Path) -> None:
    task = TASKS["picture"](study)
    assert task.features is not None
    for scale in (1.0, 2.0):
        pipe = pipeline(task.kind, teacher, Model("base", None, 2, scale))
        task.load(pipe)
        call = call_arguments(Model("base", None, 2, scale))
        own, other = (draw_pictures(pipe, ["", ""], 0, {}, task.features[rows], **call) for rows in ([0, 1], [0, 2]))
        np.testing.assert_array_equal(own[0], other[0])
        assert np.abs(own[1].astype(int) - other[1]).max() > 2


def test_a_projection_starts_from_what_captions_state() -> None:
    """Through the layer norm that it ends in, it gives the tokens of captions that are linear in features."""
    from diffusers.models.embeddings import ImageProjection

    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(400, 12, generator=generator)
    tokens = torch.nn.functional.layer_norm(seen[:, None].expand(-1, 4, -1), (12,))
    states = 0.5 + tokens * torch.linspace(0.5, 2, 12)
    found = initial_projection(seen, states, ridge=1e-3)
    network = ImageProjection(12, 12, TOKENS)
    own = {"proj": "image_embeds", "norm": "norm"}
    network.load_state_dict({f"{own[n.split('.')[0]]}.{n.split('.')[1]}": value for n, value in found.items()})
    with torch.no_grad():
        made = network(seen[:, None])
    assert float((made - states).square().mean()) < 0.02 * float(states.var())


@pytest.mark.slow
def test_a_stopped_training_is_resumed(study: Study, tmp_path: Path) -> None:
    """Stopped after its last step, before it was written: the same bytes."""

    def maps(pictures: np.ndarray, _: Any) -> torch.Tensor:
        return torch.zeros(len(pictures), 3, 64, 64)

    def run(name: str) -> Path:
        return replace(study, out=tmp_path / name).made("edges", "open", training.train_controlnet, maps)

    def stop(place: Path) -> Any:
        raise KeyboardInterrupt

    whole = run("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "atomic_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert not (tmp_path / "cut" / "edges").exists()
    files = [next(place.glob("*.safetensors")).read_bytes() for place in (whole, run("cut"))]
    assert files[0] == files[1]


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture
def tiny_world(teacher: Path, sheets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world folder of sticker scenes with a student."""
    world = make_world(tmp_path / "world", sheets, teacher)
    random_lora(teacher, world / "students" / "tcd")
    monkeypatch.setenv("FEWSTEP_WORLD", str(world))
    return world


@pytest.mark.slow
def test_the_verb_writes_a_table_and_a_figure(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "FITTED", 16)
    lessons = [f"{name}.{word}" for name in (*ADD_ONS, "style_reader") for word in ("steps=1", "batch=2")]
    out = tmp_path / "out"
    path = api.versatility(out=out, overrides=["steps=[2]", "base_steps=2", "prompts=8", "shown=1", *lessons])
    cells = json.loads((out / "cells.json").read_text())["cells"]
    assert len(cells) == 2 * len(TASKS)
    assert {cell["model"] for cell in cells} == {"base 2", "TCD 2"}
    assert path.read_text().count("| TCD 2 |") == len(TASKS)
    with Image.open(out / "figure.webp") as figure:
        assert figure.height > len(TASKS) * SIDE


def test_what_cannot_be_measured_is_refused_first(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="steps = 60"):
        api.versatility(out=tmp_path / "v", overrides=["steps=[60]"])
    with pytest.raises(UserError, match="is neither a file nor a bundled student"):
        api.versatility(out=tmp_path / "v", overrides=["tlcm=nowhere"])
    shutil.rmtree(tiny_world / "reader")
    with pytest.raises(UserError, match="reader/"):
        api.versatility(out=tmp_path / "v")
    assert not (tmp_path / "v").exists()
