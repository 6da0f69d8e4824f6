"""Progress of a stage, which is also where it ends when it is asked to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from adept_ds.base.progress import ProgressCallback
from adept_ds.base.terminal import Terminal
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest


@dataclass(frozen=True)
class StageProgress:
    """Bars for stages that can be stopped between their steps (see `StopRequest.checked`)."""

    terminal: Terminal
    stop: StopRequest
    ranks: Ranks

    @contextmanager
    def together(self, doing: str) -> Iterator[ProgressCallback]:
        """Every rank reports; all end at the same step."""
        with self.terminal.progress(doing, together=True) as bar:
            yield self.stop.checked(doing, bar, self.ranks)

    @contextmanager
    def on_main(self, doing: str) -> Iterator[ProgressCallback]:
        """Rank 0 works alone."""
        with self.terminal.progress(doing) as bar:
            yield self.stop.checked(doing, bar, None)
