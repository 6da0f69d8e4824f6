"""What training draws from: domain text, and in every batch as many sequences of general text as are replayed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adept_ds.config.train_sections import TrainSection
from adept_ds.data.blocks import Batch
from adept_ds.ranks.collectives import Ranks


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
        """One row for each entry, of which replayed ones come first."""
        return Batch.joined([corpus.batch(indices) for corpus, indices in self._by_corpus(entries)])

    def num_tokens(self, entries: Sequence[BatchEntry]) -> int:
        """Without padding."""
        return sum(corpus.num_tokens(indices) for corpus, indices in self._by_corpus(entries))

    def predicted_tokens(self, entries: Sequence[BatchEntry]) -> int:
        return sum(corpus.predicted_tokens(indices) for corpus, indices in self._by_corpus(entries))

    def _by_corpus(self, entries: Sequence[BatchEntry]) -> Iterator[tuple[TrainingCorpus, list[int]]]:
        """Those that some are of; what is replayed first."""
        for corpus, replayed in ((self.replay, True), (self.domain, False)):
            indices = [entry.index for entry in entries if entry.replayed == replayed]
            if corpus is not None and indices:
                yield corpus, indices


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of a global batch, and what there is to know of the whole of it."""

    rows: Batch
    """Of all micro-batches, behind one another; replayed ones first."""
    sizes: tuple[int, ...]
    """Rows of each micro-batch."""
    packed: tuple[bool, ...]
    """Of each micro-batch, whether a row of it holds more than one text, or padding."""
    replayed_rows: int
    """Of `rows`."""
    replayed_batches: int
    """Micro-batches that end in a replayed row."""
    sequences: int
    """Of the global batch, like what follows."""
    tokens: int
    """Without padding."""
    predicted: int
    replay_predicted: int
    """Of the replayed sequences."""

    def micro_batches(self, device: torch.device) -> list[Batch]:
        """On the device: views of one copy of all rows. Where no row is packed, positions need not be said."""
        moved, ends = self.rows.to(device), list(itertools.accumulate(self.sizes))
        batches = [moved.rows(last - size, last) for size, last in zip(self.sizes, ends, strict=True)]
        return [
            batch if packed else batch._replace(positions=None)
            for batch, packed in zip(batches, self.packed, strict=True)
        ]


def step_batch(data: TrainingData, step: int, train: TrainSection, ranks: Ranks) -> StepBatch:
    """This rank's share of the batch of optimizer step `step` (from 0); every rank has to ask for its own."""
    return share_of(data.global_batch(step, train), data, train, ranks)


def share_of(entries: Sequence[BatchEntry], data: TrainingData, train: TrainSection, ranks: Ranks) -> StepBatch:
    """The same of a global batch that was drawn already; speaks with no other rank."""
    batches = micro_batches(entries, train, ranks.rank, ranks.world_size)
    mine, replayed = list(itertools.chain(*batches)), [entry for entry in entries if entry.replayed]
    rows, sizes = data.batch(mine), tuple(map(len, batches))
    restarts = torch.zeros(len(mine), dtype=torch.bool)
    if rows.positions is not None:
        restarts = (rows.positions.diff(dim=1) != 1).any(1)
    return StepBatch(
        rows,
        sizes,
        tuple(bool(of_batch.any()) for of_batch in restarts.split(sizes)),
        sum(entry.replayed for entry in mine),
        sum(batch[-1].replayed for batch in batches),
        len(entries),
        data.num_tokens(entries),
        data.predicted_tokens(entries),
        data.predicted_tokens(replayed),
    )


def micro_batches(
    entries: Sequence[BatchEntry], train: TrainSection, rank: int, world_size: int
) -> list[list[BatchEntry]]:
    """This rank's share of a global batch; replayed sequences come first."""
    mine, micro = entries[rank::world_size], train.micro_batch_size
    return [list(mine[start : start + micro]) for start in range(0, len(mine), micro)]
