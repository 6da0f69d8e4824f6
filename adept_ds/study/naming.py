"""Names of files that are made of labels."""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 60


def slug(text: str) -> str:
    """Letters, digits, '.', '_' and '-' alone: what a shell and every file system take; never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.")[:_LONGEST] or "x"
