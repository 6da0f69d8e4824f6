"""Blocks of tokens, and the tensors that a model is given of them.

A block is what packing cut; a sequence is a block that counts in a batch or a sample; a row is its place in a tensor.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from adept_ds.data.order import FILLER
from adept_ds.data.packing import Concatenated, Layout, Packing, whole_documents
from adept_ds.data.tokens import TokenFile
from adept_ds.models.head_loss import IGNORED_LABEL
from adept_ds.ranks.collectives import Ranks


class Batch(NamedTuple):
    """What a model's `forward` takes: `model(*batch)`."""

    input_ids: torch.Tensor
    """[rows, tokens] int64"""
    labels: torch.Tensor
    """[rows, tokens] int64; padding, fillers and what no token of its own document predicts carry the ignored label."""
    positions: torch.Tensor | None
    """[rows, tokens] int64, where a row holds several texts: each starts at 0. None: a row is one text."""

    def to(self, device: torch.device | str) -> Batch:
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.input_ids.to(device), self.labels.to(device), positions)

    def trimmed(self, num_tokens: int) -> Batch:
        """The first tokens of every row."""
        positions = None if self.positions is None else self.positions[:, :num_tokens]
        return Batch(self.input_ids[:, :num_tokens], self.labels[:, :num_tokens], positions)

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of all, in order."""
        positions = [batch.positions for batch in batches if batch.positions is not None]
        return cls(
            torch.cat([batch.input_ids for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            torch.cat(positions) if positions else None,
        )


@dataclass(frozen=True)
class PackedTokens:
    """Blocks of one tokenised source."""

    tokens: np.ndarray
    """[tokens] int32, memory-mapped."""
    layout: Layout


@dataclass(frozen=True)
class Blocks:
    """Blocks of one source, or of several behind one another."""

    sources: tuple[PackedTokens, ...]
    """Packed alike."""
    seq_len: int
    bos_id: int | None = None
    """The first token of every block; it is not among the tokens of the source."""

    def __len__(self) -> int:
        return self._starts[-1]

    @classmethod
    def of(cls, file: TokenFile, packing: Packing, bos_id: int | None, ranks: Ranks) -> Blocks:
        """Pack a tokenised source; every rank has to ask for it."""
        room = packing.room(bos_id)
        layout: Layout = Concatenated(file.manifest.tokens, room, packing.keep_tail)
        if packing.documents:
            layout = whole_documents(file, room, ranks)
        return cls((PackedTokens(file.tokens, layout),), packing.seq_len, bos_id)

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> Blocks:
        """A block of each row, whose first token is predicted from nothing. [blocks, seq_len] int32"""
        seq_len = rows.shape[1]
        return cls((PackedTokens(rows.reshape(-1), Concatenated(rows.size, seq_len, keep_tail=False)),), seq_len)

    @classmethod
    def joined(cls, parts: Sequence[Blocks]) -> Blocks:
        """Those of all, in order; nothing is copied."""
        return cls(tuple(source for part in parts for source in part.sources), parts[0].seq_len, parts[0].bos_id)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The blocks of these indices, one a row; an index may be FILLER."""
        input_ids = np.zeros((len(indices), self.seq_len), np.int64)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        positions = np.zeros_like(input_ids) if self._restarts else None
        for row, index in enumerate(indices):
            at = 0
            for tokens in self.texts(index):
                place = slice(at, at + len(tokens))
                input_ids[row, place] = labels[row, place] = tokens
                if positions is not None:
                    positions[row, place] = np.arange(len(tokens))
                    labels[row, at] = IGNORED_LABEL  # what stands before it is another text
                at += len(tokens)
        restarting = None if positions is None else torch.from_numpy(positions)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), restarting)

    def texts(self, index: int) -> Iterator[np.ndarray]:
        """The tokens of each text of a block; of a filler none."""
        if index == FILLER:
            return
        source, block = self._find(index)
        for start, stop in source.layout.segments(block):
            tokens = source.tokens[start:stop]
            yield tokens if self.bos_id is None else np.concatenate([[self.bos_id], tokens])

    def num_tokens(self, indices: Sequence[int]) -> int:
        """Of these blocks, without padding."""
        return sum(sum(lengths) for lengths in self._lengths(indices))

    def predicted_tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of these blocks are predicted: the first of each text is not."""
        return sum(sum(lengths) - len(lengths) for lengths in self._lengths(indices))

    def _lengths(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Of each block, the lengths of its texts."""
        extra = int(self.bos_id is not None)
        for index in indices:
            if index != FILLER:
                source, block = self._find(index)
                yield [stop - start + extra for start, stop in source.layout.segments(block)]

    def _find(self, index: int) -> tuple[PackedTokens, int]:
        number = bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]

    @cached_property
    def _starts(self) -> list[int]:
        """Of each source its first block, and the number of all."""
        return list(itertools.accumulate((len(source.layout) for source in self.sources), initial=0))

    @property
    def _restarts(self) -> bool:
        return self.sources[0].layout.restarts
