"""Held-out documents, each in a row of its own: nothing that stands before a document changes its loss.

A document that is longer than a sequence is cut into parts of one, each a row of its own. The first token of a row is
not predicted, unless the row begins with one that is none of the text's (see `Family.bos_per`).

At most a budget of tokens is evaluated, counted with those that begin and end documents. Sources share it in proportion
to their tokens. A source is read from its beginning, in whole documents; a first one that alone is too long is cut, but
not below one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from adept_ds.data.blocks import Batch, Blocks, PackedTokens
from adept_ds.data.mixture import share_out
from adept_ds.data.order import FILLER
from adept_ds.data.packing import cut_long
from adept_ds.data.tokens import TokenFile


class Rows(Protocol):
    """What a model can be given in any order and in batches of any size."""

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64: tokens of each."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """These rows, as long as the longest of them; an index may be FILLER."""
        ...


@dataclass(frozen=True)
class _OwnRows:
    """A `packing.Layout` in which every part of a document is a block."""

    parts: np.ndarray
    """[rows, 2] int64: first token of each, and the first after it."""
    restarts = False

    def __len__(self) -> int:
        return len(self.parts)

    def segments(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.parts[blocks], np.arange(len(blocks))


@dataclass(frozen=True)
class DocumentRows:
    """The documents of a source that are evaluated."""

    ids: np.ndarray
    """[documents] int64: what each is known by (see `pieces.id_of`)."""
    blocks: Blocks
    lengths: np.ndarray
    """[rows] int64: tokens of each."""
    document_of: np.ndarray
    """[rows] int64: the document that each row is of."""

    @classmethod
    def of(cls, file: TokenFile, max_tokens: int, seq_len: int, bos_id: int | None) -> DocumentRows:
        """Args: bos_id: the first token of every row, if it is none of the text's."""
        extra = int(bos_id is not None)
        room = seq_len - extra
        count = int(np.searchsorted(file.ends, max_tokens, side="right"))
        ends = np.array(file.ends[: max(1, count)])
        if not count:
            ends = np.minimum(ends, max(max_tokens, room))
        starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
        parts = cut_long(starts, ends, room)
        blocks = Blocks((PackedTokens(file.tokens, _OwnRows(parts)),), seq_len, bos_id)
        lengths, document_of = parts[:, 1] - parts[:, 0] + extra, np.searchsorted(ends, parts[:, 0], side="right")
        return cls(np.array(file.ids[: len(ends)]), blocks, lengths, document_of)

    @property
    def tokens(self) -> np.ndarray:
        """[documents] int64: predicted tokens of each."""
        return self.by_document(self.lengths - 1).astype(np.int64)

    def by_document(self, values: np.ndarray) -> np.ndarray:
        """[documents] float64: sums of what rows have."""
        return np.bincount(self.document_of, weights=values, minlength=len(self.ids))


@dataclass(frozen=True)
class JoinedRows:
    """The rows of several sources behind one another, so that batches of like lengths can be formed of all."""

    parts: tuple[DocumentRows, ...]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] int64: tokens of each."""
        return np.concatenate([part.lengths for part in self.parts])

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks.joined([part.blocks for part in self.parts])

    def batch(self, indices: Sequence[int]) -> Batch:
        """As in `Rows`."""
        longest = max((int(self.lengths[index]) for index in indices if index != FILLER), default=2)
        return self._blocks.batch(indices).trimmed(longest)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """What rows have, part by part."""
        return np.split(values, np.cumsum([len(part.blocks) for part in self.parts])[:-1])


def token_shares(max_tokens: int, files: Sequence[TokenFile]) -> list[int]:
    """The budget of each source."""
    counts = [max(1, file.manifest.tokens) for file in files]
    return share_out(max_tokens, counts, counts)
