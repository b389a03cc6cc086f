"""Configs of Stable Diffusion 1.5, 2.1 and XL's base, for single-file checkpoints: known_configs.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.backbones.single_file.recognise import Version
from fewstep.common.choices import Prediction
from fewstep.common.files import atomic_folder, file_lock, short_digest, write_json
from fewstep.common.text import read_table


def configs(version: Version, prediction: Prediction) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a pipeline folder, by their paths in it, without the tokenizers' vocabulary.

    Networks of 2.x were trained on 768 pixels a side to predict v, and on 512 to predict eps.
    """
    files: dict[str, dict[str, Any]] = read_table(__file__)[version]
    if prediction == "v":
        files["scheduler/scheduler_config.json"]["prediction_type"] = "v_prediction"
    if version == "sd2" and prediction == "v":
        files["unet/config.json"]["sample_size"], files["vae/config.json"]["sample_size"] = 96, 768
    return files


def config_folder(version: Version, prediction: Prediction, vocabulary: tuple[Path, Path], cache: Path) -> Path:
    """Return a pipeline folder of configs and tokenizers, made in a cache folder if it is not there yet.

    Args:
        vocabulary: CLIP's vocab.json and merges.txt.

    Raises:
        UserError: the cache cannot be written to.
    """
    files = configs(version, prediction)
    known = json.dumps(files, sort_keys=True) + "".join(path.read_text(encoding="utf-8") for path in vocabulary)
    place = cache / f"{version}-{prediction}-{short_digest(known)}"
    with file_lock(place.with_name(f".{place.name}.lock")):
        if not place.is_dir():
            with atomic_folder(place, keep=True) as part:
                for name, data in files.items():
                    (part / name).parent.mkdir(exist_ok=True)
                    write_json(part / name, data)
                    if name.endswith("tokenizer_config.json"):
                        for source in vocabulary:
                            (part / name).with_name(source.name).write_bytes(source.read_bytes())
    return place
