"""Summed token losses of rows of any lengths, by all ranks together.

Rows are sorted by length, longest first, and fall into batches of about the same number of tokens, so that hardly any
computation is spent on padding. Batches are the same at any number of ranks, which take them in turn; where they do not
come out even, a rank makes a pass over nothing, since under ZeRO-3 every rank takes part in every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from adept_ds.base.progress import ProgressCallback, by_batch
from adept_ds.data.document_rows import Rows
from adept_ds.data.order import FILLER
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work


@dataclass(frozen=True)
class Evaluator:
    """A model that losses are asked of."""

    model: Callable[..., torch.Tensor]
    """`model(input_ids, labels, positions)` returns the summed loss of each row (see `head_loss`)."""
    device: torch.device | str
    ranks: Ranks
    batch_tokens: int
    """Of a batch, with padding; but a batch has one row at least."""

    def losses(
        self,
        rows: Rows,
        progress: ProgressCallback | None = None,
        prefix: FrozenPrefix | None = None,
        work: Work | None = None,
    ) -> np.ndarray:
        """[rows] float64, nats: the same on every rank.

        Args:
            prefix: of the model's layers that never change; for these very rows.
            work: where they are kept, pass by pass.
        """
        work = work or Work()
        batches = token_batches(rows.lengths, self.batch_tokens)
        found = work.tensor("losses", len(rows.lengths))
        passes = -(-len(batches) // self.ranks.world_size)
        with torch.no_grad():
            for number in work.steps(passes, by_batch(progress) if progress else None):
                place = number * self.ranks.world_size + self.ranks.rank
                batch = batches[place] if place < len(batches) else [FILLER]
                with prefix.at(number) if prefix else nullcontext():
                    losses = self.model(*rows.batch(batch).to(self.device))
                if place < len(batches):
                    found[batch] = losses.double().cpu()
        return self.ranks.sum(found).numpy()

    def largest_batch(self, rows: Rows) -> int:
        """Tokens of a batch of these rows, with padding, at most."""
        return max(self.batch_tokens, int(rows.lengths.max(initial=0)))


def token_batches(lengths: np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Rows in batches: longest first, ties in their order."""
    order = np.argsort(-lengths, kind="stable").tolist()
    batches, first = [], 0
    while first < len(order):
        count = max(1, batch_tokens // int(lengths[order[first]]))
        batches.append(order[first : first + count])
        first += count
    return batches
