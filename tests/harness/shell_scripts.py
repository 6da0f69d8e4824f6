"""What shellcheck says of scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def complaints(*scripts: Path) -> str:
    """Empty where there is nothing to say. Files that they source are looked into too."""
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, "--external-sources", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout
