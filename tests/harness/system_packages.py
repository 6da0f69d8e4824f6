"""Programs of the system that tests on real clusters need: installed where they are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest


def need(config: pytest.Config, programs: Mapping[str, str]) -> None:
    """Install, with apt, what is missing, and say so; the test is skipped where that cannot be.

    Args:
        programs: the package that has it, by the name of the program, or the pattern of a file.
    """
    missing = sorted({package for name, package in programs.items() if not _is_there(name)})
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"needs {names}, which root could install with apt-get")
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\ninstalling {names} with apt-get ...", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"apt-get cannot install {names}: {(done.stderr or done.stdout).strip()[-300:]}")


def _is_there(name: str) -> bool:
    return bool(shutil.which(name) or any(Path("/").glob(name.removeprefix("/"))))
