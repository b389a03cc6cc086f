"""The consistency family's update plan: what the training loop is handed for a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.draws import Draws
from fewstep.loss import Loss
from fewstep.method_settings import ConsistencyConfig
from fewstep.objectives.consistency import consistency_loss, critic_loss
from fewstep.objectives.distance import FeaturesOf
from fewstep.objectives.points import Sample
from fewstep.role_layout import Student
from fewstep.roles import copy_role
from fewstep.settings import OptimConfig
from fewstep.training.loop import Batch, Follower, Update

SampleOf = Callable[[Batch, Draws], Sample]
"""What a batch of the loop is, for the objective."""


def roles_of(method: ConsistencyConfig) -> tuple[str, ...]:
    """The roles that a recipe needs beside the teacher; the first one is trained."""
    return ("student", "target") if method.target == "ema" else ("student",)


def start_from(method: ConsistencyConfig, student: Student, weights: Mapping[str, Tensor]) -> None:
    """Let all roles but the teacher start from the weights of a student."""
    for role in roles_of(method):
        copy_role(weights, student.parameters(role))


def family_plan(
    method: ConsistencyConfig,
    optim: OptimConfig,
    student: Student,
    denoiser: Denoiser,
    sample_of: SampleOf,
    features: FeaturesOf | None = None,
    critic: nn.Module | None = None,
) -> list[Update]:
    """One line for the student, and one for a critic where the recipe has one."""

    outlet = student.outlet("student")

    def student_loss(batch: Batch, draws: Draws) -> Loss:
        return consistency_loss(method, denoiser, sample_of(batch, draws), draws, features, critic, outlet)

    follower = Follower(student.parameters("target"), method.target_decay) if method.target == "ema" else None
    plan = [Update("student", student.parameters("student"), student_loss, optim, follower=follower)]
    if critic is None:
        return plan

    def judge_loss(batch: Batch, draws: Draws) -> Loss:
        return critic_loss(method, denoiser, sample_of(batch, draws), draws, critic)

    own = OptimConfig(lr=method.adversarial.lr, betas=(0.0, 0.99))
    weights = dict(critic.named_parameters())
    return [*plan, Update("critic", weights, judge_loss, own, every=method.adversarial.every)]
