"""Training of a language adapter from text pairs alone, without pictures or the teacher's states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.common.accelerator import make_accelerator
from fewstep.common.rng import KeyedRng
from fewstep.inference.multilingual.adapter import Adapter, SentenceMap, save_adapter
from fewstep.inference.multilingual.pairs import Pair, fingerprint
from fewstep.inference.multilingual.record import text_side
from fewstep.inference.multilingual.sentence import SentenceEncoder, UniversalSentence
from fewstep.inference.multilingual.settings import AdapterConfig
from fewstep.training.loop import train
from fewstep.training.loss import Loss
from fewstep.training.run_folder import RunLog
from fewstep.training.update import Batch, Update


def adapter_loss(
    network: SentenceMap, config: AdapterConfig, vectors: Tensor, rows: Tensor, keys: Tensor, rng: KeyedRng
) -> Loss:
    """Return the cross-entropy of the captions plus the penalty on the map's distance from the identity.

    Sentence vectors of a multilingual encoder are nearly aligned already; without the penalty a map that is learned
    from a thousand pairs overfits.

    Args:
        vectors: sentence vectors of the sources, [B, width].
        rows: numbers of their captions, int64 [B].
        keys: sentence vectors of the captions, [K, width].
    """
    width = vectors.shape[1]
    noise = config.noise / width**0.5 * rng.normal("noise", (width,))
    similarity = network(F.normalize(vectors + noise, dim=1)) @ keys.T
    error = F.cross_entropy(similarity / config.temperature, rows)
    right = (similarity.argmax(1) == rows).float().mean()
    return Loss(error + config.anchor * network.moved(), scalars={"entropy": error, "right": right})


def train_adapter(
    config: AdapterConfig,
    folder: PipelineFolder,
    pairs: Sequence[Pair],
    out: Path,
    target: Path | None = None,
    sentence: SentenceEncoder | None = None,
    *,
    quiet: bool = False,
) -> Adapter:
    """Train an adapter, resuming from the run folder's newest checkpoint, and save it.

    Args:
        folder: the teacher.
        pairs: texts and their translations into the teacher's language; the translations are the stored captions.
        out: run folder.
        target: the adapter's folder, `out/adapter` by default.
        sentence: the sentence encoder; the one of the extra `multilingual` by default.
        quiet: show no progress bar.

    Raises:
        UserError: a foreign run folder, or a place that cannot be written to.
    """
    sentence = sentence or UniversalSentence()
    captions = tuple(dict.fromkeys(pair.target for pair in pairs))
    number = {caption: i for i, caption in enumerate(captions)}
    accelerator = make_accelerator(config.loop.precision, torch.device("cpu"))  # a few small products a step
    vectors = torch.from_numpy(sentence([pair.source for pair in pairs]))
    keys = torch.from_numpy(sentence(captions))
    rows = torch.tensor([number[pair.target] for pair in pairs])
    network = SentenceMap(sentence.width)

    def fetch(items: np.ndarray, _: KeyedRng) -> Batch:
        chosen = torch.from_numpy(items)
        return {"vectors": vectors[chosen], "rows": rows[chosen]}

    def loss(batch: Batch, rng: KeyedRng) -> Loss:
        return adapter_loss(network, config, batch["vectors"], batch["rows"], keys, rng)

    inputs = {"pairs": fingerprint(pairs), "sentence encoder": sentence.sha256, "text encoder": text_side(folder)}
    plan = [Update("adapter", dict(network.named_parameters()), loss, config.optim)]
    with RunLog(out, config, title="adapter", inputs=inputs, main=accelerator.is_main_process, quiet=quiet) as log:
        trained = train(plan, fetch, len(pairs), config.loop, log, accelerator)
    network.load_state_dict(trained.weights["adapter"])
    adapter = Adapter(network.eval().requires_grad_(False), keys, captions, sentence, config)
    if accelerator.is_main_process:
        notes = {"pairs": {"count": len(pairs), "sha256": inputs["pairs"]}}
        save_adapter(target or out / "adapter", adapter, folder, notes)
    accelerator.wait_for_everyone()
    return adapter
