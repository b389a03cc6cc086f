"""Students written to files at the end of a run, and read at the start of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.backbones.base import Backbone, open_backbone
from fewstep.backbones.families import GUIDANCE_KEY
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.pipeline_writer import write_pipeline
from fewstep.backbones.teachers import teacher_name
from fewstep.common.files import atomic_folder
from fewstep.distillation.config import DistillConfig
from fewstep.students.conditioning_file import extra_embedding_weights, save_extra_embeddings, split_weights
from fewstep.students.inference_settings import inference_record
from fewstep.students.lora import save_lora, stored_matrices, trained_scale, unfolded
from fewstep.students.lora_header import LoraHeader
from fewstep.training.config import StudentConfig


def export_student(
    config: DistillConfig,
    backbone: Backbone,
    weights: Mapping[str, Tensor],
    target: Path,
    notes: Mapping[str, Any],
) -> Path:
    """Write a student for use: a LoRA file, or a whole pipeline folder for a full one.

    Returns:
        the file or folder.
    """
    base = backbone.folder.fingerprint(backbone.folder.network)
    notes = {"method": config.recipe, "guidance_seen": config.method.guidance.model_dump(), **notes}
    notes["training"] = training_facts(config)
    if config.teacher:
        notes["teacher"] = teacher_name(Path(config.teacher))
    own, embeddings = split_weights(weights)
    if config.student.kind == "lora":
        notes |= inference_record(backbone, config.sampling)
        with atomic_folder(target) as part:  # both files or none: half a student is broken
            save_extra_embeddings(part, embeddings)
            file = save_lora(
                part,
                own,
                rank=config.student.rank,
                alpha=config.student.lora_alpha,
                targets=list(config.student.targets or backbone.targets),
                base=base,
                component=backbone.folder.network,
                sampling=config.sampling,
                notes=notes,
            )
        return target / file.name
    network = backbone.fresh_network()
    if GUIDANCE_KEY in own:
        backbone.add_guidance_embedding(network)
    network.load_state_dict({**network.state_dict(), **own})  # buffers (position tables) are not trained
    notes |= inference_record(backbone, config.sampling, network)
    record = {"base": base, "sampling": config.sampling.model_dump(mode="json"), **notes}
    with atomic_folder(target) as part:
        write_pipeline(part, backbone.folder, network, record)
        save_extra_embeddings(part, embeddings)
    return target


def training_facts(config: DistillConfig) -> dict[str, Any]:
    """Return the facts of a training for a model card; None where one does not apply."""
    return {
        "batch": config.loop.batch,
        "learning rate": config.optim.lr,
        "precision": config.loop.precision,
        "teacher's weights": config.student.base,
        "size of pictures": config.data.size,
        "follows": "a student" if config.method.follow == "start" else None,
        "seed": config.loop.seed,
    }


def starting_weights(config: StudentConfig, start: LoraHeader | PipelineFolder) -> dict[str, Tensor]:
    """Read the student that a run starts from: weights by the names of its parameters.

    B of a LoRA is scaled by the ratio of its scale to the run's, so that B A times the scale stays.

    Raises:
        UserError: a file is broken.
    """
    if isinstance(start, PipelineFolder):
        place, weights = start.path, dict(open_backbone(start).network.state_dict())
    else:
        place, weights = start.file, {}
        scale, trained = config.lora_alpha / config.rank, trained_scale(start)
        for name, (a, b) in stored_matrices(start).items():
            own = start.layers[name].scale
            plain = b.float() if trained is None else unfolded(b.float(), trained)
            weights[f"{name}.lora_A.weight"] = a.float()
            weights[f"{name}.lora_B.weight"] = plain * ((trained or own) / scale)
    return {**weights, **extra_embedding_weights(place)}
