"""What training draws from: domain text, and in every batch as many sequences of general text as are replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adept_ds.config.train_sections import TrainSection
from adept_ds.data.blocks import Batch


class TrainingCorpus(Protocol):
    """A `Mixture`, or a `StreamedCorpus`."""

    def drawn(self, first: int, count: int, seed: int) -> list[int]:
        """Sequences `first` to `first + count` of the order in which training goes through the corpus.

        A pure function of its arguments; every rank has to ask for the same ones.
        """
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """One row for each of the sequences, which were drawn last."""
        ...

    def num_tokens(self, indices: Sequence[int]) -> int:
        """Without padding."""
        ...

    def predicted_tokens(self, indices: Sequence[int]) -> int: ...


@dataclass(frozen=True)
class BatchEntry:
    """One sequence of a training batch."""

    index: int
    replayed: bool
    """From the general corpus, not from the domain's."""


@dataclass(frozen=True)
class TrainingData:
    """Both corpora.

    Which sequences a global batch consists of depends on neither the number of ranks nor the micro-batch.
    """

    domain: TrainingCorpus
    replay: TrainingCorpus | None = None
    replayed: int = 0

    def global_batch(self, step: int, train: TrainSection) -> list[BatchEntry]:
        """The sequences of optimizer step `step` (from 0); replayed ones come first."""
        entries = list[BatchEntry]()
        if self.replay is not None:
            drawn = self.replay.drawn(step * self.replayed, self.replayed, train.seed)
            entries += [BatchEntry(index, replayed=True) for index in drawn]
        size = train.global_batch_size - len(entries)
        drawn = self.domain.drawn(step * size, size, train.seed)
        return entries + [BatchEntry(index, replayed=False) for index in drawn]

    def batch(self, entries: Sequence[BatchEntry]) -> Batch:
        """One row for each entry."""
        return Batch.joined([self._corpus(entry.replayed).batch([entry.index]) for entry in entries])

    def num_tokens(self, entries: Sequence[BatchEntry]) -> int:
        """Without padding."""
        return sum(self._corpus(entry.replayed).num_tokens([entry.index]) for entry in entries)

    def predicted_tokens(self, entries: Sequence[BatchEntry]) -> int:
        return sum(self._corpus(entry.replayed).predicted_tokens([entry.index]) for entry in entries)

    def _corpus(self, replayed: bool) -> TrainingCorpus:
        return self.replay if replayed and self.replay is not None else self.domain


def micro_batches(
    entries: Sequence[BatchEntry], train: TrainSection, rank: int, world_size: int
) -> list[list[BatchEntry]]:
    """This rank's share of a global batch; replayed sequences come first."""
    mine, micro = entries[rank::world_size], train.micro_batch_size
    return [list(mine[start : start + micro]) for start in range(0, len(mine), micro)]
