"""Imports of diffusers and transformers without the optional packages that they import where they find them.

Those take a third of the time in which the command draws a picture. The libraries note at import what is installed, so
this is for a process that ends with its verb.
"""

from __future__ import annotations

import sys

UNUSED = ("bitsandbytes", "kernels", "pandas", "peft", "scipy", "sklearn", "torchao", "torchvision")
"""Optional packages that the libraries do not need to draw."""
in_command = False
"""Whether this process runs one verb of the command and ends."""


def import_libraries() -> None:
    """Import diffusers and transformers without their unused parts, in a process of the command.

    The packages themselves can be imported afterwards.
    """
    if not in_command or "diffusers" in sys.modules:
        return
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        import transformers.modeling_utils  # noqa: F401
        from diffusers import AutoencoderKL  # noqa: F401  # the package itself is lazy
    finally:
        for name in hidden:
            del sys.modules[name]
