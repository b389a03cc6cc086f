"""Check every config of a pipeline folder by the table of keys, without importing torch or diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.backbones import config_keys
from fewstep.backbones.config_keys import ANY, ConfigKeys, Partly
from fewstep.common.errors import UserError, did_you_mean
from fewstep.common.files import read_mapping

SENTENCEPIECE = (".model",)
"""Vocabularies that the package sentencepiece reads."""
LIMITLESS = "lambda_min_clipped"
"""The one key that may be infinite."""


def check_keys(
    keys: ConfigKeys, config: Mapping[str, Any], file: Path, more: Mapping[str, Partly] | None = None
) -> None:
    """Refuse a config with a key or value that fewstep does not act on.

    Args:
        keys: the table of the config's class.
        file: names the config in errors.
        more: the pipeline's own values of some keys, which go before the table.

    Raises:
        UserError: a key that is unknown and not null, a value that is not implemented, or a number that is not finite.
    """
    partly = {**keys.partly, **{key: value for key, value in (more or {}).items() if key in keys.known}}
    for key, (default, legal) in partly.items():
        value = config.get(key, default)
        if legal is not ANY and value not in legal:
            which = "" if key in config else "(its default) "
            raise _wrong(file, key, value, f"{which}is not supported; it must be {' or '.join(map(_shown, legal))}")
    for key, default in keys.read.items():
        kind, value = _kind(default), config.get(key)
        if kind and value is not None and _kind(value) not in (kind, "a whole number" if kind == "a number" else kind):
            raise _wrong(file, key, value, f"must be {kind}, such as {_shown(default)}")
    for key, value in config.items():
        if key.startswith("_"):  # private to a library
            continue
        if key not in keys.known and value is not None:
            unknown = "is an unknown key that may change what is computed; remove it if it does not"
            raise _wrong(file, key, value, unknown)
        numbers = value if isinstance(value, list) else [value]
        counted = key in config_keys.COUNTS & keys.known and value is not None
        if counted and not all(type(number) is int and number > 0 for number in numbers):
            raise _wrong(file, key, value, "must be a whole number above 0")
        if key != LIMITLESS and not _finite(value):
            raise _wrong(file, key, value, "is not finite; give a finite number")


def _wrong(file: Path, key: str, value: Any, reason: str) -> UserError:
    """Return the error of a key of a config."""
    return UserError(f"{file}: {key} = {_shown(value)} {reason}")


def _kind(value: Any) -> str:
    """Return the type of a JSON value in words; empty for null."""
    if isinstance(value, bool):
        return "true or false"
    kinds = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "")


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_model(name: str, component: str, config: Mapping[str, Any], file: Path, pipeline: str) -> None:
    """Refuse a network or an autoencoder of an unknown class, or with a config that is not supported.

    Args:
        name: its class.
        component: its name in the pipeline.
        pipeline: the pipeline's class.
    """
    if name not in config_keys.MODELS:
        raise UserError(
            f"{file.parent} is a {name}, which is not supported as the {component}"
            f"{did_you_mean(name, config_keys.MODELS)}"
        )
    check_keys(config_keys.MODELS[name], config, file, config_keys.BY_PIPELINE.get(pipeline, {}).get(component))


def check_latents(config: Mapping[str, Any], file: Path) -> None:
    """Refuse an autoencoder's config with a broken scale, or with only one of latents_mean and latents_std."""
    scale = config.get("scaling_factor", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale == 0:
        raise _wrong(file, "scaling_factor", scale, "must be a number other than 0")
    if not isinstance(config.get("shift_factor") or 0.0, int | float):
        raise _wrong(file, "shift_factor", config["shift_factor"], "must be a number")
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None and deviation is None:
        return
    channels = config.get("z_dim", config.get("latent_channels"))
    for key, values in (("latents_mean", mean), ("latents_std", deviation)):
        numbers = [value for value in values if isinstance(value, int | float)] if isinstance(values, list) else []
        if len(numbers) != channels or numbers != values:
            named = f"{channels} latent channels"
            both = "beside the other of latents_mean and latents_std"
            raise _wrong(file, key, values, f"must be one number for each of the {named}, {both}")
    if not all(value > 0 for value in deviation or ()):
        raise _wrong(file, "latents_std", deviation, "must be above 0")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text encoder's part of a whole CLIP's config; any other config unchanged."""
    part = config.get("text_config")
    if not isinstance(part, dict):
        return config
    return {**{key: value for key, value in config.items() if key != "text_config"}, **part}


def check_tokenizer(name: str, place: Path, config: Mapping[str, Any]) -> None:
    """Refuse a tokenizer without a readable vocabulary, or with a config that is not supported.

    Without its vocabulary transformers builds one of special tokens alone, and every word becomes an unknown token.

    Args:
        name: its class.
        place: its folder.
        config: its tokenizer_config.json.

    Raises:
        UserError: naming the files that are missing, the extra that reads them, or the key.
    """
    every = [files for known in config_keys.VOCABULARIES.values() for files in known]
    sets = config_keys.VOCABULARIES.get(name.removesuffix("Fast"), list(dict.fromkeys(every)))
    held = [files for files in sets if all((place / file).is_file() for file in files)]
    if not held:
        wanted = " or ".join(" and ".join(files) for files in sets)
        raise UserError(f"{place} holds no vocabulary: a {name} is read from {wanted}; fetch it again")
    if held[0][0].endswith(SENTENCEPIECE) and find_spec("sentencepiece") is None:
        raise UserError(
            f"{place / held[0][0]} is read by the package sentencepiece, which is not installed; "
            "pip install 'fewstep[sentencepiece]'"
        )
    check_keys(config_keys.TOKENIZER, config, place / "tokenizer_config.json")
    for key in config_keys.TOKENIZER.read.keys() & config.keys():
        length = config[key]
        if length is not None and (isinstance(length, bool) or not isinstance(length, int | float) or length < 1):
            raise _wrong(place / "tokenizer_config.json", key, length, "must be a number above 0, or null")


def check_merges(place: Path, special: Collection[str]) -> None:
    """Refuse a byte-pair vocabulary whose merges.txt is incomplete: words would become other tokens.

    Args:
        place: the tokenizer's folder. One with a tokenizer.json is not read from the two files.
        special: tokens that no merge produces.

    Raises:
        UserError: a token in vocab.json of several symbols that no merge produces.
    """
    vocabulary, merges = place / "vocab.json", place / "merges.txt"
    if (place / "tokenizer.json").is_file() or not (vocabulary.is_file() and merges.is_file()):
        return
    made = {line.replace(" ", "") for line in merges.read_text(encoding="utf-8").splitlines()}
    lost = sorted(
        piece
        for piece in read_mapping(vocabulary)
        if len(piece.removesuffix("</w>")) > 1 and piece not in made and piece not in special
    )
    if lost:
        raise UserError(
            f"{merges} lacks {len(lost)} merges of {vocabulary.name}, {lost[0]!r} among them; it was cut off, or is of "
            "another vocabulary: fetch both again"
        )


def check_scheduler(config: Mapping[str, Any], file: Path, pipeline: str) -> None:
    """Refuse a scheduler that is neither of betas nor of flow matching, or with a config that is not supported.

    Args:
        config: with the class in model_index.json as `_class_name`.
        pipeline: the pipeline's class.
    """
    name = str(config.get("_class_name"))
    keys = config_keys.SCHEDULERS.get(name)
    if keys is None:
        raise UserError(
            f"{file}: a {name} is not supported; use a scheduler of betas or of flow matching"
            f"{did_you_mean(name, config_keys.SCHEDULERS)}"
        )
    # keys of another scheduler, which diffusers ignores
    others = {key for each in config_keys.SCHEDULERS.values() for key in each.known} - keys.known
    for key in others & config_keys.DECISIVE.keys() & config.keys():
        if key == "use_flow_sigmas" and config.get("path") == "flow":
            continue  # one of fewstep's schedulers, made from a flow's solver: `path` has the same meaning
        if config[key] not in (None, config_keys.DECISIVE[key]):
            raise _wrong(file, key, config[key], f"has no effect in a {name}; remove it, or use another scheduler")
    own = {key: value for key, value in config.items() if key not in others}
    check_keys(keys, own, file, config_keys.BY_PIPELINE.get(pipeline, {}).get("scheduler"))
    if name.startswith("FlowMatch") or config.get("path") == "flow":
        return
    predicts_flow, sigmas = config.get("prediction_type") == "flow_prediction", bool(own.get("use_flow_sigmas"))
    if predicts_flow != sigmas:
        neither = f"with use_flow_sigmas = {_shown(sigmas)} is neither a flow nor a beta schedule"
        remedy = "a flow needs 'flow_prediction' and true"
        raise _wrong(file, "prediction_type", config.get("prediction_type"), f"{neither}; {remedy}")
    if sigmas and own.get("num_train_timesteps", 1000) != 1000:
        raise _wrong(file, "num_train_timesteps", own["num_train_timesteps"], "of a flow must be 1000")


def check_widths(unet: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Refuse a UNet for text states, or a pooled state, of another width than the text encoders'.

    Args:
        unet, encoders: configs; the text encoders' in the pipeline's order.
        file: names the UNet's config in errors.
    """
    key = "cross_attention_dim" if unet.get("encoder_hid_dim") is None else "encoder_hid_dim"
    wanted, widths = unet.get(key), [text_part(each).get("hidden_size") for each in encoders]
    known = [width for width in widths if isinstance(width, int)]
    if isinstance(wanted, int) and len(known) == len(encoders) and wanted != sum(known):
        states = f"is not the width of the text encoder's states, {' + '.join(map(str, known))}"
        raise _wrong(file, key, wanted, f"{states}; use the text encoders that the UNet was trained with")
    width, time = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    pooled = text_part(encoders[-1]).get("projection_dim")
    if unet.get("addition_embed_type") != "text_time" or not (isinstance(time, int) and isinstance(pooled, int)):
        return
    if width != 6 * time + pooled:
        parts = "6 x addition_time_embed_dim + the last text encoder's projection_dim"
        remedy = f"it must be {6 * time + pooled}"
        raise _wrong(file, "projection_class_embeddings_input_dim", width, f"is not {parts}; {remedy}")
