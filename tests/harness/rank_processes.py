"""Ranks for tests: real processes, forked from one that has imported the libraries already.

Importing torch, DeepSpeed and transformers takes 8 s of CPU, and the tests start many ranks. A forked process has
nothing else in common with its siblings: environment, arguments, output and exit code are its own. What a command
imports by itself is seen where tests start one with `subprocess` or a launcher. Figures of reports are left blank, but
where `harness.undrawn.DRAWN` is set.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from harness.undrawn import DRAWN, undrawn

_IMPORTED = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # when the first engine is built; brings torch's compiler: 1 s
    "datasets",
    "transformers.models.llama.modeling_llama",
    "torch.utils.tensorboard",
    "adept_ds.cli.app",
    "adept_ds.run.pipeline",
    "adept_ds.report.page",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


class RankProcess:
    """As `subprocess.Popen` of `python ARGUMENTS`, with its output in files."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        self._process = _CONTEXT.Process(
            target=_run, args=(list(arguments), dict(environment), str(directory), list(map(str, self._files)))
        )
        before = dict(os.environ)
        os.environ.update(environment)  # what is read at import
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0, *self._output())
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, err = self._output()
        return out, err

    def said(self) -> str:
        """On stderr, so far."""
        return self._output()[1]

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def _output(self) -> list[str]:
        return [file.read_text(encoding="utf-8", errors="replace") for file in self._files]


def _run(arguments: list[str], environment: dict[str, str], directory: str, files: list[str]) -> None:
    """In the forked process: become `python ARGUMENTS`."""
    gc.freeze()  # or every collection, two for each engine, walks all that was imported: 0.3 s
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    kind, *rest = arguments
    with nullcontext() if DRAWN in environment else undrawn():
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            raise ValueError(f"ranks start with -m or -c, not {kind!r}")
