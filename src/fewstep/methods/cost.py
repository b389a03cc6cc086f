"""The cost of a method's step in network evaluations of one sample, summed over its parts.

Each part's calls are stated beside its rule. Tests compare them with the calls that `nfe_counter` counts in training.
"""

from __future__ import annotations

from fewstep.common.choices import CALLS_OF_JUMP
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import landing_calls, target_calls
from fewstep.methods.distribution_matching import fake_calls, matching_calls
from fewstep.methods.pair import Calls
from fewstep.methods.start_points import start_calls


def add(*parts: Calls) -> Calls:
    """Return the sum, role by role."""
    roles = dict.fromkeys(role for calls in parts for role in calls)
    return {role: sum(calls.get(role, 0) for calls in parts) for role in roles}


def student_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of the student's update without the start, once the critic's term is in.

    `features` counts evaluations of a frozen network's features, by a critic or the distance.
    """
    by_distance = bool(config.consistency) and config.distance == "features"
    features = bool(config.adversarial.weight) + 2 * by_distance
    return add(
        landing_calls(config),
        {"student": 1} if config.denoising else {},
        matching_calls(config) if config.matching.weight else {},
        {"features": features} if features else {},
        target_calls(config) if config.consistency else {},
    )


def critic_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of the critic's update: the jumps again, and the features of both points."""
    if not config.adversarial.weight:
        return {}
    jumps = target_calls(config) if config.adversarial.real == "target" else {}
    return add(landing_calls(config), jumps, {"features": 2})


def critic_waits(config: ConsistencyConfig) -> float:
    """Return the share of the steps before the critic starts; 0 without one."""
    return config.adversarial.start if config.adversarial.weight else 0.0


def with_gradient(config: ConsistencyConfig) -> float:
    """Return the mean number of calls of the student's update that have a backward pass."""
    jumps = CALLS_OF_JUMP[config.jump] * (1 + (config.compare == "end"))
    features = bool(config.adversarial.weight) - critic_waits(config)
    return jumps + bool(config.denoising) + features + bool(config.consistency and config.distance == "features")


def step_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of a step by role: the start once, each update at its own rhythm."""
    before_critic: Calls = {"features": -critic_waits(config)}
    updates = (
        (add(student_calls(config), before_critic), config.student_every),
        (fake_calls(config), 1),
        (critic_calls(config), config.adversarial.every / (1 - critic_waits(config))),
    )
    rates = ({role: count / every for role, count in calls.items()} for calls, every in updates)
    return {role: count for role, count in add(start_calls(config), *rates).items() if count}


def step_cost(config: ConsistencyConfig) -> float:
    """Return all network evaluations of one sample and step; a backward pass counts as two."""
    backward = with_gradient(config) / config.student_every
    r1 = config.adversarial.r1 > 0 and bool(config.adversarial.weight)
    backward += bool(config.matching.weight) + r1 / config.adversarial.every
    return sum(step_calls(config).values()) + 2 * backward
