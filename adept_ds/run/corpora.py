"""The texts of a run, packed when they are first asked for and kept beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.resolved import ResolvedConfig
from adept_ds.config.schema import CorpusSource, corpus_sources
from adept_ds.data.blocks import Blocks, TrainingData
from adept_ds.data.mixture import Mixture
from adept_ds.data.packing import Packing, build_blocks
from adept_ds.run.progress import StageProgress
from adept_ds.training.evaluation import EvalSet


@dataclass(frozen=True)
class Corpora:
    """Every rank asks for the same ones, in the same order: rank 0 packs, the others wait."""

    settings: ResolvedConfig
    progress: StageProgress

    @cached_property
    def domain(self) -> Blocks:
        config = self.settings.config
        return self._for_training("data.domain", config.data.domain, config.train.global_batch_size - config.replayed)

    @cached_property
    def replay(self) -> Blocks | None:
        config = self.settings.config
        files = config.data.replay
        return self._for_training("data.replay", files, config.replayed) if files else None

    @property
    def training_data(self) -> TrainingData:
        return TrainingData(self.domain, self.replay, self.settings.config.replayed)

    @cached_property
    def general(self) -> Mixture:
        """General competence, as the probe sees it."""
        return self.mixture("probe.corpus", self.settings.config.probe.corpus)

    @property
    def for_importance(self) -> Mixture:
        """General text that importances are estimated on in passes of their own."""
        online = self.settings.config.importance.source == "online"
        return Mixture.of([self.replay]) if online and self.replay else self.general

    @cached_property
    def held_out(self) -> list[EvalSet]:
        data = self.settings.config.data
        corpora = {"general": data.general_eval, "domain": data.domain_eval}
        return [
            EvalSet(name, self._blocks(f"data.{name}_eval", files, data.seq_len, keep_tail=True), data.eval_sequences)
            for name, files in corpora.items()
            if files
        ]

    def mixture(self, key: str, entries: Sequence[Path | CorpusSource]) -> Mixture:
        """A corpus of weighted sources, in blocks for probing."""
        sources, seq_len = corpus_sources(entries), self.settings.config.probe.seq_len
        parts = [self._blocks(key, source.files, seq_len, keep_tail=True) for source in sources]
        return Mixture.of(parts, [source.weight for source in sources], [source.title for source in sources])

    def _for_training(self, key: str, files: Sequence[Path], needed: int) -> Blocks:
        config = self.settings.config
        blocks = self._blocks(key, files, config.data.seq_len, keep_tail=False)
        if len(blocks) < needed:
            raise InputError(
                f"{key}: {len(blocks)} blocks of {config.data.seq_len} tokens cannot feed batches of "
                f"train.global_batch_size {config.train.global_batch_size}, {needed} of them from here; "
                "add text, or lower train.global_batch_size or data.seq_len"
            )
        return blocks

    def _blocks(self, key: str, files: Sequence[Path], seq_len: int, *, keep_tail: bool) -> Blocks:
        settings = self.settings
        packing = Packing(
            key, tuple(files), settings.model.path, seq_len, keep_tail, settings.config.data.question_template
        )
        with self.progress.on_main(f"packing {key}") as bar:
            return build_blocks(packing, settings.run_dir.blocks, self.progress.ranks, bar)
