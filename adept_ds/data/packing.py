"""Tokens -> blocks of seq_len tokens.

concat     Documents follow one another and are cut where a block is full: no padding, at the price that documents are
           cut, and that what stands behind one in a block sees it.
documents  Blocks are filled with whole documents, each into the fullest block that has room (best fit, longest first);
           what is left of a block is padding. Only documents longer than a block are cut. Attention never crosses a
           document, and positions restart, so a document's losses are those that it would have alone.
"""

from __future__ import annotations

import bisect
import io
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from adept_ds.base.files import write_bytes
from adept_ds.data.tokens import TokenFile
from adept_ds.ranks.collectives import Ranks

_TOGETHER = 1 << 20
"""So many parts of documents are sorted and fitted at once: bounds memory, and costs next to no room in blocks."""


@dataclass(frozen=True)
class Packing:
    """How blocks are cut."""

    seq_len: int
    keep_tail: bool = False
    """Keep the last, partly filled block, if it predicts anything: for evaluation and probing, which use all text."""
    documents: bool = False
    """Whole documents (see above), of which there is no tail."""

    def room(self, bos_id: int | None) -> int:
        """Tokens of the text that a block holds; `bos_id`: its first token, if that is none of them."""
        return self.seq_len - (bos_id is not None)


class Layout(Protocol):
    """Which tokens of a flat file stand in which block."""

    restarts: bool
    """Whether each segment of a block is a text of its own."""

    def __len__(self) -> int: ...

    def segments(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranges of tokens of these blocks, in their order in each block.

        Returns:
            bounds [segments, 2] int64: first token of each, and the first after it; and of each the position of its
            block in `blocks`, ascending [segments].
        """
        ...


@dataclass(frozen=True)
class Concatenated:
    """Blocks cut out of the whole stream."""

    num_tokens: int
    block_tokens: int
    keep_tail: bool
    restarts = False

    def __len__(self) -> int:
        whole, rest = divmod(self.num_tokens, self.block_tokens)
        return whole + (self.keep_tail and rest > 1)

    def segments(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = blocks * self.block_tokens
        stops = np.minimum(starts + self.block_tokens, self.num_tokens)
        return np.stack([starts, stops], axis=1), np.arange(len(blocks))


@dataclass(frozen=True)
class WholeDocuments:
    """Blocks filled with documents."""

    parts: np.ndarray
    """[parts, 2] int64: first token of each part, and the first after it; sorted by block."""
    firsts: np.ndarray
    """[blocks + 1] int64: the first part of each block, and their number."""
    restarts = True

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def segments(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        firsts = self.firsts[blocks]
        numbers, within = ranges(self.firsts[blocks + 1] - firsts)
        return self.parts[firsts[numbers] + within], numbers

    @classmethod
    def of(cls, ends: np.ndarray, block_tokens: int) -> WholeDocuments:
        """Fit documents into blocks.

        Args:
            ends: [documents], the first token after each document.
        """
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        parts = cut_long(starts, np.asarray(ends), block_tokens)
        stretches = [parts[first : first + _TOGETHER] for first in range(0, len(parts), _TOGETHER)]
        filled = [block for stretch in stretches for block in _fit(stretch, block_tokens)]
        firsts = np.cumsum([0, *map(len, filled)], dtype=np.int64)
        return cls(np.concatenate(filled) if filled else parts, firsts)


def ranges(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges from 0 to each length, one behind the other: of each number the position of its range, and the number.

    [n] -> [sum], [sum]: 2, 0, 3 -> 0 0 2 2 2, 0 1 0 1 2
    """
    which = np.repeat(np.arange(len(lengths)), lengths)
    return which, np.arange(len(which)) - (np.cumsum(lengths) - lengths)[which]


def fit_documents(file: TokenFile, block_tokens: int) -> WholeDocuments:
    """Of a tokenised source, on rank 0; the result is kept beside the tokens."""
    try:
        return _load(file, block_tokens)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there, or damaged
        made, content = WholeDocuments.of(file.ends, block_tokens), io.BytesIO()
        np.savez(content, parts=made.parts, firsts=made.firsts)
        write_bytes(_kept_in(file, block_tokens), content.getvalue())
        return made


def whole_documents(file: TokenFile, block_tokens: int, ranks: Ranks) -> WholeDocuments:
    """Of a tokenised source, on every rank."""
    ranks.on_main(lambda: bool(fit_documents(file, block_tokens)))
    remedy = f"all hosts must see '{file.directory}': use a file system that they share"
    return ranks.on_each(lambda: _load(file, block_tokens), remedy)


def _load(file: TokenFile, block_tokens: int) -> WholeDocuments:
    with np.load(_kept_in(file, block_tokens)) as arrays:
        return WholeDocuments(arrays["parts"], arrays["firsts"])


def _kept_in(file: TokenFile, block_tokens: int) -> Path:
    return file.directory / f"documents_{block_tokens}.npz"


def cut_long(starts: np.ndarray, ends: np.ndarray, block_tokens: int) -> np.ndarray:
    """[parts, 2]: longer documents than a block in parts of a block; without single tokens, which predict nothing."""
    counts = -(-(ends - starts) // block_tokens)
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(starts, counts) + position * block_tokens
    parts = np.stack([first, np.minimum(first + block_tokens, np.repeat(ends, counts))], axis=1)
    kept: np.ndarray = parts[parts[:, 1] - parts[:, 0] > 1]
    return kept


def _fit(parts: np.ndarray, block_tokens: int) -> list[np.ndarray]:
    """Blocks, each the parts in it: best fit, longest first; ties in the order of the corpus."""
    lengths = parts[:, 1] - parts[:, 0]
    blocks: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> blocks that have it
    rooms: list[int] = []  # those that some block has, ascending
    for part in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[part])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            block, room = len(blocks), block_tokens
            blocks.append([])
        else:
            room = rooms[place]
            block = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        blocks[block].append(part)
        left = room - length
        if left > 1:  # less holds no part
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(block)
    return [parts[block] for block in blocks]
