"""Paths as they stand in a configuration: all of them are read alike, wherever they stand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_LONGEST_NAME = 255
"""Bytes of one name, on every file system in use."""

_LONGEST_PATH = 4095
"""Bytes of a whole path, on Linux."""


def expanded(text: str) -> str:
    """A path with `~` or `~user` in front written out; nothing else in it has a meaning, `$VAR` neither.

    Raises:
        ValueError: no file can have this path; the message says what to do.
    """
    if not text.strip():
        raise ValueError(f"{text!r} is no path; write one")
    control = next((char for char in text if ord(char) < 32 or ord(char) == 127), None)
    if control is not None:
        raise ValueError(f"{text!r} has the character {control!r} in it; correct the path")
    path = os.path.expanduser(text)  # noqa: PTH111 - a user who does not exist is a RuntimeError of pathlib's
    if path.startswith("~"):
        user = path[1:].split("/")[0]
        raise ValueError(f"{text!r} is below the home of '{user}', which is not known; write the path in full")
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is no text that a file can be named by; correct the path") from None
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in names):
        raise ValueError(f"'{text[:40]}...' is too long for a file's name; correct the path")
    return path


def _path(value: Any) -> Any:
    """What is no text is left to pydantic to refuse."""
    return Path(expanded(value)) if isinstance(value, str) else value


UserPath = Annotated[Path, BeforeValidator(_path)]
"""A file or directory of the user's."""

ModelName = Annotated[str, AfterValidator(expanded)]
"""A model's directory, or its name on the hub."""
