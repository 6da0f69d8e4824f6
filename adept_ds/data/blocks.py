"""Packed blocks of tokens, and the batches that training draws from them.

A block is what packing cut; a sequence is a block that counts in a batch or a sample; a row is its place in a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset

from adept_ds.config.schema import TrainSection
from adept_ds.data.order import FILLER, global_batch
from adept_ds.models.head_loss import IGNORED_LABEL


@dataclass(frozen=True)
class Blocks:
    """Packed blocks of one corpus."""

    dataset: Dataset
    seq_len: int

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, both [len(indices), seq_len] int64; padding and fillers carry ignored labels."""
        input_ids = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for row, index in enumerate(indices):
            if index != FILLER:
                tokens = torch.tensor(self.dataset[index]["input_ids"], dtype=torch.int64)
                input_ids[row, : len(tokens)] = tokens
                labels[row, : len(tokens)] = tokens
        return input_ids, labels

    def predicted_tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of these blocks are predicted (each block's first one is not)."""
        return sum(len(self.dataset[index]["input_ids"]) - 1 for index in indices if index != FILLER)


@dataclass(frozen=True)
class BatchEntry:
    """One sequence of a training batch."""

    index: int
    replayed: bool
    """From the general corpus, not from the domain's."""


@dataclass(frozen=True)
class TrainingData:
    """What is trained on: domain text, and in every batch as many sequences of general text as are replayed."""

    domain: Blocks
    replay: Blocks | None = None
    replayed: int = 0

    def micro_batches(self, step: int, train: TrainSection, rank: int, world_size: int) -> list[list[BatchEntry]]:
        """This rank's share of the global batch of optimizer step `step` (from 0); replayed sequences come first.

        Which sequences a global batch consists of depends on neither the number of ranks nor the micro-batch.
        """
        size, entries = train.global_batch_size, list[BatchEntry]()
        if self.replay is not None:
            chosen = global_batch(step, self.replayed, len(self.replay), train.seed)
            entries += [BatchEntry(index, replayed=True) for index in chosen]
        chosen = global_batch(step, size - len(entries), len(self.domain), train.seed)
        entries += [BatchEntry(index, replayed=False) for index in chosen]
        mine, micro = entries[rank::world_size], train.micro_batch_size
        return [mine[start : start + micro] for start in range(0, len(mine), micro)]

    def batch(self, entries: Sequence[BatchEntry]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, both [len(entries), seq_len] int64."""
        pairs = [self._blocks(entry).batch([entry.index]) for entry in entries]
        return torch.cat([ids for ids, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def _blocks(self, entry: BatchEntry) -> Blocks:
        return self.replay if entry.replayed and self.replay is not None else self.domain
