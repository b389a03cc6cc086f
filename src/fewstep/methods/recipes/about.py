"""Paper and purpose of the bundled recipes, for `fewstep recipes`."""

from __future__ import annotations

from typing import NamedTuple


class About(NamedTuple):
    """A recipe's description.

    Attributes:
        paper: arXiv number.
        use: what the recipe is good for.
    """

    paper: str
    use: str


ABOUT = {
    "cd": About("2303.01469", "the original consistency distillation: end point only, Heun teacher, EMA target"),
    "ct": About("2303.01469", "consistency training from data, without a teacher (iCT's target and distance)"),
    "ctm": About("2310.02279", "jumps of any length in 1 to 4 steps, with a critic; the costliest single loss"),
    "kd": About("2101.02388", "regression on stored teacher trajectories; the cheapest step, a baseline"),
    "lcm": About("2310.04378", "LCM-LoRA: the simplest student, 4 to 8 steps, read by every tool"),
    "lcm-full": About("2310.04378", "LCM of all weights, guidance as an input of the network"),
    "mcm": About("2403.06807", "multistep consistency in segments, compared as x0"),
    "pcm": About("2405.18407", "deterministic sampling in as many steps as phases"),
    "shortcut": About("2410.12557", "jumps of any length, trained by halving; few teacher evaluations"),
    "tcd": About("2402.19159", "the default: 2 to 20 steps with adjustable stochasticity (gamma)"),
    "tcd-2": About("2402.19159", "TCD with second-order jumps: closer to the teacher, two evaluations a jump"),
    "tcd-s": About("2402.19159", "TCD with s as an input of the network: accurate jumps of every length"),
    "tdd": About("2409.01347", "TCD trained only for the times of 4 to 8 steps"),
    "tlcm": About("2406.05768", "2 to 4 steps from prompts alone, in four stages with a reward and a critic"),
    "tscd": About("2404.13686", "Hyper-SD's consistency in 8, 4, 2 and 1 segments, stage by stage"),
}
"""Recipe -> its description."""
