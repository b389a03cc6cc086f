"""Optimisers: Muon's steps against their definition."""

from __future__ import annotations

import torch

from fewstep.training.checkpoint import optimizer_tensors, restore_optimizer
from fewstep.training.config import OptimConfig
from fewstep.training.optim import MOMENTUM, make_optimizer, orthogonalize

CONFIG = OptimConfig(kind="muon", lr=1e-2, weight_decay=0.1)


def weights() -> dict[str, torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"matrix": (24, 40), "convolution": (20, 8, 3, 3), "first": (24, 3), "bias": (24,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in shapes.items()}


def give_gradients(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for weight in parameters.values():
        weight.grad = torch.randn(weight.shape, generator=rng)


def test_orthogonalised_matrices_keep_their_singular_vectors() -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        matrix = torch.randn(shape, generator=rng)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ orthogonalize(matrix) @ vh.T
        assert inside.diagonal().min() > 0.6
        assert inside.diagonal().max() < 1.3
        assert (inside - inside.diagonal().diag()).abs().max() < 1e-3


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw() -> None:
    moved, other = weights(), weights()
    muon = make_optimizer(moved.values(), CONFIG)
    adamw = make_optimizer(other.values(), CONFIG.model_copy(update={"kind": "adamw"}))
    for seed in range(3):
        for parameters, optimizer in ((moved, muon), (other, adamw)):
            give_gradients(parameters, seed)
            optimizer.step()
    for name in ("first", "bias"):
        assert torch.equal(moved[name], other[name]), name
    momentum = torch.zeros(24, 40)
    expected = weights()["matrix"].detach()
    for seed in range(3):
        given = weights()
        give_gradients(given, seed)
        grad = given["matrix"].grad
        assert grad is not None
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * grad
        step = orthogonalize((1 - MOMENTUM) * grad + MOMENTUM * momentum)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * 0.2 * 40**0.5 * step
    torch.testing.assert_close(moved["matrix"].detach(), expected)
    change = moved["convolution"].detach() - weights()["convolution"].detach()
    assert 0.1 * 1e-2 < change.square().mean().sqrt() < 1e-2


def test_a_muon_run_goes_on_as_if_never_stopped() -> None:
    whole, halved = weights(), weights()
    runs = [(parameters, make_optimizer(parameters.values(), CONFIG)) for parameters in (whole, halved)]
    for seed in range(4):
        for number, (parameters, optimizer) in enumerate(runs):
            if number and seed == 2:
                kept = optimizer_tensors(optimizer, list(parameters))
                optimizer = make_optimizer(parameters.values(), CONFIG)
                restore_optimizer(optimizer, list(parameters), kept)
                runs[number] = parameters, optimizer
            give_gradients(parameters, seed)
            optimizer.step()
    for name, weight in whole.items():
        assert torch.equal(weight, halved[name]), name
