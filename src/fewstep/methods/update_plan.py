"""The update plan of a recipe: what the training loop is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.common.rng import Draws
from fewstep.diffusion.denoiser import FAKE, Condition, Denoiser
from fewstep.methods.adversarial import generator_loss, seen_by_critic
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import Term, consistency_loss, critic_loss, set_scene
from fewstep.methods.denoising import denoising_loss
from fewstep.methods.distances import FeaturesOf, Look, look_by_features
from fewstep.methods.distribution_matching import as_data, fake_loss, fake_points, matching_loss
from fewstep.methods.pair import Sample, Scene
from fewstep.methods.preference import Taste, preference_loss
from fewstep.training.config import OptimConfig
from fewstep.training.loop import Batch, Follower, Update
from fewstep.training.loss import Loss
from fewstep.training.roles import copy_role
from fewstep.training.student import Student

SampleOf = Callable[[Batch, Draws], Sample]
"""What a batch of the loop is, for the objective."""


def roles_of(method: ConsistencyConfig) -> tuple[str, ...]:
    """The roles that a recipe needs beside the teacher; the first one is the student."""
    target = ("target",) if method.target == "ema" else ()
    fake = (FAKE,) if method.matching.weight else ()
    return ("student", *target, *fake)


def start_from(method: ConsistencyConfig, student: Student, weights: Mapping[str, Tensor]) -> None:
    """Let the student and its target start from the weights of a student; the fake score starts as the teacher."""
    for role in roles_of(method):
        if role != FAKE:
            copy_role(weights, student.parameters(role))


@dataclass(frozen=True)
class Aids:
    """The frozen networks that a recipe asks for, and its critic; None where it asks for none.

    Attributes:
        features: of the teacher, with gradient to what it sees.
        perceptual: a distance by a network on latents.
        critic: tells where the student lands from real points.
        taste: scores of pictures with prompts, and of how many prompts.
    """

    features: FeaturesOf | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    critic: nn.Module | None = None
    taste: tuple[Taste, int] | None = None

    def look(self, method: ConsistencyConfig) -> Look | None:
        """The distance by a frozen network that the recipe names."""
        if method.distance == "features" and self.features is not None:
            return look_by_features(self.features)
        if method.distance == "perceptual" and self.perceptual is not None:
            perceptual = self.perceptual

            def look(landed: Tensor, wanted: Tensor, at: Tensor, condition: Condition) -> Tensor:
                return perceptual(landed, wanted)

            return look
        return None


def terms_of(method: ConsistencyConfig, aids: Aids) -> list[Term]:
    """What stands beside the consistency loss in the student's sum."""
    terms = []
    if method.denoising:

        def fit(scene: Scene, landed: Tensor, at: Tensor, draws: Draws) -> Tensor:
            return denoising_loss(method, scene.denoiser, scene.sample.data, scene.sample.condition, draws)

        terms.append(Term("denoising", method.denoising, fit))
    critic = aids.critic
    own = method.adversarial
    if own.weight and critic is not None:

        def fooled(scene: Scene, landed: Tensor, at: Tensor, draws: Draws) -> Tensor:
            x, t = seen_by_critic(own, scene.denoiser.path, landed, at, scene.times.top, draws, "fake")
            return generator_loss(own, critic(x, t, scene.sample.condition))

        terms.append(Term("adversarial", own.weight, fooled, own.start, own.clip))
    if method.matching.weight:

        def matched(scene: Scene, landed: Tensor, at: Tensor, draws: Draws) -> Tensor:
            return matching_loss(method.matching, scene, landed, at, draws)

        terms.append(Term("matching", method.matching.weight, matched))
    if method.preference.weight and aids.taste is not None:
        taste, count = aids.taste

        def liked(scene: Scene, landed: Tensor, at: Tensor, draws: Draws) -> Tensor:
            prompts = scene.sample.prompts
            assert prompts is not None
            x0 = as_data(scene.denoiser.path, landed, at)
            return preference_loss(method.preference, taste, x0, prompts, count, draws)

        terms.append(Term("preference", method.preference.weight, liked))
    return terms


class SceneOnce:
    """The scene of a micro-batch, set once for all updates that are due: at the weights of the step's start it is one.

    Coming to the first points may take many network calls.
    """

    def __init__(self, method: ConsistencyConfig, denoiser: Denoiser, sample_of: SampleOf) -> None:
        self._make: Callable[[Batch, Draws], Scene] = lambda batch, draws: set_scene(
            method, denoiser, sample_of(batch, draws), draws
        )
        self._last: tuple[Draws, Scene] | None = None

    def scene(self, batch: Batch, draws: Draws) -> Scene:
        """The scene of this micro-batch; a micro-batch is known by its draws."""
        if self._last is None or self._last[0] is not draws:
            self._last = draws, self._make(batch, draws)
        return self._last[1]


def family_plan(
    method: ConsistencyConfig,
    optim: OptimConfig,
    student: Student,
    denoiser: Denoiser,
    sample_of: SampleOf,
    aids: Aids | None = None,
) -> list[Update]:
    """One line for the student, one for a fake score and one for a critic where the recipe has them."""
    aids = aids or Aids()
    scenes = SceneOnce(method, denoiser, sample_of)
    terms, look, outlet = terms_of(method, aids), aids.look(method), student.outlet("student")

    def student_loss(batch: Batch, draws: Draws) -> Loss:
        return consistency_loss(scenes.scene(batch, draws), draws, terms, look, outlet)

    follower = Follower(student.parameters("target"), method.target_decay) if method.target == "ema" else None
    own = student.parameters("student")
    plan = [Update("student", own, student_loss, optim, method.student_every, follower)]
    if method.matching.weight:

        def follow(batch: Batch, draws: Draws) -> Loss:
            scene = scenes.scene(batch, draws)
            return fake_loss(method.matching, scene, *fake_points(method.matching, scene), draws)

        plan.append(Update(FAKE, student.parameters(FAKE), follow, OptimConfig(lr=method.matching.lr)))
    critic = aids.critic
    if critic is not None:

        def judge_loss(batch: Batch, draws: Draws) -> Loss:
            return critic_loss(scenes.scene(batch, draws), draws, critic)

        adversarial = method.adversarial
        judging = OptimConfig(lr=adversarial.lr, betas=(0.0, 0.99))
        weights = dict(critic.named_parameters())
        plan.append(Update("critic", weights, judge_loss, judging, adversarial.every, start=adversarial.start))
    return plan
