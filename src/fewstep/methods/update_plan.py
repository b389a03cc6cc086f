"""The update plan of a recipe: an ordered list of parameters, loss, optimiser and rhythm for the training loop."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewstep.common.rng import KeyedRng
from fewstep.diffusion.denoiser import FAKE, START, Denoiser
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import consistency_loss, critic_loss, make_pair
from fewstep.methods.distances import LearnedWeight
from fewstep.methods.distribution_matching import fake_loss, fake_points
from fewstep.methods.pair import Pair
from fewstep.methods.terms import FrozenNetworks, fine_tuning_loss, terms_of
from fewstep.training.config import OptimConfig
from fewstep.training.loss import Loss
from fewstep.training.roles import copy_role
from fewstep.training.student import Student
from fewstep.training.update import Batch, EmaTarget, Update


def roles_of(method: ConsistencyConfig) -> tuple[str, ...]:
    """Return the roles that a recipe needs beside the teacher, the student first."""
    target = ("target",) if method.target == "ema" else ()
    start = (START,) if method.follow == "start" else ()
    fake = (FAKE,) if method.matching.weight else ()
    return ("student", *target, *start, *fake)


def start_from(method: ConsistencyConfig, student: Student, weights: Mapping[str, Tensor]) -> None:
    """Copy a student's weights into all roles that start as it. The fake score starts as the teacher."""
    for role in roles_of(method):
        if role != FAKE:
            copy_role(weights, student.parameters(role))


class PairCache:
    """The pair of the current micro-batch, made once for all updates that use it.

    All updates of a step take their gradients at the weights of its start, and x_{t_n+k} may take many network calls.
    """

    def __init__(self, method: ConsistencyConfig, denoiser: Denoiser) -> None:
        self._method, self._denoiser = method, denoiser
        self._held: tuple[KeyedRng, Pair] | None = None

    def pair(self, batch: Batch, rng: KeyedRng) -> Pair:
        """Return the pair of a micro-batch, batch["sample"], which its `rng` object identifies."""
        if self._held is None or self._held[0] is not rng:
            self._held = rng, make_pair(self._method, self._denoiser, batch["sample"], rng)
        return self._held[1]


class WeightedLoss:
    """The loss of a micro-batch with its learned weight, whose own update takes the loss of the student's."""

    def __init__(self, weight: LearnedWeight) -> None:
        self.weight = weight
        self._held: tuple[Tensor, Tensor] | None = None

    def __call__(self, loss: Tensor, t_share: Tensor) -> Tensor:
        """Return the student's loss, [B]."""
        self._held = loss.detach(), t_share
        return self.weight(loss, t_share)  # type: ignore[no-any-return]

    def own_loss(self, batch: Batch, rng: KeyedRng) -> Loss:
        """Return the weight's loss on the micro-batch of the last call."""
        assert self._held is not None, "the student's update comes first"
        per_sample = self.weight(*self._held)
        return Loss(per_sample.mean(), per_sample.detach(), self._held[1])


def make_update_plan(
    method: ConsistencyConfig,
    optim: OptimConfig,
    student: Student,
    denoiser: Denoiser,
    frozen_networks: FrozenNetworks | None = None,
) -> list[Update]:
    """Return the student's update, and those of a fake score and a critic where the recipe has them.

    Their batches hold a `MicroBatch` as "sample".
    """
    frozen_networks = frozen_networks or FrozenNetworks()
    pairs = PairCache(method, denoiser)
    terms, outlet = terms_of(method, frozen_networks), student.outlet("student")
    parameters = student.parameters("student")
    weigh = WeightedLoss(LearnedWeight()) if method.weight == "learned" else None

    def student_loss(batch: Batch, rng: KeyedRng) -> Loss:
        if method.fine_tunes:
            sample = batch["sample"]
            return fine_tuning_loss(method, denoiser, sample.data, sample.condition, rng)
        return consistency_loss(pairs.pair(batch, rng), rng, terms, frozen_networks.distance, outlet, weigh)

    ema_target = EmaTarget(student.parameters("target"), method.target_decay) if method.target == "ema" else None
    plan = [Update("student", parameters, student_loss, optim, method.student_every, ema_target)]
    if weigh:
        weigh.weight.to(next(iter(parameters.values())).device)
        weights = dict(weigh.weight.named_parameters())
        plan.append(Update("weight", weights, weigh.own_loss, OptimConfig(lr=1e-3), method.student_every))
    if method.matching.weight:

        def fake_score_loss(batch: Batch, rng: KeyedRng) -> Loss:
            pair = pairs.pair(batch, rng)
            return fake_loss(method.matching, pair, *fake_points(method.matching, pair), rng)

        plan.append(Update(FAKE, student.parameters(FAKE), fake_score_loss, OptimConfig(lr=method.matching.lr)))
    critic, config = frozen_networks.critic, method.adversarial
    if critic is not None:

        def loss_of_critic(batch: Batch, rng: KeyedRng) -> Loss:
            return critic_loss(pairs.pair(batch, rng), rng, critic)

        critic_optim = OptimConfig(lr=config.lr, betas=(0.0, 0.99))
        weights = dict(critic.named_parameters())
        plan.append(Update("critic", weights, loss_of_critic, critic_optim, config.every, start=config.start))
    return plan
