"""Parts of tables that take too long for every commit: `make test-slow` runs them."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A set of parameters of a test."""
    return pytest.param(*values, marks=pytest.mark.slow)
