"""Where DeepSpeed's C++ extensions are built, and by whom.

Torch (2.13, utils/cpp_extension.py) lets one process build or check an extension while a file `lock` is there, at every
start, and others wait for as long as it is. A process that is killed meanwhile leaves it behind, and then every start
hangs, without a word. Here the lock is one that dies with its holder.

Each environment has a directory of its own: extensions are compiled against one Python, one torch and one DeepSpeed,
for the instructions of one processor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from filelock import SoftFileLease, Timeout

from adept_ds.base.errors import InputError

_DIRECTORY = "TORCH_EXTENSIONS_DIR"
_LOCK = "adept.lock"

_LOOKS, _SAID_EVERY, _LEASE = 0.1, 10.0, 120.0
"""Seconds; the last without a sign of life from a process of another host."""


def own_builds(say: Callable[[str], None]) -> None:
    """From now on this process builds extensions in a directory of its environment, or waits for who does.

    Args:
        say: what is built or waited for.
    """
    import torch.utils.cpp_extension

    os.environ[_DIRECTORY] = str(directory_of_environment())
    torch.utils.cpp_extension.FileBaton = partial(Baton, say=say)  # type: ignore[assignment, misc]


def directory_of_environment() -> Path:
    """Below TORCH_EXTENSIONS_DIR, or the user's cache; the same whatever started this process."""
    made_of = [sys.prefix, sys.version, platform.machine(), _instructions(), *map(_version, ("torch", "deepspeed"))]
    name = f"{sys.implementation.cache_tag}_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]}"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get(_DIRECTORY) or Path(cache) / "adept_ds" / "torch_extensions")
    return root if root.name == name else root / name  # or a process started by one that was here


class Baton:
    """What torch asks who builds: as its `FileBaton`, but nobody holds it who is gone."""

    def __init__(self, lock_file_path: str, wait_seconds: float = _LOOKS, *, say: Callable[[str], None]) -> None:
        self._folder, self._wait_seconds, self._say = Path(lock_file_path).parent, wait_seconds, say
        self._lease = SoftFileLease(self._folder / _LOCK, lease_duration=_LEASE, thread_local=False)
        self._begun, self._said = time.monotonic(), 0.0

    def try_acquire(self) -> bool:
        """Whether this process is to build; else another one has done so meanwhile.

        Raises:
            InputError: nothing can be written there.
        """
        while not self._try():
            owner = self._lease.owner
            self._wait_for(f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process")
            if not (self._folder / _LOCK).exists():
                return False
        if not self._is_built():
            while orphan := self._orphan():
                self._wait_for(f"process {orphan}, left by one that was killed")
            self._say(f"compiling DeepSpeed's extension in '{self._folder}': a minute, once for this environment")
        return True

    def wait(self) -> None:
        """Nothing: `try_acquire` has waited."""

    def release(self) -> None:
        self._lease.release()

    def _try(self) -> bool:
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            reason = error.strerror
            raise InputError(f"{_DIRECTORY}: '{self._folder}' cannot be written ({reason}); set another") from None
        return True

    def _wait_for(self, who: str) -> None:
        waited = time.monotonic() - self._begun
        if waited - self._said > _SAID_EVERY:
            self._said = waited
            self._say(f"waiting for {who}, which builds DeepSpeed's extension in '{self._folder}', {waited:.0f} s")
        time.sleep(self._wait_seconds)

    def _is_built(self) -> bool:
        return any(self._folder.glob("*.so"))

    def _orphan(self) -> int | None:
        """A compiler, or what started it, whose own parent was killed: it still writes there."""
        for process in psutil.process_iter(["cwd"]):
            if process.info["cwd"] == str(self._folder) and process.pid != os.getpid():
                return process.pid
        return None


def _instructions() -> str:
    """That the processor knows: DeepSpeed compiles for the one it finds, and clusters have several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
