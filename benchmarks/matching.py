"""How far a fake score follows its student, and what of the gap of scores is guidance, where every score is exact.

    python benchmarks/matching.py --out runs/matching --seeds 0 1 2

A plane with prompts: eight modes on a ring, of which each prompt names two. The guided teacher is exact. A student of
TLCM's second stage goes on with matching by `CASES`. Prints a table, one row a case and seed:

- guidance: rms of the real score's guidance in the gap, omega (c - null), in x0, at three shares of T.
- wanted, fake: rms of (exact score of where the student lands - real without guidance), from --points landings, and of
  what the fake score gives for it; 0 where it is still the teacher.
- untracked: rms of the difference of these two over that of the wanted: 1 where the fake score is still the teacher.
- teacher, data: squared energy distance of 4-call samples to 50 guided steps of the teacher, and to the prompt's data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.common.accelerator import make_accelerator
from fewstep.common.config import Config, validate
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.config import Sampling
from fewstep.diffusion.denoiser import BASE, FAKE, Condition, Denoiser
from fewstep.diffusion.draw_latents import draw_latents
from fewstep.diffusion.schedule import add_noise, scaled_linear
from fewstep.methods.config import ConsistencyConfig
from fewstep.methods.consistency import make_pair, student_landing
from fewstep.methods.distribution_matching import fake_points
from fewstep.methods.pair import MicroBatch
from fewstep.methods.update_plan import make_update_plan, roles_of
from fewstep.training.config import LoopConfig, OptimConfig, StudentConfig
from fewstep.training.loop import Trained, train
from fewstep.training.roles import copy_role
from fewstep.training.run_folder import RunLog
from fewstep.training.student import Student, make_student
from fewstep.training.update import Batch
from fewstep_worlds.plane.mixture import Mixture, ring, times_of
from fewstep_worlds.plane.network import PlaneNetwork

PROMPTS = 4
PATH = scaled_linear()
WHOLE = ring(PATH)


def named(prompt: int) -> Mixture:
    """The law of a prompt: two neighbours on the ring, one twice as likely."""
    modes = torch.tensor([2 * prompt, 2 * prompt + 1])
    return Mixture(PATH, torch.tensor([2, 1], dtype=torch.float64) / 3, WHOLE.means[modes], WHOLE.stds[modes])


LAWS = [*(named(prompt) for prompt in range(PROMPTS)), WHOLE]
"""The last one is that of the empty prompt."""


WEIGHTS = torch.zeros(PROMPTS + 1, len(WHOLE.means), dtype=torch.float64)
for prompt in range(PROMPTS):
    WEIGHTS[prompt, 2 * prompt : 2 * prompt + 2] = LAWS[prompt].weights
WEIGHTS[PROMPTS] = WHOLE.weights


def exact(x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
    """Return E[eps | x] of x [B, 2] at t [B] under each sample's prompt; the modes are all equally wide."""
    alpha, sigma = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]
    var = (alpha * WHOLE.stds[0]).square() + sigma.square()
    away = (x.double()[:, None] - alpha[:, None] * WHOLE.means).square().sum(2)
    share = torch.softmax(WEIGHTS[prompts].log() - away / (2 * var), 1)
    return (sigma / var * (x - alpha * (share @ WHOLE.means))).to(x.dtype)


class Prompted(nn.Module):
    """The exact unguided network plus a correction that sees the prompt, too, and starts at zero."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.inner = PlaneNetwork(WHOLE, "eps", width, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 17)
            self.prompt = nn.Linear(PROMPTS + 1, width)

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """x [B, 2], t float64 [B], prompts int64 [B] -> eps [B, 2]."""
        hot = nn.functional.one_hot(prompts, PROMPTS + 1).float()
        embedding = self.inner.time_embedding
        handle = embedding.register_forward_hook(lambda module, inputs, out: out + self.prompt(hot))
        try:
            correction = self.inner.correct(x, t)
        finally:
            handle.remove()
        return exact(x, t, prompts) + correction


class Host:
    """What `make_student` needs of a backbone."""

    targets = ("prompt", "enter", "leave", "middle.1", "middle.3", "time_embedding.0", "time_embedding.2")
    outlets = ("inner.leave",)

    def __init__(self, network: Prompted) -> None:
        self.network: nn.Module = network.requires_grad_(False)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One network call."""
        out: Tensor = network(x, t, condition["prompt"])
        return out

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """The part that embeds the time."""
        found: nn.Module = network.inner.time_embedding  # type: ignore[union-attr,assignment]
        return found

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return int(self.network.inner.leave.in_features)  # type: ignore[union-attr,arg-type]


class Case(Config):
    """A way to train the last stage.

    Attributes:
        updates: of the student.
        matching: changes to its settings; none for the stage before.
        lr: the student's.
    """

    name: str
    updates: int
    matching: dict[str, Any]
    lr: float = 3e-5
    omega: float = 2.0
    seed: int = 0
    loop: LoopConfig = LoopConfig()

    @property
    def method(self) -> ConsistencyConfig:
        """The joined stage's, with matching."""
        return validate(
            ConsistencyConfig,
            {
                "grid": 8, "k": 1, "substeps": 3, "s": "edge", "start": "student", "student_steps": 4, "end": "clean",
                "guidance": {"convention": "lcm", "low": self.omega, "high": self.omega}, "matching": self.matching,
            },
        )  # fmt: skip


@dataclass(frozen=True)
class Room:
    """A student and its exact teacher."""

    case: Case
    student: Student
    denoiser: Denoiser


def lay_out(case: Case) -> Room:
    """All roles as the unguided teacher."""
    network = Prompted(128, case.seed)
    student = make_student(
        Host(network), StudentConfig(rank=64, alpha=8, targets=Host.targets), roles_of(case.method), case.seed
    )

    def call(x: Tensor, t: Tensor, condition: Condition, role: str) -> Tensor:
        return exact(x, t, condition["prompt"]) if role == BASE else student.call(x, t, condition, role)

    return Room(case, student, Denoiser(call, PATH, "eps"))


def sample_of(items: np.ndarray) -> MicroBatch:
    """Prompts in turn."""
    prompts = torch.from_numpy(items % PROMPTS)
    null = torch.full_like(prompts, PROMPTS)
    return MicroBatch(torch.zeros(len(items), 2), {"prompt": prompts}, {"prompt": null}, prompts=prompts)


def learn(room: Room, out: Path) -> Trained:
    """Train by the project's own plan and loop."""
    case = room.case
    first = OptimConfig(lr=case.lr, decay="cosine", ema=0.99)
    optim = OptimConfig(lr=case.lr) if case.matching else first
    plan = make_update_plan(case.method, optim, room.student, room.denoiser)

    def fetch(items: np.ndarray, rng: KeyedRng) -> Batch:
        return {"sample": sample_of(items)}

    with RunLog(out, case, title=case.name, quiet=True) as log:
        return train(plan, fetch, 2**20, case.loop, log, make_accelerator("fp32", torch.device("cpu")))


def case_of(name: str, updates: int, seed: int, batch: int, omega: float, rate: float, **matching: Any) -> Case:
    """A case, as long as its student's updates need."""
    steps = updates * (matching["every"] if matching else 1)
    loop = LoopConfig(steps=steps, batch=batch, seed=seed, log_every=500, save_every=steps, keep=1)
    settings = {"weight": 1.0, **matching} if matching else {}
    return Case(name=name, updates=updates, matching=settings, seed=seed, loop=loop, omega=omega, lr=rate)


def posterior(points: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] of the law that is these points [N, 2], float64 [B, 2]."""
    alpha, sigma = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]
    rows = []
    for x, a, s in zip(x_t.split(500), alpha.split(500), sigma.split(500), strict=True):
        far = torch.cdist(x, torch.zeros(1, 2, dtype=x.dtype)).square() - 2 * a * (x @ points.T)
        far = far + a.square() * points.square().sum(1)
        rows.append(torch.softmax(-far / (2 * s.square()), 1) @ points)
    return torch.cat(rows)


@torch.no_grad()
def landings(room: Room, prompt: int, step: int, count: int) -> Tensor:
    """Where one jump lands from the student's noised samples, float64 [count, 2]."""
    items = np.full(count, prompt)
    rng = KeyedRng(12345, step, tuple(range(count)))
    pair = make_pair(room.case.method, room.denoiser, sample_of(items), rng)
    return student_landing(pair).double()


def rms(x: Tensor) -> float:
    """Root of the mean squared length of x [B, 2]."""
    return float(x.square().sum(1).mean().sqrt())


LEVELS = (0.25, 0.5, 0.75)
"""Shares of T at which scores are compared."""


@torch.no_grad()
def measure(room: Room, points: int) -> dict[str, float]:
    """Return the figures of a row, means over prompts."""
    found = [scores(room, prompt, points) | distances(room, prompt, points // 2) for prompt in range(PROMPTS)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def scores(room: Room, prompt: int, points: int) -> dict[str, float]:
    """Compare the parts of the gap at each noise level, in x0."""
    law, held = landings(room, prompt, 0, points), landings(room, prompt, 1, points // 2)
    condition = {"prompt": torch.full((len(held),), prompt)}
    found = {}
    for share in LEVELS:
        t = times_of(PATH.clean + share * (PATH.noisiest - PATH.clean), held)
        x_t = add_noise(PATH, held, KeyedRng(54321, prompt, tuple(range(len(held)))).normal("eps", (2,)).double(), t)
        real = LAWS[prompt].denoise(x_t, t).x0
        guidance = room.case.omega * (real - WHOLE.denoise(x_t, t).x0)
        fake = real
        if FAKE in roles_of(room.case.method):
            fake = room.denoiser.estimate(x_t.float(), t, condition, FAKE).x0.double()
        wanted = posterior(law, x_t, t) - real
        found |= {
            f"guidance {share:g}": rms(guidance),
            f"wanted {share:g}": rms(wanted),
            f"fake {share:g}": rms(fake - real),
            f"untracked {share:g}": rms(fake - real - wanted) / rms(wanted),
        }
    return found


def distances(room: Room, prompt: int, count: int) -> dict[str, float]:
    """Of 4-call samples and of the guided teacher's own."""
    law = LAWS[prompt]
    condition = {"prompt": torch.full((count,), prompt)}
    null = {"prompt": torch.full((count,), PROMPTS)}
    own = Sampling(sampler="sss", steps=4, gamma=1.0, grid=8, spacing="grid", end="clean")
    drawn = draw_latents(room.denoiser, condition, null, own, range(9000, 9000 + count), (2,), "student").double()
    guided = Sampling(sampler="ddim", steps=50, grid=1000, end="clean", omega=room.case.omega)
    taught = draw_latents(room.denoiser, condition, null, guided, range(1000, 1000 + count), (2,), BASE).double()
    return {"teacher": energy(drawn, taught), "data": law.energy(drawn, PATH.clean)}


def energy(x: Tensor, y: Tensor) -> float:
    """Squared energy distance between two sets of points."""
    return float(2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean())


def start_case(seed: int, omega: float, steps: int = 600) -> Case:
    """A student of the second stage, which the last one starts from."""
    return case_of("joined", steps, seed, 128, omega, 5e-3)


def run(case: Case, first: Case, out: Path, points: int) -> dict[str, float]:
    """Train a case from its seed's own start and measure it."""
    room = lay_out(case)
    for part in [first, case][: 1 + bool(case.matching)]:
        folder = out / f"{part.name.replace(' ', '-')}-{case.omega:g}-{case.seed}"
        trained = learn(room if part is case else lay_out(part), folder)
        for role, own in trained.weights.items():
            copy_role(own, room.student.parameters(role))
    return measure(room, points)


BEFORE: dict[str, Any] = {"fit": "landing", "every": 5, "lr": 1e-5}
"""As the recipe was: 200 updates of the student, and a fake score that learns at its rate."""
NOW: dict[str, Any] = {"fit": "sample", "every": 5, "lr": 1e-4}
"""As the recipe is: 1,000 updates."""
RATE = 1e-5
"""The student's in the last stage, as in the recipe; so is its LoRA, of rank 64 and alpha 8."""


def cases(seed: int, omega: float, batch: int, shorter: int) -> list[Case]:
    """The rows of a table; `shorter` divides the steps and multiplies all rates, so that weights move as far."""
    return [
        case_of(name, updates // shorter, seed, batch, omega, shorter * RATE, **{**own, "lr": shorter * own["lr"]})
        for name, updates, own in (("before", 200, BEFORE), ("now", 1000, NOW))
    ]


FOLLOWED = (1e-5, 1e-4, 1e-3)
"""Learning rates of a fake score beside a student that stays as it is."""


@torch.no_grad()
def drawn_points(room: Room, fit: str, prompt: int, count: int) -> Tensor:
    """What a fake score is fitted to, fp32 [count, 2]."""
    rng = KeyedRng(999, prompt, tuple(range(count)))
    pair = make_pair(room.case.method, room.denoiser, sample_of(np.full(count, prompt)), rng)
    config = room.case.method.matching.model_copy(update={"fit": fit})
    return fake_points(config, pair)[0].float()


def followed(first: Case, out: Path, points: int, batch: int, fit: str, marks: Sequence[int]) -> None:
    """Print how far fake scores of several rates get beside a student that stays as it is, after so many steps."""
    base = case_of("followed", 1, first.seed, batch, first.omega, RATE, fit=fit, every=1, lr=RATE)
    for rate in FOLLOWED:
        room = lay_out(base)
        trained = learn(lay_out(first), out / f"joined-{first.omega:g}-{first.seed}")
        copy_role(trained.weights["student"], room.student.parameters("student"))
        held = torch.stack([drawn_points(room, fit, prompt, points) for prompt in range(PROMPTS)])
        weights = list(room.student.parameters(FAKE).values())
        optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(first.seed)
        config = room.case.method.matching
        for step in range(1, max(marks) + 1):
            prompts = torch.randint(PROMPTS, (batch,), generator=generator)
            x0 = held[prompts, torch.randint(points, (batch,), generator=generator)]
            share = config.low + (config.high - config.low) * torch.rand(
                batch, generator=generator, dtype=torch.float64
            )
            t, eps = PATH.clean + (PATH.noisiest - PATH.clean) * share, torch.randn(batch, 2, generator=generator)
            output = room.denoiser.call(add_noise(PATH, x0, eps, t), t, {"prompt": prompts}, FAKE)
            (output - eps).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            if step in marks:
                found = measure(room, points)
                cells = [f"{fit}, lr {rate:g}", str(step), *(f"{value:.3f}" for value in found.values())]
                print("| " + " | ".join(cells) + " |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--omega", type=float, default=2.0)
    parser.add_argument("--start", type=int, default=600, help="steps of the stage before")
    parser.add_argument("--points", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shorter", type=int, default=1, help="divides steps, multiplies learning rates")
    parser.add_argument("--follow", choices=("landing", "sample"), help="fake scores beside a student that stays")
    parser.add_argument("--marks", type=int, nargs="+", default=[1000, 5000], help="steps at which these are measured")
    args = parser.parse_args(argv)
    for number, seed in enumerate(args.seeds):
        first = start_case(seed, args.omega, args.start)
        if args.follow:
            followed(first, args.out, args.points, args.batch, args.follow, args.marks)
            continue
        for case in [first, *cases(seed, args.omega, args.batch, args.shorter)]:
            found = run(case, first, args.out, args.points)
            if not number and not case.matching:
                print("| case | seed | " + " | ".join(found) + " |\n" + "| --- " * (len(found) + 2) + "|")
            cells = [case.name, str(seed), *(f"{value:.3f}" for value in found.values())]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
