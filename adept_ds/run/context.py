"""What every stage of a run gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from rich.markup import escape

from adept_ds.base.digests import FileDigests, json_digest
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.base.version import __version__
from adept_ds.config.resolved import ResolvedConfig
from adept_ds.models.device import name_of_precision, resolve_precision
from adept_ds.models.liger import Liger, find_liger
from adept_ds.models.loading import check_architecture
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.corpora import Corpora
from adept_ds.run.identity import Identity
from adept_ds.run.ledger import Keep, Ledger, plain
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
    keep: Keep
    """For stages that are not of the ledger."""

    @classmethod
    def of(cls, settings: ResolvedConfig, ranks: Ranks, terminal: Terminal, stop: StopRequest) -> Context:
        if settings.deepspeed is not None:  # what is going to be loaded is whole, before texts are read
            for model in filter(None, (settings.model, settings.reference_model)):
                check_architecture(model)
        progress = StageProgress(terminal, stop, ranks)
        keep = partial(_keep, settings, ranks, terminal)
        digests = FileDigests(settings.run_dir.digests)

        def say(stage: str, line: str) -> None:
            terminal.stage(stage, escape(line))

        ledger = Ledger(settings.run_dir.ledger, ranks, keep, digests.file, say)
        identity = Identity(digests, progress)
        context = cls(settings, ranks, terminal, progress, Corpora(settings, progress), ledger, identity, keep)
        if settings.deepspeed is not None:
            _ = context.liger  # complains
        return context

    @cached_property
    def precision(self) -> torch.dtype:
        """Of all engines. Raises `InputError`: the device cannot compute in the precision that is asked for."""
        return resolve_precision(self.settings.config.train.precision)

    @property
    def precision_name(self) -> str:
        """Of what numbers are made in: `auto` is not the same on every device."""
        return name_of_precision(self.precision)

    @cached_property
    def liger(self) -> Liger | None:
        """Kernels of all engines, where they are not PyTorch's. Raises `InputError`: those that are asked for cannot be
        had."""
        return find_liger(self.settings.config.train.kernels, partial(self.terminal.stage, "kernels"))

    @property
    def run_dir(self) -> RunDirectory:
        return self.settings.run_dir

    @property
    def engines(self) -> EngineSettings:
        assert self.settings.deepspeed is not None
        return EngineSettings(self.settings.deepspeed, self.precision, self.ranks, self.liger)

    def unchanged(self, stage: str) -> None:
        """Say that a stage was not run again."""
        self.terminal.stage(stage, "[dim]unchanged, not run again[/]")


def _keep(settings: ResolvedConfig, ranks: Ranks, terminal: Terminal, stage: str, made_of: Any) -> Unfinished:
    """Numbers differ in their last bits where they are computed in another way: what was done so is no part of them."""
    config = settings.config
    how = {
        "ranks": ranks.world_size,
        "deepspeed": settings.deepspeed,
        "batches": [config.probe.micro_batch_size, config.probe.max_stack_tokens, config.train.micro_batch_size],
        "precision": name_of_precision(resolve_precision(config.train.precision)),
        "kernels": [config.train.kernels, config.train.compile],
        "versions": [__version__, torch.__version__],
    }
    digest = json_digest(plain([made_of, how]))

    def say(text: str) -> None:
        terminal.stage(stage.partition("_")[0], escape(text))

    return Unfinished(settings.run_dir.unfinished / stage, digest, ranks, say)
