"""Uploads of an export to a hub by huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.backbones.teachers import HUB_ID
from fewstep.common.errors import UserError

REASONS = {
    "LocalTokenNotFoundError": "there is no token; log in by `hf auth login`, or set HF_TOKEN",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "RepositoryNotFoundError": "the hub has no such repository, or the token may not write to it",
    "ConnectError": "the hub cannot be reached",
}
"""Class of an error of huggingface_hub or its client -> the cause."""


def check_push(repo: str) -> None:
    """Refuse an upload that cannot be made, before anything is exported: by the name, then by asking the hub.

    Raises:
        UserError: no owner/name, no valid token, or a hub that cannot be reached.
    """
    if not HUB_ID.fullmatch(repo) or "@" in repo:
        raise UserError(f"push = {repo!r} is not the name of a repository; use owner/name")
    _asked(repo, lambda hub: hub.whoami())


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload the files of a folder to a model repository, made if there is none; return its address.

    Raises:
        UserError: the hub refuses the card or the files, or cannot be reached.
    """

    def upload(hub: Any) -> str:
        url = hub.create_repo(repo, exist_ok=True, private=private)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
        return str(url)

    address: str = _asked(repo, upload)
    return address


def _asked(repo: str, ask: Any) -> Any:
    """Return the answer of the hub; any error of its client becomes one line."""
    from huggingface_hub import HfApi

    try:
        return ask(HfApi())
    except Exception as error:  # the client's classes change from version to version
        names = [kind.__name__ for kind in type(error).__mro__]
        known = next((reason for name, reason in REASONS.items() if name in names), None)
        reason = known or " ".join(str(error).split())[:300] or names[0]
        raise UserError(f"push = {repo!r} was not uploaded: {reason}", field="push") from error
