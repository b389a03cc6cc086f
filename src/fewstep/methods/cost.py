"""What a step of a method takes, in network evaluations of one sample. Light.

The tests compare these counts with those of `nfe_counter`, which counts real calls during training.
"""

from __future__ import annotations

from fewstep.common.choices import CALLS, CALLS_OF_JUMP
from fewstep.methods.config import ConsistencyConfig

Calls = dict[str, float]
"""Network evaluations by role; the teacher's include the unconditional branch."""


def add(first: Calls, *others: Calls) -> Calls:
    """The sum, role by role."""
    result = dict(first)
    for other in others:
        for role, count in other.items():
            result[role] = result.get(role, 0) + count
    return result


def starting_calls(config: ConsistencyConfig) -> Calls:
    """What it takes to come to x_{t_n+k}, once for all updates of a step.

    A roll-out of R steps takes R - i of them to a point in the i-th of R equal parts of the grid, (R + 1)/2 on average;
    in micro-batches of less than R samples a little more (`methods.start_points.by_rollout`).
    """
    if config.start == "rollout":
        steps = sum(config.rollout_steps) / config.points
        return {"teacher": steps * CALLS[config.solver] * config.guidance.branches}
    if config.start == "student":
        return {"student": config.student_steps * CALLS_OF_JUMP[config.jump]}
    return {}


def landing_calls(config: ConsistencyConfig) -> Calls:
    """The student's jump, pushed on to the end by the target where jumps are compared there."""
    pushed = CALLS_OF_JUMP[config.jump] if config.compare == "end" else 0
    return {"student": CALLS_OF_JUMP[config.jump], "target": pushed}


def target_calls(config: ConsistencyConfig) -> Calls:
    """The next point and the target's jump from it."""
    jump = CALLS_OF_JUMP[config.jump]
    asks = config.point in ("solver", "self")
    teacher = config.substeps * CALLS[config.solver] * config.guidance.branches if asks else 0
    target = 0 if config.s == "next" else jump * (1 + (config.point == "self"))
    pushed = jump if config.compare == "end" else 0
    return {"target": target + pushed, "teacher": teacher}


def student_calls(config: ConsistencyConfig) -> Calls:
    """The student's own update, its start apart, once the critic's term is in.

    `features` are those of a frozen network's features, where a critic or the distance looks at them.
    """
    terms: Calls = {}
    if config.denoising:
        terms = add(terms, {"student": 1})
    if config.matching.weight:
        real = 1 if config.matching.omega == 0 else config.guidance.branches
        terms = add(terms, {"teacher": real, "fake": 1})
    if config.adversarial.weight:
        terms = add(terms, {"features": 1})
    if config.consistency and config.distance == "features":
        terms = add(terms, {"features": 2})
    own = add(landing_calls(config), terms)
    return add(own, target_calls(config)) if config.consistency else own


def fake_calls(config: ConsistencyConfig) -> Calls:
    """The fake score's update: where the student lands, unless its own samples are fitted, and the fit itself."""
    if not config.matching.weight:
        return {}
    return add({"fake": 1}, landing_calls(config) if config.matching.fit == "landing" else {})


def critic_calls(config: ConsistencyConfig) -> Calls:
    """The critic's update: the jumps again, and features of both points."""
    if not config.adversarial.weight:
        return {}
    jumps = landing_calls(config)
    if config.adversarial.real == "target":
        jumps = add(jumps, target_calls(config))
    return add(jumps, {"features": 2})


def critic_waits(config: ConsistencyConfig) -> float:
    """Return the share of the steps that come before the critic; 0 without one."""
    return config.adversarial.start if config.adversarial.weight else 0.0


def with_gradient(config: ConsistencyConfig) -> float:
    """Return the mean number of calls of the student's update that are passed backwards."""
    jump = CALLS_OF_JUMP[config.jump]
    pushed = jump if config.compare == "end" else 0
    looked_at = (
        bool(config.adversarial.weight)
        - critic_waits(config)
        + bool(config.consistency and config.distance == "features")
    )
    return jump + bool(config.denoising) + looked_at + pushed


def step_calls(config: ConsistencyConfig) -> Calls:
    """All of a step, by role: each update at its own rhythm, the start once."""
    result = starting_calls(config)
    late: Calls = {"features": -critic_waits(config)}
    for calls, every in (
        (add(student_calls(config), late), config.student_every),
        (fake_calls(config), 1),
        (critic_calls(config), config.adversarial.every / (1 - critic_waits(config))),
    ):
        result = add(result, {role: count / every for role, count in calls.items()})
    return {role: count for role, count in result.items() if count}


def step_cost(config: ConsistencyConfig) -> float:
    """All network evaluations of one sample and step, a backward pass counted as two more."""
    backward = with_gradient(config) / config.student_every
    backward += bool(config.matching.weight) + (config.adversarial.r1 > 0 and bool(config.adversarial.weight)) / (
        config.adversarial.every
    )
    return sum(step_calls(config).values()) + 2 * backward
