"""Commit and machine, for records and reports."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def commit() -> str:
    """Return the checkout's commit at the first call, with a mark for changes; "not a checkout" for a package."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return "not a checkout"
    words = ["git", "-C", str(here), "describe", "--always", "--exclude=*", "--dirty= with changes"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware() -> str:
    """Return the name of the GPU, or of the processor with its cores."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
