"""The update plan of a recipe: what the training loop is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import FAKE, Condition, Denoiser
from fewstep.methods.adversarial import generator_loss, seen_by_critic
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import Term, consistency_loss, critic_loss, set_scene
from fewstep.methods.denoising import denoising_loss
from fewstep.methods.distances import FeaturesOf, NetworkDistance, network_distance_of
from fewstep.methods.distribution_matching import as_data, fake_loss, fake_points, matching_loss
from fewstep.methods.pair import Sample, Scene
from fewstep.methods.reward_loss import Reward, reward_loss
from fewstep.training.config import OptimConfig
from fewstep.training.loop import Batch, EmaTarget, Update
from fewstep.training.loss import Loss
from fewstep.training.roles import copy_role
from fewstep.training.student import Student

SampleOf = Callable[[Batch, KeyedRng], Sample]
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
class FrozenNetworks:
    """The frozen networks that a recipe asks for, and its critic; None where it asks for none.

    Attributes:
        features: of the teacher, with gradient to what it sees.
        latent_lpips: a distance by a network on latents.
        critic: tells where the student lands from real points.
        reward: scores of pictures with prompts, and of how many prompts.
    """

    features: FeaturesOf | None = None
    latent_lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    critic: nn.Module | None = None
    reward: tuple[Reward, int] | None = None

    def network_distance(self, method: ConsistencyConfig) -> NetworkDistance | None:
        """The distance by a frozen network that the recipe names."""
        if method.distance == "features" and self.features is not None:
            return network_distance_of(self.features)
        if method.distance == "latent_lpips" and self.latent_lpips is not None:
            latent_lpips = self.latent_lpips

            def network_distance(landed: Tensor, wanted: Tensor, at: Tensor, condition: Condition) -> Tensor:
                return latent_lpips(landed, wanted)

            return network_distance
        return None


def terms_of(method: ConsistencyConfig, frozen_networks: FrozenNetworks) -> list[Term]:
    """What stands beside the consistency loss in the student's sum."""
    terms = []
    if method.denoising:

        def fit(scene: Scene, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            return denoising_loss(method, scene.denoiser, scene.sample.data, scene.sample.condition, rng)

        terms.append(Term("denoising", method.denoising, fit))
    critic = frozen_networks.critic
    own = method.adversarial
    if own.weight and critic is not None:

        def fooled(scene: Scene, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            x, t = seen_by_critic(own, scene.denoiser.path, landed, at, scene.times.top, rng, "fake")
            return generator_loss(own, critic(x, t, scene.sample.condition))

        terms.append(Term("adversarial", own.weight, fooled, own.start, own.clip))
    if method.matching.weight:

        def matched(scene: Scene, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            return matching_loss(method.matching, scene, landed, at, rng)

        terms.append(Term("matching", method.matching.weight, matched))
    if method.reward.weight and frozen_networks.reward is not None:
        reward, count = frozen_networks.reward

        def liked(scene: Scene, landed: Tensor, at: Tensor, rng: KeyedRng) -> Tensor:
            prompts = scene.sample.prompts
            assert prompts is not None
            x0 = as_data(scene.denoiser.path, landed, at)
            return reward_loss(method.reward, reward, x0, prompts, count, rng)

        terms.append(Term("reward", method.reward.weight, liked))
    return terms


class SceneOnce:
    """The scene of a micro-batch, set once for all updates that are due: at the weights of the step's start it is one.

    Coming to the first points may take many network calls.
    """

    def __init__(self, method: ConsistencyConfig, denoiser: Denoiser, sample_of: SampleOf) -> None:
        self._make: Callable[[Batch, KeyedRng], Scene] = lambda batch, rng: set_scene(
            method, denoiser, sample_of(batch, rng), rng
        )
        self._last: tuple[KeyedRng, Scene] | None = None

    def scene(self, batch: Batch, rng: KeyedRng) -> Scene:
        """The scene of this micro-batch; a micro-batch is known by its draws."""
        if self._last is None or self._last[0] is not rng:
            self._last = rng, self._make(batch, rng)
        return self._last[1]


def family_plan(
    method: ConsistencyConfig,
    optim: OptimConfig,
    student: Student,
    denoiser: Denoiser,
    sample_of: SampleOf,
    frozen_networks: FrozenNetworks | None = None,
) -> list[Update]:
    """One line for the student, one for a fake score and one for a critic where the recipe has them."""
    frozen_networks = frozen_networks or FrozenNetworks()
    scenes = SceneOnce(method, denoiser, sample_of)
    terms, network_distance, outlet = (
        terms_of(method, frozen_networks),
        frozen_networks.network_distance(method),
        student.outlet("student"),
    )

    def student_loss(batch: Batch, rng: KeyedRng) -> Loss:
        return consistency_loss(scenes.scene(batch, rng), rng, terms, network_distance, outlet)

    ema_target = EmaTarget(student.parameters("target"), method.target_decay) if method.target == "ema" else None
    own = student.parameters("student")
    plan = [Update("student", own, student_loss, optim, method.student_every, ema_target)]
    if method.matching.weight:

        def follow(batch: Batch, rng: KeyedRng) -> Loss:
            scene = scenes.scene(batch, rng)
            return fake_loss(method.matching, scene, *fake_points(method.matching, scene), rng)

        plan.append(Update(FAKE, student.parameters(FAKE), follow, OptimConfig(lr=method.matching.lr)))
    critic = frozen_networks.critic
    if critic is not None:

        def judge_loss(batch: Batch, rng: KeyedRng) -> Loss:
            return critic_loss(scenes.scene(batch, rng), rng, critic)

        adversarial = method.adversarial
        judging = OptimConfig(lr=adversarial.lr, betas=(0.0, 0.99))
        weights = dict(critic.named_parameters())
        plan.append(Update("critic", weights, judge_loss, judging, adversarial.every, start=adversarial.start))
    return plan
