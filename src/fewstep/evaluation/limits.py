"""Settings and limits of evaluation. Light: read before torch is imported."""

from __future__ import annotations

FD_FEWEST = 500
"""Pictures below which FD is refused: its own bias would rule."""
FD_ADVISED = 1000
"""Pictures from which FD is worth quoting."""
KID_FEWEST = 10
"""Pictures below which KID is refused."""
