"""Components of a pipeline folder as frozen networks and tokenizers; errors of the libraries become one line."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fewstep.backbones.config_checks import check_merges
from fewstep.backbones.pipeline_folder import PipelineFolder
from fewstep.backbones.weight_files import weight_variant
from fewstep.common.errors import UserError

UNUSED = "pooler."
"""Prefix of text encoder weights that may be missing: pictures are drawn from the states alone."""


class EnoughError(Exception):
    """Signal that ends a network call whose remaining layers are not needed."""


@contextmanager
def named(verb: str, part: str) -> Iterator[None]:
    """Turn any exception of a library into a `UserError` that names the part of the pipeline.

    Raises:
        UserError: "cannot VERB PART: ...".
    """
    try:
        yield
    except (UserError, EnoughError):
        raise
    except Exception as error:  # libraries have classes of their own, which change from version to version
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot {verb} {part}: {reason}") from error


@contextmanager
def loading(part: str) -> Iterator[None]:
    """Turn loading errors into a `UserError`; silence the libraries' tables of keys meanwhile."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    of_diffusers.set_verbosity_error()
    of_transformers.set_verbosity_error()
    try:
        with named("load", part):
            yield
    finally:
        of_diffusers.set_verbosity(levels[0])
        of_transformers.set_verbosity(levels[1])


def _refuse(keys: Collection[str], part: str, message: str, remedy: str) -> None:
    """Raise an error that names the first of `keys`, if there is one."""
    if keys:
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise UserError(f"cannot load {part}: {message.format(min(keys) + more)}; {remedy}")


def load_network(folder: PipelineFolder, component: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a network of diffusers from safetensors into main memory, frozen and in eval mode.

    Raises:
        UserError: broken files; a weight that is missing, which the library would draw at random; or one that the
            config builds no place for.
    """
    import diffusers

    place = folder.path / component
    with loading(str(place)):
        network, info = getattr(diffusers, folder.components[component][1]).from_pretrained(
            place,
            variant=weight_variant(place),
            use_safetensors=True,
            output_loading_info=True,
            torch_dtype=dtype,
        )
    message = "its config.json builds no {}, which its files hold"
    _refuse(info["unexpected_keys"], str(place), message, "give the config that the weights were saved with")
    _refuse(info["missing_keys"], str(place), "its files hold no {}", "give the whole pipeline folder")
    return network.eval().requires_grad_(False)


def text_class(folder: PipelineFolder, component: str, legal: Sequence[str]) -> Any:
    """Return the class of a tokenizer or text encoder.

    Args:
        legal: names of classes that it may be of; empty for any of transformers.

    Raises:
        UserError: another class.
    """
    name = folder.components[component][1]
    library: Any = importlib.import_module(folder.components[component][0])
    if (legal and name not in legal) or not hasattr(library, name):
        raise UserError(f"{component} class {name!r} is not one of {', '.join(legal) or 'transformers'}")
    return getattr(library, name)


def load_text(
    folder: PipelineFolder,
    device: torch.device,
    tokenizers: Sequence[str],
    encoders: Sequence[str],
    dtype: torch.dtype = torch.float32,
    *,
    offload: bool = False,
) -> list[tuple[Any, Any]]:
    """Load the pairs of tokenizer and text encoder, in the family's order; encoders on the device.

    Args:
        dtype: of the encoders.
        offload: keep their weights in main memory; the device holds those of one layer while it runs.
        tokenizers, encoders: names of classes that they may be of; empty for any of transformers.

    Raises:
        UserError: a class that is not legal, or broken or incomplete files.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # its bars would appear between ours and in errors
    pairs = list(zip(folder.family.tokenizers, folder.family.encoders, strict=True))
    # all classes are checked before anything is loaded
    classes = [(text_class(folder, words, tokenizers), text_class(folder, place, encoders)) for words, place in pairs]
    found = []
    for (words, place), kinds in zip(((folder.path / a, folder.path / b) for a, b in pairs), classes, strict=True):
        with loading(str(words)):
            tokenizer = kinds[0].from_pretrained(words, local_files_only=True)
            check_merges(words, tokenizer.all_special_tokens)
        if not hasattr(kinds[1], "config_class"):  # of diffusers: a network between text encoder and denoiser
            found.append((tokenizer, put(load_network(folder, place.name, dtype), device, offload)))
            continue
        with loading(str(place)):
            encoder, info = kinds[1].from_pretrained(
                place,
                local_files_only=True,
                use_safetensors=True,
                variant=weight_variant(place),
                dtype=dtype,
                output_loading_info=True,
            )
        missing = [key for key in info["missing_keys"] if not key.startswith(UNUSED)]
        _refuse(missing, str(place), "its files hold no {}", "give the whole pipeline folder")
        # a tokenizer that names no length has one of 1e30
        most = getattr(encoder.config, "max_position_embeddings", tokenizer.model_max_length)
        with loading(str(words)):
            tokenizer.model_max_length = int(min(tokenizer.model_max_length, most))
        found.append((tokenizer, put(encoder.eval().requires_grad_(False), device, offload)))
    return found


def put(encoder: Any, device: torch.device, offload: bool) -> Any:
    """Return an encoder that runs on the device, with its weights there or, layer by layer, in main memory."""
    if not offload:
        return encoder.to(device)
    from accelerate import cpu_offload

    return cpu_offload(encoder, device)


def words_beyond(tokenizer: Any, texts: Sequence[str], length: int) -> list[str]:
    """Return the end of each text beyond its first `length` tokens, special ones counted; empty for none."""
    texts = list(texts)
    found = [""] * len(texts)
    whole = tokenizer(texts, verbose=False)["input_ids"]
    long = [i for i, ids in enumerate(whole) if len(ids) > length]
    if not long:
        return found
    kept = tokenizer([texts[i] for i in long], truncation=True, max_length=length, verbose=False)["input_ids"]
    for i, ids in zip(long, kept, strict=True):
        common = next((n for n, (a, b) in enumerate(zip(whole[i], ids, strict=False)) if a != b), len(ids))
        found[i] = tokenizer.decode(whole[i][common:], skip_special_tokens=True).strip()
    return found


def load_part(folder: PipelineFolder, component: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a network of diffusers or transformers by itself, see `load_network`."""
    kind = text_class(folder, component, ())
    if not hasattr(kind, "config_class"):
        return load_network(folder, component, dtype)
    return kind.from_pretrained(
        folder.path / component, local_files_only=True, use_safetensors=True, dtype=dtype
    ).eval()
