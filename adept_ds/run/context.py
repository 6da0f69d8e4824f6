"""What every stage of a run gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from rich.markup import escape

from adept_ds.base.digests import FileDigests
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.config.resolved import ResolvedConfig
from adept_ds.models.device import resolve_precision
from adept_ds.models.loading import check_architecture
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.corpora import Corpora
from adept_ds.run.identity import Identity
from adept_ds.run.ledger import Ledger
from adept_ds.run.progress import StageProgress
from adept_ds.zero.build import EngineSettings


@dataclass(frozen=True)
class Context:
    """A resolved configuration, and the ranks, texts and records of the run that follows it."""

    settings: ResolvedConfig
    ranks: Ranks
    terminal: Terminal
    progress: StageProgress
    corpora: Corpora
    ledger: Ledger
    identity: Identity

    @classmethod
    def of(cls, settings: ResolvedConfig, ranks: Ranks, terminal: Terminal, stop: StopRequest) -> Context:
        if settings.deepspeed is not None:  # what is going to be loaded is whole, before texts are read
            for model in filter(None, (settings.model, settings.reference_model)):
                check_architecture(model)
        progress = StageProgress(terminal, stop, ranks)
        digests = FileDigests(settings.run_dir.digests)
        ledger = Ledger(
            settings.run_dir.ledger, ranks, digests.file, lambda stage, line: terminal.stage(stage, escape(line))
        )
        identity = Identity(digests, progress)
        return cls(settings, ranks, terminal, progress, Corpora(settings, progress), ledger, identity)

    @cached_property
    def precision(self) -> torch.dtype:
        """Of all engines. Raises `InputError`: the device cannot compute in the precision that is asked for."""
        return resolve_precision(self.settings.config.train.precision)

    @property
    def run_dir(self) -> RunDirectory:
        return self.settings.run_dir

    @property
    def engines(self) -> EngineSettings:
        assert self.settings.deepspeed is not None
        return EngineSettings(self.settings.deepspeed, self.precision, self.ranks)

    def unchanged(self, stage: str) -> None:
        """Say that a stage was not run again."""
        self.terminal.stage(stage, "[dim]unchanged, not run again[/]")
