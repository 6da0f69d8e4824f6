"""Waiting for something that happens soon, on a machine that may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    """Returns as soon as `condition` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.05)
