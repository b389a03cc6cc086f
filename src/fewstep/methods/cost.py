"""The cost of a method's step in network evaluations of one sample, summed over its parts. Light: no torch.

A rule that calls a network has its calls here. Tests compare them with the calls that `nfe_counter` counts in training.
"""

from __future__ import annotations

from fewstep.common.choices import CALLS, CALLS_OF_JUMP
from fewstep.methods.config import ConsistencyConfig

Calls = dict[str, float]
"""Network evaluations of one sample by role; the teacher's include the unconditional branch."""


def add(*parts: Calls) -> Calls:
    """Return the sum, role by role."""
    roles = dict.fromkeys(role for calls in parts for role in calls)
    return {role: sum(calls.get(role, 0) for calls in parts) for role in roles}


def start_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of a rule in `start_points.STARTS`, made once for all updates of a step.

    A roll-out of R steps makes (R + 1)/2 on average, a simulation on N points (N - 1)/2, both a little more in
    micro-batches of less samples.
    """
    if config.start == "rollout":
        steps = sum(config.rollout_steps) / config.points
        return followed_calls(config, steps)
    if config.start == "student":
        return {"student": config.student_steps * CALLS_OF_JUMP[config.jump]}
    if config.start == "simulation":
        return {"student": (config.points - 1) / 2 * CALLS_OF_JUMP[config.jump]}
    return {}


def followed_calls(config: ConsistencyConfig, steps: float) -> Calls:
    """Return the calls of so many steps of what is followed: the guided teacher, or another student."""
    branches = config.guidance.branches if config.follow == "teacher" else 1
    return {config.follow: steps * CALLS[config.solver] * branches}


def landing_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of `consistency.student_landing`; fine-tuning makes no jump."""
    if config.fine_tunes:
        return {}
    jump = CALLS_OF_JUMP[config.jump]
    return {"student": jump, "target": jump if config.compare == "end" else 0}


def target_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of `consistency.target_landing`, with those of x_{t_n} by `next_points.POINTS`.

    A limit has those of `tangent.limit_outputs` instead: the derivative takes two, as differences; a call in forward
    mode computes as much.
    """
    if config.continuous:
        return {"target": 2, "teacher": config.guidance.branches}
    jumps = (config.s != "next") + (config.compare == "end") + (config.point == "self")
    solves = config.point in ("solver", "self")
    followed = followed_calls(config, config.substeps if solves else 0)
    return {"target": jumps * CALLS_OF_JUMP[config.jump], **followed}


def simulated_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of `distribution_matching.simulated_end`, if it is matched."""
    simulates = config.matching.matched == "simulation"
    return {"student": config.student_steps * CALLS_OF_JUMP[config.jump]} if simulates else {}


def student_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of the student's update without the start, once the critic's term is in.

    `features` counts evaluations of a frozen network's features, by a critic or the distance.
    """
    real = 1 if config.matching.omega == 0 else config.guidance.branches
    if config.matching.guidance_levels and config.guidance.convention != "none":
        real += 2  # the real score without guidance, there and at the level of the gap
    matching = add({"teacher": real, "fake": 1}, simulated_calls(config))
    by_distance = bool(config.consistency) and config.distance == "features"
    features = bool(config.adversarial.weight) + 2 * by_distance
    return add(
        landing_calls(config),
        {"student": 1} if config.denoising else {},
        matching if config.matching.weight else {},
        {"features": features} if features else {},
        target_calls(config) if config.consistency else {},
    )


def fake_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of the fake score's update: `distribution_matching.fake_points` and `fake_loss`."""
    if not config.matching.weight:
        return {}
    return {
        "fake": 1,
        **((simulated_calls(config) or landing_calls(config)) if config.matching.fit == "landing" else {}),
    }


def critic_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of the critic's update: the jumps again, and the features of both points."""
    if not config.adversarial.weight:
        return {}
    jumps = target_calls(config) if config.adversarial.real == "target" else {}
    return add(landing_calls(config), jumps, {"features": 2})


def critic_start(config: ConsistencyConfig) -> float:
    """Return the share of the steps before the critic starts; 0 without one."""
    return config.adversarial.start if config.adversarial.weight else 0.0


def step_calls(config: ConsistencyConfig) -> Calls:
    """Return the calls of a step by role, sorted: the start once, each update at its own rhythm.

    Those of a target that is the student itself are the student's, as training counts them.
    """
    before_critic: Calls = {"features": -critic_start(config)}
    updates = (
        (add(student_calls(config), before_critic), config.student_every),
        (fake_calls(config), 1),
        (critic_calls(config), config.adversarial.every / (1 - critic_start(config))),
    )
    rates = ({role: count / every for role, count in calls.items()} for calls, every in updates)
    calls = add(start_calls(config), *rates)
    if config.target == "self":
        calls["student"] = calls.get("student", 0) + calls.pop("target", 0)
    return {role: count for role, count in sorted(calls.items()) if count}


def step_cost(config: ConsistencyConfig) -> float:
    """Return all network evaluations of one sample and step; a backward pass counts as two."""
    jumps = 0 if config.fine_tunes else CALLS_OF_JUMP[config.jump] * (1 + (config.compare == "end"))
    features = bool(config.adversarial.weight) - critic_start(config)
    features += bool(config.consistency and config.distance == "features")
    jumps += max(int(simulated_calls(config).get("student", 0)) - CALLS_OF_JUMP[config.jump], 0)
    backward = (jumps + bool(config.denoising) + features) / config.student_every
    r1 = config.adversarial.r1 > 0 and bool(config.adversarial.weight)
    backward += bool(config.matching.weight) + r1 / config.adversarial.every
    return sum(step_calls(config).values()) + 2 * backward
