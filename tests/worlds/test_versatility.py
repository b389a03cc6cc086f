"""Add-ons on students: the measures by hand, and that each add-on is trained, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.backbones.base import load_backbone
from fewstep.backbones.teachers import teacher_path
from fewstep.common.errors import UserError
from fewstep.common.tensors import save_tensors
from fewstep.data.images import Captioned, HeldPictures
from fewstep.data.latents import latent_set
from fewstep.distillation.run_data import encoders_fingerprint
from fewstep_worlds.emoji8 import dataset as emoji8
from fewstep_worlds.emoji8.metrics import agreement, lite0
from fewstep_worlds.studies import api
from fewstep_worlds.studies.addons import image_effects as effects
from fewstep_worlds.studies.addons import tasks as tasks_module
from fewstep_worlds.studies.addons import training
from fewstep_worlds.studies.addons.context import Context
from fewstep_worlds.studies.addons.figure import columns, kept_share, measure, tables
from fewstep_worlds.studies.addons.pipelines import (
    Model,
    call_arguments,
    can_draw,
    draw_from_features,
    draw_pictures,
    images,
    pipeline,
)
from fewstep_worlds.studies.addons.tasks import TASKS, people_of
from fewstep_worlds.studies.settings import AddOnConfig, VersatilityConfig
from support.shapes import COLOURS, SHAPES, draw_shape


def solid(*colours: tuple[int, int, int], size: int = 16) -> np.ndarray:
    """A square of each colour on white."""
    pictures = np.full((len(colours), size, size, 3), 255, np.uint8)
    for picture, colour in zip(pictures, colours, strict=True):
        picture[4:12, 4:12] = colour
    return pictures


def test_skins_are_painted_and_distinguished() -> None:
    yellow = solid((255, 204, 60), (255, 190, 50), (40, 70, 220))
    assert effects.skin(yellow).sum((1, 2)).tolist() == [64, 64, 0]
    names = list(effects.TONES)
    for tone in names:
        painted = effects.with_tone(yellow, tone)
        assert (painted[2] == yellow[2]).all(), "what is no skin stays"
        assert np.abs(painted[0, 8, 8].astype(int) - effects.TONES[tone]).max() <= 1
        assert effects.tone_share(painted[:1], [tone]).tolist() == [1.0]
        other = names[(names.index(tone) + 1) % 3]
        assert effects.tone_share(painted[:1], [other]).tolist() == [0.0]
    assert effects.tone_share(yellow, [names[0]] * 3).tolist() == [0.0, 0.0, 0.0]


def test_blueprints_edges_and_outlines() -> None:
    pictures = np.stack([draw_shape("red", "disc"), draw_shape("blue", "bar")])
    painted = effects.blueprint(pictures)
    assert tuple(painted[0, 0, 0]) == effects.BLUE
    assert tuple(painted[0, 32, 32]) == effects.SHADE
    assert (effects.blueprint_share(painted) > 0.8).all()
    assert (effects.blueprint_share(pictures)[0], effects.ink(pictures)[0, 32, 32]) == (0.0, True)
    outline = effects.edges(pictures)
    assert outline[0, 32, 32] < 1e-6
    assert outline[0, 32, 31 - 22] == 1
    np.testing.assert_allclose(effects.edge_likeness(pictures, outline), 1, atol=1e-6)
    assert (effects.edge_likeness(pictures[::-1], outline) < 0.6).all()
    moved = np.roll(pictures, 1, axis=2)
    assert (effects.edge_likeness(moved, outline) > 0.8).all(), "a pixel aside is still the same edge"
    masks = effects.ink(solid((0, 0, 0)))
    half = solid((0, 0, 0))
    half[:, :8] = 255
    assert effects.overlap(half, masks).tolist() == [0.5]
    small = effects.blurred(pictures, 4)
    assert small.shape == pictures.shape
    likeness = effects.edge_likeness(small, outline)
    assert ((likeness > 0.5) & (likeness < 0.98)).all(), "softer, of the same thing"
    assert effects.detail_likeness(small, small, pictures).tolist() == [0.0, 0.0], "nothing was added"
    np.testing.assert_allclose(effects.detail_likeness(pictures, small, pictures), 1)
    halfway = ((small.astype(float) + pictures) / 2).round().astype(np.uint8)
    assert (effects.detail_likeness(halfway, small, pictures) > 0.98).all(), "the right detail, too faint"
    assert (effects.detail_likeness(pictures[::-1], small, pictures) < 0.5).all(), "another picture's"
    assert effects.closeness(pictures, pictures).tolist() == [1.0, 1.0]
    assert effects.closeness(np.zeros_like(half), np.full_like(half, 51)).tolist() == [0.8]


def test_the_share_that_is_kept() -> None:
    """(student's effect)/(base's effect) of means; none where the base does nothing."""
    rng = np.random.default_rng(0)
    base = rng.normal(1, 0.1, 50)
    kept = kept_share(0.9 * base, base, 0)
    assert kept is not None
    assert kept.value == pytest.approx(0.9)
    assert kept.low is not None
    assert kept.high is not None
    assert kept.low == pytest.approx(0.9)
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


@pytest.fixture(scope="module")
def lesson_of(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Lessons of two steps on 16 pictures."""
    backbone = load_backbone(tiny_pipeline)
    pictures = np.stack([draw_shape(colour, shape) for colour in COLOURS for shape in SHAPES])
    captions = [[f"a {colour} {shape}"] for colour in COLOURS for shape in SHAPES]
    cache = tmp_path_factory.mktemp("cache")
    data = latent_set(
        Captioned(HeldPictures(pictures), captions), backbone, encoders_fingerprint(backbone.folder), cache
    )

    def make(name: str, steps: int = 2) -> training.AddOnTraining:
        return training.AddOnTraining(name, data, AddOnConfig(steps=steps, batch=4, lr=1e-2), {})

    return backbone, pictures, make


def test_every_add_on_is_read_back_and_changes_the_picture(lesson_of: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    """By its own loader, in diffusers' own pipelines; with the base, two steps."""
    from diffusers import ControlNetModel

    backbone, pictures, make = lesson_of
    model, prompts = Model("base", None, 2, 2.0), ["a red disc", "a blue bar"]
    plain_pipe = pipeline("StableDiffusionPipeline", tiny_pipeline, model)
    plain = draw_pictures(plain_pipe, prompts, 0, {}, **call_arguments(model))

    def differs(made: np.ndarray) -> bool:
        return bool((np.abs(made.astype(int) - plain.astype(int)).max((1, 2, 3)) > 2).all())

    pipe = pipeline("StableDiffusionPipeline", tiny_pipeline, model)
    training.fine_tune(make("tuned"), backbone.fresh_network(), pipe, tmp_path / "r1", tmp_path / "tuned")
    tuned = pipeline("StableDiffusionPipeline", tmp_path / "tuned", model)
    assert differs(draw_pictures(tuned, prompts, 0, {}, **call_arguments(model)))

    training.train_style(make("style", 6), backbone.fresh_network(), tmp_path / "r2", tmp_path / "style")
    pipe = pipeline("StableDiffusionPipeline", tiny_pipeline, model)
    pipe.load_lora_weights(str(tmp_path / "style"), adapter_name="style")
    assert differs(draw_pictures(pipe, prompts, 0, {}, **call_arguments(model)))

    maps = torch.from_numpy(effects.edges(pictures)).half()[:, None].expand(-1, 3, -1, -1)
    training.train_controlnet(make("edges", 6), backbone.fresh_network(), maps, tmp_path / "r3", tmp_path / "edges")
    controlnet = ControlNetModel.from_pretrained(tmp_path / "edges")
    pipe = pipeline("StableDiffusionControlNetPipeline", tiny_pipeline, model, {"controlnet": controlnet})
    shown = images((maps[:2, 0].float().numpy()[..., None] * 255).repeat(3, 3).astype(np.uint8))
    assert differs(draw_pictures(pipe, prompts, 0, {"image": shown}, **call_arguments(model)))

    seen = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    place = tmp_path / "picture"
    project = training.initial_projection(seen, torch.randn(16, 6, 32, generator=torch.Generator().manual_seed(1)))
    training.train_ip_adapter(make("picture", 6), backbone.fresh_network(), seen, project, tmp_path / "r4", place)
    pipe = pipeline("StableDiffusionPipeline", tiny_pipeline, model)
    pipe.load_ip_adapter([training.read_ip_adapter(place)], subfolder="", weight_name="", image_encoder_folder=None)
    arguments = call_arguments(model)
    own, other = (draw_from_features(pipe, prompts, seen[rows], 0, **arguments) for rows in ([0, 1], [0, 2]))
    assert differs(own)
    assert (own[0] == other[0]).all(), "each follows its own picture"
    assert (own[1] != other[1]).any(), "the picture that is shown counts"


def test_a_projection_starts_from_the_captions() -> None:
    """Through the layer norm that it ends in, it gives the tokens of captions that are linear in features."""
    from diffusers.models.embeddings import ImageProjection

    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(400, 12, generator=generator)
    tokens = torch.nn.functional.layer_norm(torch.randn(400, 4, 12, generator=generator) * 0 + seen[:, None], (12,))
    states = 0.5 + tokens * torch.linspace(0.5, 2, 12)
    found = training.initial_projection(seen, states, ridge=1e-3)
    network = ImageProjection(12, 12, training.TOKENS)
    own = {"proj": "image_embeds", "norm": "norm"}
    network.load_state_dict({f"{own[n.split('.')[0]]}.{n.split('.')[1]}": value for n, value in found.items()})
    with torch.no_grad():
        made = network(seen[:, None])
    assert float((made - states).square().mean()) < 0.02 * float(states.var())


def test_a_stopped_lesson_goes_on(lesson_of: Any, tmp_path: Path) -> None:
    """Stopped after its last step, before it was written: the same bytes."""
    backbone, _, make = lesson_of
    spec = make("style", 4)

    def run(name: str) -> None:
        training.train_style(spec, backbone.fresh_network(), tmp_path / name, tmp_path / f"{name}-out")

    run("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "atomic_folder", _stop)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert not (tmp_path / "cut-out").exists()
    run("cut")
    files = [next((tmp_path / f"{name}-out").glob("*.safetensors")).read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def _stop(place: Path) -> Any:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The bundled teacher and a part of Emoji-8; add-ons of a single step."""
    world = emoji8.load("train")
    people = people_of(world)[:40]
    part = np.unique(np.concatenate([people, np.arange(0, len(world), 60)]))
    data = emoji8.Emoji8(world.pictures[part], tuple(world.records[row] for row in part))
    spec = AddOnConfig(steps=1, batch=4, lr=1e-3)
    lessons = dict.fromkeys(("community", "style", "edges", "shapes", "picture"), spec)
    config = VersatilityConfig(steps=(2,), base_steps=2, prompts=8, shown=1, pictures=16, **lessons)
    out = tmp_path_factory.mktemp("versatility")
    eye = lite0(out / "features", progress=False)
    return Context(config, out, load_backbone(teacher_path("")), agreement().scorer, eye, data)


@pytest.mark.slow
def test_every_row_is_made_drawn_and_measured(small_world: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nine rows on the bundled teacher; what is drawn after was not learned from; kept pictures are not redrawn."""
    context = small_world
    cells, shown, tasks = measure(context, list(TASKS))
    found = {(cell.task, cell.model): cell for cell in cells}
    labels = [model.label for model in columns(context.config)]
    assert labels == ["base 2", "TCD 2"]
    assert set(found) == {(name, label) for name in TASKS for label in labels}
    assert len(shown) == len(TASKS)
    apart = {record.id for record in emoji8.load("heldout-pair").records}
    assert {record.id for record in context.shown.records} == apart
    assert not {record.id for record in context.data.records} & apart
    people = {context.shown.records[row].name for row in people_of(context.shown)}
    assert all(prompt.rsplit(", ", 1)[0] in people for prompt in tasks["community"].prompts)
    shown_pictures = {picture.tobytes() for picture in context.shown.pictures}
    for name in ("picture", "img2img", "style transfer"):
        assert {picture.tobytes() for picture in tasks[name].given} <= shown_pictures
    own, student = found["edges", "base 2"], found["edges", "TCD 2"]
    assert own.without != student.without, "each is measured beside its own pictures without the add-on"
    # what is there before is the same for all: half a picture fits its name badly, and both draw the rest
    assert found["inpainting", "base 2"].without == found["inpainting", "TCD 2"].without
    assert found["inpainting", "TCD 2"].value > found["inpainting", "TCD 2"].without
    assert found["img2img", "base 2"].value > found["img2img", "base 2"].without + 0.05
    for model in columns(context.config):
        plain = float(tasks["img2img"].beside(tasks["img2img"].without(model)).mean())
        cell = found["img2img", model.label]
        assert cell.change.value == pytest.approx(cell.beside - plain)
    text = tables(cells, tasks, labels)
    share = found["img2img", "TCD 2"].kept
    assert share is not None
    effects = [found["img2img", label].value - found["img2img", label].without for label in labels]
    assert share.value == pytest.approx(effects[1] / effects[0])
    assert f"| img2img | {tasks['img2img'].effect_name} | ({effects[0]:+.3f}) | {share.value:.2f} [" in text

    def drawing(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(tasks_module, "draw_pictures", drawing)
    again, _, _ = measure(context, list(TASKS))
    assert again == cells


def test_students_that_no_pipeline_draws_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps = 60"):
        api.versatility(out=tmp_path / "v", overrides=["steps=[60]"])
    with pytest.raises(UserError, match="is neither a file nor a bundled student"):
        api.versatility(out=tmp_path / "v", overrides=["tlcm=nowhere"])
    assert not (tmp_path / "v").exists()
