"""Networks of points in the plane, and the backbone interface for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.common.choices import Prediction
from fewstep.diffusion.denoiser import Condition
from fewstep.diffusion.schedule import index_of, target_of
from fewstep.diffusion.time_conditioning import WIDTH as SINUSOID
from fewstep.diffusion.time_conditioning import sinusoid
from fewstep_worlds.plane.mixture import Mixture


def exact_output(mixture: Mixture, prediction: Prediction, x: Tensor, t: Tensor) -> Tensor:
    """Return the output of a perfect network of that mixture at x [B, 2] and t [B]."""
    path = mixture.path
    estimate = mixture.denoise(x.double(), t)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    return target_of(prediction, estimate.x0, estimate.eps, alpha, sigma).to(x.dtype)


class PlaneNetwork(nn.Module):
    """The exact output of a mixture (the anchor) plus a correction that starts at zero; fp32.

    With the teacher's own mixture it starts as the exact teacher, as a student with a fresh LoRA does. With one
    Gaussian of the data's mean and variance (the equivalent of EDM's preconditioning) everything else is learned. The
    correction is a function of x, scaled to unit size, and of the time.
    """

    def __init__(self, anchor: Mixture, prediction: Prediction, width: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.anchor, self.prediction = anchor, prediction
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.time_embedding = nn.Sequential(nn.Linear(SINUSOID, width), nn.SiLU(), nn.Linear(width, width))
            self.enter = nn.Linear(2, width)
            hidden = [part for _ in range(2) for part in (nn.SiLU(), nn.Linear(width, width))]
            self.middle = nn.Sequential(*hidden, nn.SiLU())
            self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the output, [B, 2], for x [B, 2] and t float64 [B]."""
        return exact_output(self.anchor, self.prediction, x, t) + self.correct(x, t)

    def correct(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the correction of the anchor's output, [B, 2]."""
        path = self.anchor.path
        size = (path.alpha(t).square() + path.sigma(t).square()).rsqrt()[:, None].float()
        when = self.time_embedding(sinusoid(index_of(path, t)))
        output: Tensor = self.leave(self.middle(self.enter(x.float() * size) + when))
        return output.to(x.dtype)


class PlaneHost:
    """The host of roles in the plane (`training.student.Host`)."""

    targets = ("time_embedding.0", "time_embedding.2", "enter", "middle.1", "middle.3", "leave")
    """Layers that a LoRA adapts."""
    outlets = ("leave",)

    def __init__(self, network: PlaneNetwork) -> None:
        self.network: nn.Module = network.requires_grad_(False)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call a network once."""
        out: Tensor = network(x, t)
        return out

    def time_embedding(self, network: nn.Module) -> nn.Module:
        """Return the module that embeds the time."""
        part = network.time_embedding
        assert isinstance(part, nn.Module)
        return part

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return int(self.network.leave.in_features)  # type: ignore[union-attr,arg-type]

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Return False: networks of the plane have no guidance embedding."""
        return False

    def add_guidance_embedding(self, network: nn.Module) -> None:
        """Do nothing: networks of the plane have no guidance embedding."""


class PlaneCritic(nn.Module):
    """A critic of points."""

    def __init__(self, width: int = 128, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            self.layers = nn.Sequential(
                nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
            )

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return logits [B, 1] of x [B, 2]."""
        logits: Tensor = self.layers(x.float())
        return logits
