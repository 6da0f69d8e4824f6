"""Passes over a sample: every rank its share, every rank the whole table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.base.progress import ProgressCallback
from adept_ds.data.blocks import Batch
from adept_ds.data.mixture import Sample
from adept_ds.data.order import FILLER, rank_batches
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work


class PassProgress:
    """A bar for passes over batches of sequences.

    Args:
        check: moves the bar; called between batches by every rank, it may communicate and end the work.
        move: moves the bar only; for within a batch.
        variants: that pass each layer; by default one more than pass the layer below.
    """

    def __init__(
        self,
        num_layers: int,
        check: ProgressCallback,
        move: ProgressCallback,
        variants: Sequence[int] | None = None,
    ) -> None:
        self._num_layers, self._check, self._move = num_layers, check, move
        self._variants = range(1, num_layers + 1) if variants is None else variants
        self._number, self._count = 0, 1

    def batch(self, number: int, count: int) -> None:
        """Batch `number` of `count` begins."""
        self._number, self._count = number, count
        self._check(number / count, f"batch {number + 1} of {count}")

    def layer(self, position: int) -> None:
        """The stack of a sweep has passed a layer."""
        share = sum(self._variants[: position + 1]) / sum(self._variants)
        self._move(
            (self._number + share) / self._count,
            f"batch {self._number + 1} of {self._count}, layer {position + 1} of {self._num_layers}",
        )


def check_losses(losses: torch.Tensor, ranks: Ranks) -> None:
    """Raises `NonFiniteLossError`, on every rank, if the losses of any rank are not all finite."""
    if ranks.max(float(not losses.isfinite().all()))[0]:
        raise NonFiniteLossError("probe: the model's loss on the first sequences is NaN or infinite")


def table_by_sequence(
    forward: Callable[[Batch], torch.Tensor],
    sample: Sample,
    width: int,
    ranks: Ranks,
    *,
    micro_batch_size: int,
    device: torch.device | str,
    progress: PassProgress | None = None,
    work: Work | None = None,
) -> torch.Tensor:
    """What `forward(batch)` says about each row, [rows, width], for every sequence of the sample.

    Every rank takes its share of the sequences and gets the whole table, [sequences, width] float64. Each entry comes
    from one rank, so sums over the table do not depend on who computed what.

    Args:
        work: where it is kept, batch by batch.

    Raises:
        NonFiniteLossError: the first column of the first batch, the model's own loss, is no number.
    """
    work = work or Work()
    batches = rank_batches(range(len(sample)), ranks.rank, ranks.world_size, micro_batch_size)
    found = work.tensor("rows", len(batches), micro_batch_size, width)
    for number in work.steps(len(batches), progress.batch if progress else None):
        rows = forward(sample.batch(batches[number]).to(device)).double().cpu()
        if number == 0:
            check_losses(rows[:, 0], ranks)
        found[number] = rows
    table = torch.zeros(len(sample), width, dtype=torch.float64)
    for row, position in zip(found.flatten(0, 1), itertools.chain(*batches), strict=True):
        if position != FILLER:
            table[position] = row
    return ranks.sum(table)
