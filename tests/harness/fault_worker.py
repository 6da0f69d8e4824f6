"""`adept ARGUMENTS` as one rank runs it, with a fault that comes at a counted event of that rank.

Usage: python -m harness.fault_worker FAULT COUNTS ARGUMENTS...  FAULT is JSON (see `Planted`); how many events of each
kind there were is left in COUNTS, a JSON file, where the process lives to its end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

EVENTS = ("words", "layers", "files")
"""Ranks speak with each other; a decoder layer begins its forward pass; a file or directory of the run is opened to be
written, made, renamed or removed."""

_FILE_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Planted:
    """A fault of one rank."""

    what: str
    """kill, stop, hang, term, usr1, full, nan, inf, or nothing."""
    rank: int = 0
    event: str = ""
    at: int = 0
    """Number of the event, from 1; of nan and inf that of the step."""
    root: str = ""
    """Of the run."""
    ballast: str = ""
    """What fills the disk."""


class Injector:
    """Counts events, and brings about the fault."""

    def __init__(self, fault: Planted, rank: int) -> None:
        self._fault, self._is_mine, self.counts = fault, fault.rank == rank, Counter[str]()
        self._lock = threading.RLock()
        self._busy = False

    def seen(self, event: str) -> None:
        with self._lock:
            if self._busy or (event == "files" and not self.counts["words"]):
                return  # what the fault itself writes, or a rank for which nobody waits but a launcher
            self.counts[event] += 1
            if not self._is_mine or (event, self.counts[event]) != (self._fault.event, self._fault.at):
                return
            self._busy = True
        self._bring_about()
        self._busy = False

    def _bring_about(self) -> None:
        what = self._fault.what
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "hang":
            time.sleep(3600)
        elif what in ("term", "usr1"):
            os.kill(os.getpid(), signal.SIGTERM if what == "term" else signal.SIGUSR1)
        elif what == "full":
            fill(Path(self._fault.ballast))


def fill(ballast: Path) -> None:
    """Leave no byte on its disk."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def watch_words(injector: Injector) -> None:
    from adept_ds.ranks.collectives import Ranks

    for name in ("sum", "slice_of_sum", "max", "all_equal", "gather", "barrier", "on_main", "on_each"):
        method = getattr(Ranks, name)

        @wraps(method)
        def spoken(*arguments: Any, _method: Any = method, **options: Any) -> Any:
            injector.seen("words")
            return _method(*arguments, **options)

        setattr(Ranks, name, spoken)


def watch_layers(injector: Injector) -> None:
    import torch

    def begin(module: torch.nn.Module, _: Any) -> None:
        if type(module).__name__.endswith("DecoderLayer"):
            injector.seen("layers")

    torch.nn.modules.module.register_module_forward_pre_hook(begin)


def watch_files(injector: Injector, root: str) -> None:
    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in _FILE_EVENTS:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
            injector.seen("files")

    sys.addaudithook(look)


def plant_loss(fault: Planted) -> None:
    """The loss of one step is no number on this rank."""
    from adept_ds.training import trainer

    whole_step, whole_gradient, now = trainer.Trainer._train_step, trainer.accumulate_gradient, [0]

    def stepped(training: Any, step: int) -> Any:
        now[0] = step + 1
        return whole_step(training, step)

    def planted(*arguments: Any) -> Any:
        losses = whole_gradient(*arguments)
        if now[0] == fault.at:
            losses[0] = math.nan if fault.what == "nan" else math.inf
        return losses

    mock.patch.object(trainer.Trainer, "_train_step", stepped).start()
    mock.patch.object(trainer, "accumulate_gradient", planted).start()


def main() -> None:
    fault, counts, rank = Planted(**json.loads(sys.argv[1])), Path(sys.argv[2]), int(os.environ.get("RANK", "0"))
    del sys.argv[1:3]
    injector = Injector(fault, rank)
    watch_words(injector)
    watch_layers(injector)
    watch_files(injector, fault.root)
    if fault.what in ("nan", "inf") and fault.rank == rank:
        plant_loss(fault)

    from adept_ds.cli.app import main as adept

    try:
        adept()
    finally:
        counts.with_suffix(f".{rank}").write_text(json.dumps(injector.counts))


if __name__ == "__main__":
    main()
