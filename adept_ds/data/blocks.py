"""Blocks of tokens, and the tensors that a model is given of them.

A block is what packing cut; a sequence is a block that counts in a batch or a sample; a row is its place in a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch

from adept_ds.data.order import FILLER
from adept_ds.data.packing import Concatenated, Layout, Packing, ranges, whole_documents
from adept_ds.data.tokens import TokenFile
from adept_ds.models.device import pinned
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
        """Copied to the device; from pinned memory without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self, device: torch.device) -> Batch:
        """Copied to where the device fetches it by itself."""
        return self._each(partial(pinned, device=device))

    def trimmed(self, num_tokens: int) -> Batch:
        """The first tokens of every row."""
        return self._each(lambda tensor: tensor[:, :num_tokens])

    def rows(self, first: int, last: int) -> Batch:
        """Views of these rows."""
        return self._each(lambda tensor: tensor[first:last])

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of all, in order."""
        if len(batches) == 1:
            return batches[0]
        positions = [batch.positions for batch in batches if batch.positions is not None]
        return cls(
            torch.cat([batch.input_ids for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            torch.cat(positions) if positions else None,
        )

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        positions = None if self.positions is None else change(self.positions)
        return Batch(change(self.input_ids), change(self.labels), positions)


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
        return int(self._starts[-1])

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
        """The blocks of these indices, one a row, by one gather from each source; an index may be FILLER."""
        input_ids = np.zeros((len(indices), self.seq_len), np.int64)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        positions = np.zeros_like(input_ids) if self._restarts else None
        flat_ids, flat_labels, extra = input_ids.reshape(-1), labels.reshape(-1), self._extra
        for source, rows, bounds, numbers in self._segments(indices):
            widths = bounds[:, 1] - bounds[:, 0] + extra
            starts = np.cumsum(widths) - widths  # of each text, in its row
            starts += (rows * self.seq_len - starts[np.searchsorted(numbers, np.arange(len(rows)))])[numbers]
            which, within = ranges(widths - extra)
            place = starts[which] + extra + within
            flat_ids[place] = flat_labels[place] = source.tokens[bounds[which, 0] + within]
            if self.bos_id is not None:
                flat_ids[starts] = flat_labels[starts] = self.bos_id
            if positions is not None:
                positions.reshape(-1)[place] = extra + within
                flat_labels[starts] = IGNORED_LABEL  # what stands before it is another text
        restarting = None if positions is None else torch.from_numpy(positions)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), restarting)

    def texts(self, index: int) -> Iterator[np.ndarray]:
        """The tokens of each text of a block; of a filler none."""
        if index == FILLER:
            return
        for source, _, bounds, _ in self._segments([index]):
            for start, stop in bounds.tolist():
                tokens = source.tokens[start:stop]
                yield tokens if self.bos_id is None else np.concatenate([[self.bos_id], tokens])

    def num_tokens(self, indices: Sequence[int]) -> int:
        """Of these blocks, without padding."""
        return sum(int(widths.sum()) for widths in self._widths(indices))

    def predicted_tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of these blocks are predicted: the first of each text is not."""
        return sum(int((widths - 1).sum()) for widths in self._widths(indices))

    def _widths(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """How long the texts of these blocks are, by source."""
        return (bounds[:, 1] - bounds[:, 0] + self._extra for _, _, bounds, _ in self._segments(indices))

    def _segments(self, indices: Sequence[int]) -> Iterator[tuple[PackedTokens, np.ndarray, np.ndarray, np.ndarray]]:
        """By source that some of these blocks are of: the rows that they come to, and their texts (`Layout.segments`).

        Fillers have none.
        """
        blocks = np.asarray(indices, np.int64)
        of_source = np.searchsorted(self._starts, blocks, side="right") - 1  # -1: a filler
        for number in range(len(self.sources)):
            (rows,) = np.nonzero(of_source == number)
            if len(rows):
                source = self.sources[number]
                yield source, rows, *source.layout.segments(blocks[rows] - self._starts[number])

    @property
    def _extra(self) -> int:
        """Tokens of each text that its source has not."""
        return int(self.bos_id is not None)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Of each source its first block, and the number of all."""
        return np.cumsum([0, *(len(source.layout) for source in self.sources)])

    @property
    def _restarts(self) -> bool:
        return self.sources[0].layout.restarts
