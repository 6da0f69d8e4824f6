"""Small files that a user writes by hand. Whatever else a path leads to is refused before it is read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from adept_ds.base.errors import InputError

_MOST_BYTES = 1 << 20


def read_small_file(path: Path, name: str, remedy: str) -> str:
    """The text of a file.

    Args:
        name: what a complaint begins with: the file, and the key that names it.
        remedy: what to do about a path that leads to no such file.

    Raises:
        InputError: there is no such file, it cannot be read, it is too large, or it is no UTF-8 text.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{name}: a pipe or a device, and no file; {remedy}")
            content = file.read(_MOST_BYTES + 1)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', error)}); {remedy}") from None
    if len(content) > _MOST_BYTES:
        raise InputError(f"{name}: larger than {_MOST_BYTES >> 20} MiB; {remedy}")
    return _decoded(content, name)


def _without_waiting(path: str, flags: int) -> int:
    """A pipe is opened even if nobody writes to it, and so can be refused."""
    return os.open(path, flags | os.O_NONBLOCK)


def _decoded(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name}: UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}: line {line} is no UTF-8 text (byte {error.start}); convert the file") from None
