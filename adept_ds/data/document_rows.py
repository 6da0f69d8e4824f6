"""Held-out documents, each in a row of its own: nothing that stands before a document changes its loss.

A document that is longer than a sequence is cut into parts of one, each a row of its own; the first token of a row is
not predicted, unless the row begins with a token that is none of the text's (see `Family.bos_per`).

At most a budget of tokens is evaluated, counted with the tokens that begin and end documents: a source is read from its
beginning, and of what does not fit whole, nothing is; only of a first document that alone is too long, the first part
that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adept_ds.data.blocks import Batch, Blocks, PackedTokens
from adept_ds.data.mixture import share_out
from adept_ds.data.packing import cut_long
from adept_ds.data.tokens import TokenFile


class OwnRows(NamedTuple):
    """A `packing.Layout` in which every part of a document is a block."""

    parts: np.ndarray
    """[rows, 2] int64: first token of each, and the first after it."""
    restarts: bool = False

    def __len__(self) -> int:
        return len(self.parts)

    def segments(self, block: int) -> list[tuple[int, int]]:
        start, stop = self.parts[block]
        return [(int(start), int(stop))]
