"""How far a compiled network is from the same network as it is written, role by role."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.backbones.base import load_backbone
from fewstep.common.compilation import compile_networks, eagerly
from fewstep.diffusion.denoiser import BASE
from fewstep.training.config import StudentConfig
from fewstep.training.roles import networks_of
from fewstep.training.student import make_student
from perf.task import Task

ROLES = ("student", "target", "fake")


def apart(task: Task) -> dict[str, float]:
    """Largest distance of compiled from eager, over the largest value: of each role's output, and of its gradient."""
    backbone = load_backbone(task.folder, torch.device(task.device))
    student = make_student(backbone, StudentConfig(rank=task.rank), ROLES, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for role in ROLES:  # all start as the teacher; each gets an output of its own
            for name, weight in student.parameters(role).items():
                weight.requires_grad_()  # a target learns nothing in training
                if "lora_B" in name:
                    weight.normal_(0, 0.02)
    state = {name: value.to(backbone.device) for name, value in backbone.encode(["x"] * task.batch).items()}
    x = torch.randn(task.batch, *backbone.latent_shape).to(backbone.device)
    t = torch.full((task.batch,), 499.0, dtype=torch.float64)

    def outputs() -> dict[str, Tensor]:
        with torch.no_grad():
            found = {role: student.call(x, t, state, role) for role in (*ROLES, BASE)}
        for role in ROLES:
            loss = student.call(x, t, state, role).square().mean()
            grads = torch.autograd.grad(loss, list(student.parameters(role).values()))
            found[f"{role}, gradient"] = torch.cat([grad.flatten() for grad in grads])
        return found

    compile_networks(networks_of(student.roles))
    with eagerly():
        wanted = outputs()
    found = outputs()
    differences = {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in wanted.items()}
    roles = [wanted[role] for role in (*ROLES, BASE)]
    differences["the two nearest roles, eager"] = min(
        float((a - b).abs().max() / a.abs().max()) for i, a in enumerate(roles) for b in roles[:i]
    )
    return differences
