"""`adept ARGUMENTS` without a process of its own: thousands of command lines in a minute."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest import mock

from adept_ds.cli.app import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def run_here(arguments: Sequence[str], directory: Path, **env: str) -> Ended:
    """In `directory`, with what it says on both streams; the process is as before afterwards."""
    code: int | str | None = 0
    with ExitStack() as stack:
        out, err = (stack.enter_context(_diverted(*stream)) for stream in ((1, "stdout"), (2, "stderr")))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(mock.patch.object(sys, "argv", ["adept", *arguments]))
        stack.enter_context(mock.patch.object(os, "_exit", _leave))
        stack.enter_context(mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"} | env))
        stack.callback(logging.captureWarnings, False)
        stack.callback(os.chdir, Path.cwd())
        os.chdir(directory)
        try:
            main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        return Ended(code if isinstance(code, int) else int(code is not None), _text(out), _text(err))


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)


@contextmanager
def _diverted(descriptor: int, name: str) -> Iterator[int]:
    """A stream of the process, and what libraries write below Python, into memory."""
    saved, memory = os.dup(descriptor), os.memfd_create(name)
    os.dup2(memory, descriptor)
    stream = open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        with mock.patch.object(sys, name, stream):
            yield memory
    finally:
        stream.flush()
        os.dup2(saved, descriptor)
        os.close(saved)
        os.close(memory)


def _text(memory: int) -> str:
    return os.pread(memory, os.fstat(memory).st_size, 0).decode("utf-8", "surrogateescape")
