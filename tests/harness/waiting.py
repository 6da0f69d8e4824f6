"""Waiting for something that happens soon, on a machine that may be busy."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    """Returns as soon as `condition` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.05)


def outcome(process: subprocess.Popen[bytes], out: Path) -> tuple[int, str]:
    """Exit code, and all that was said, which goes into `out`."""
    try:
        code = process.wait(500)
    finally:
        process.kill()
    return code, out.read_text()
