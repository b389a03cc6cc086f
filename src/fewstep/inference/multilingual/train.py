"""Training of a language adapter from text pairs, by the teacher's token states and by its outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone, open_backbone
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.accelerator import make_accelerator
from fewstep.common.rng import KeyedRng
from fewstep.diffusion.conditioned import ConditionedDenoiser
from fewstep.diffusion.denoiser import BASE, Condition, Denoiser, join
from fewstep.diffusion.samplers import start_size
from fewstep.diffusion.solver import ddim, integrate
from fewstep.inference.multilingual.adapter import Adapter, save_adapter
from fewstep.inference.multilingual.network import MASK, StateMap
from fewstep.inference.multilingual.pairs import Pairs, fingerprint
from fewstep.inference.multilingual.record import text_side
from fewstep.inference.multilingual.sentence import SentenceEncoder, UniversalSentence, piece_vectors
from fewstep.inference.multilingual.settings import AdapterConfig
from fewstep.students.resolve import end_point_sampling
from fewstep.training.loop import train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep.training.update import Batch, Update

UNITS = 512
"""Pairs whose English states set the units of the adapter's outputs."""


def output_error(
    backbone: Backbone,
    omega: float,
    english: Condition,
    mapped: Condition,
    null: Condition,
    jumps: int,
    rng: KeyedRng,
) -> Tensor:
    """Return the error of the teacher's eps under mapped states, as a share of what the prompt changes in it.

    ||eps(x_t, t, mapped) - eps(x_t, t, english)||^2 / ||eps(x_t, t, english) - eps(x_t, t, null)||^2, PEA-Diffusion's
    output loss (arXiv 2311.17086) without units. x_t is a point of the teacher's own trajectory, so that no pictures
    are needed: `jumps` guided DDIM steps under the English states, from noise to a time that is uniform on the path.

    Args:
        omega: guidance of these steps.
        english, mapped, null: conditions of n prompts.
        rng: random numbers of n or more samples; the first n are used.
    """

    def call(x: Tensor, t: Tensor, condition: Condition, _: str) -> Tensor:
        return backbone.call(backbone.network, x, t, condition)

    path, n = backbone.path, len(next(iter(english.values())))
    denoiser = Denoiser(call, path, backbone.prediction, backbone.embedded_guidance)
    x = rng.normal("noise", backbone.latent_shape)[:n] * start_size(path)
    t = rng.uniform("time", path.least, path.noisiest)[:n]
    times = torch.stack([path.noisiest + (t - path.noisiest) * jump / jumps for jump in range(jumps + 1)])
    teacher = ConditionedDenoiser(denoiser, english, BASE)
    if omega:
        teacher = replace(teacher, null=null, omega=torch.full((n,), omega))
    with torch.no_grad():
        x = integrate(ddim, teacher.denoise, path, x, times)
        both = denoiser.estimate(torch.cat([x, x]), torch.cat([t, t]), join(english, null), BASE).eps
        wanted, without = both.chunk(2)
    found = denoiser.estimate(x, t, mapped, BASE).eps
    return (found - wanted).square().mean() / (wanted - without).square().mean()


def train_adapter(
    config: AdapterConfig,
    folder: PipelineFolder,
    pairs: Pairs,
    out: Path,
    target: Path | None = None,
    sentence: SentenceEncoder | None = None,
    *,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> Adapter:
    """Train an adapter, resuming from the run folder's newest checkpoint, and save it.

    Args:
        folder: the teacher.
        pairs: texts and their translations into the teacher's language.
        out: run folder.
        target: the adapter's folder, `out/adapter` by default.
        sentence: the sentence encoder; the one of the extra `multilingual` by default.
        quiet: show no progress bar.

    Raises:
        UserError: a foreign run folder, or a place that cannot be written to.
    """
    sentence = sentence or UniversalSentence(batch=64)
    accelerator = make_accelerator(config.loop.precision, torch.device(device))
    backbone = open_backbone(folder, accelerator.device)
    if config.output_share:
        backbone.to_device()
    omega = end_point_sampling(folder).omega

    def encode(texts: list[str]) -> Condition:
        return {name: value.to(accelerator.device) for name, value in backbone.encode(texts).items()}

    spread = np.linspace(0, len(pairs) - 1, min(len(pairs), UNITS)).astype(int)
    some = encode([pairs[row].target for row in spread.tolist()])
    torch.manual_seed(config.loop.seed)
    shapes = {name: tuple(value.shape[1:]) for name, value in some.items()}
    network = StateMap(config, sentence.width, shapes).to(accelerator.device)
    network.fit_units(some)
    null = {name: value.to(accelerator.device) for name, value in backbone.null(config.output_batch).items()}

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        chosen = [pairs[item] for item in items.tolist()]
        vectors, padding = piece_vectors(sentence, [pair.source for pair in chosen], config.window)
        english = encode([pair.target for pair in chosen])
        return {"vectors": vectors.to(accelerator.device), "padding": padding.to(accelerator.device), **english}

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        english = {name: batch[name] for name in shapes}
        outputs = network(batch["vectors"], batch["padding"])
        states = network.error(outputs, english)
        if not config.output_share:
            return Loss(states, scalars={"states": states})
        n = min(config.output_batch, len(batch["vectors"]))
        first, empty = ({name: value[:n] for name, value in of.items()} for of in (english, null))
        mapped = {name: first[name] if name == MASK else value[:n] for name, value in outputs.items()}
        error = output_error(backbone, omega, first, mapped, empty, config.jumps, rng)
        share = config.output_share
        return Loss(share * error + (1 - share) * states, scalars={"states": states, "outputs": error})

    inputs = {
        "pairs": fingerprint(pairs),
        "sentence encoder": sentence.sha256,
        "teacher": folder.identity() if config.output_share else text_side(folder),
    }
    plan = [Update("adapter", dict(network.named_parameters()), loss, config.optim)]
    with RunLog(out, config, title="adapter", inputs=inputs, main=accelerator.is_main_process, quiet=quiet) as log:
        trained = train(plan, fetch, len(pairs), config.loop, log, accelerator)
    network.load_state_dict(trained.weights["adapter"], strict=False)  # units are buffers
    adapter = Adapter(network.cpu().eval().requires_grad_(False), sentence, config)
    if accelerator.is_main_process:
        notes = {"pairs": {"count": len(pairs), "sha256": inputs["pairs"]}}
        save_adapter(target or out / "adapter", adapter, folder, notes)
    accelerator.wait_for_everyone()
    return adapter
