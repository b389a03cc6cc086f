"""Optional dependencies (extras) and the error when one is missing."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.common.errors import UserError

INCEPTION_PACKAGES = ("torch_fidelity",)
"""Packages of the extra `fidelity`, for FID and KID on Inception."""
METRICS_PACKAGES = ("pandas", "matplotlib", "jinja2")
"""Packages of the extra `metrics`."""


def check_installed(verb: str, packages: Sequence[str] = METRICS_PACKAGES, extra: str = "metrics") -> None:
    """Refuse a verb whose extra is not installed."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{verb} needs {package}, which is not installed; pip install 'fewstep[{extra}]'")
