"""Command lines of earlier versions, read for one release."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

VERBS = {"train-perceptual": "train-latent-lpips"}
"""Old name of a verb -> its name."""
OPTIONS = {
    "distill": {"--prompts": "--prompt-file"},
    "synthesize": {"--prompts": "--prompt-file", "--config": "--teacher-config"},
    "train-latent-lpips": {"--prompts": "--prompt-file", "--config": "--teacher-config"},
    "train-adapter": {"--config": "--teacher-config"},
    "sample": {"--config": "--teacher-config"},
    "evaluate": {"--prompts": "--prompt-file", "--config": "--teacher-config"},
    "report": {"--prompts": "--prompt-file"},
    "export": {"--prompt": "--prompts", "--config": "--teacher-config"},
}
"""Verb -> old name of an option -> its name. A folder after `distill --config` is a --teacher-config too."""


def current(words: Sequence[str], studies: Container[str]) -> list[str]:
    """Return a command line under the current names of verbs and options.

    Args:
        words: arguments of the command.
        studies: verbs of `fewstep world`, which were verbs of the command itself.
    """
    if not words:
        return []
    verb = VERBS.get(words[0], words[0])
    options = OPTIONS.get(verb, {})
    result = ["world", verb] if verb in studies else [verb]
    for place, word in enumerate(words[1:], 2):
        name, equals, value = word.partition("=")
        value = value if equals or place == len(words) else words[place]
        if verb == "distill" and name == "--config" and Path(value).is_dir():
            name = "--teacher-config"
        result.append(f"{options.get(name, name)}{word[word.index('=') :] if equals else ''}")
    return result
