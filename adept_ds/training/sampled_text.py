"""Text that a model writes by itself, to be anchored to: tokens drawn from its own next-token distribution.

Ancestral sampling at temperature 1, of all tokens: a text comes up as often as the model holds it likely, so that a
divergence that is averaged over such texts is that of the distributions of texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from adept_ds.base.progress import ProgressCallback, by_batch
from adept_ds.data.order import FILLER, rank_batches
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work

_ROWS = 32
"""Sequences that are written together."""

_REPORTED_EVERY = 16
"""Tokens: to report is also to agree with the other ranks on going on."""

_BETWEEN_SEQUENCES = 1_000_003


@dataclass(frozen=True)
class Writer:
    """A model that writes."""

    model: Callable[[torch.Tensor], torch.Tensor]
    """See `NextToken`."""
    begin: Callable[[], None]
    first_token: int
    """What each sequence begins with."""
    device: torch.device | str
    ranks: Ranks

    def write(
        self, sequences: int, seq_len: int, seed: int, progress: ProgressCallback, work: Work | None = None
    ) -> torch.Tensor:
        """[sequences, seq_len] int32, the same on every rank; the first column is `first_token`.

        A sequence depends on the seed and its number alone: on the number of ranks, and on what is written beside it,
        no more than the model's rounding does. All ranks make the same passes.

        Args:
            work: where it is kept, batch by batch.
        """
        rows, work = self._rows(sequences), work or Work()
        batches = rank_batches(range(sequences), self.ranks.rank, self.ranks.world_size, rows)
        written = work.tensor("tokens", len(batches), rows, seq_len, dtype=torch.int32)
        with torch.no_grad():
            for number in work.steps(len(batches), by_batch(progress)):
                report = partial(_report, progress, number, len(batches))
                written[number] = self._rows_of(batches[number], seq_len, seed, report)
        numbers = itertools.chain(*batches)
        own = {number: row for number, row in zip(numbers, written.flatten(0, 1), strict=True) if number != FILLER}
        found = {sequence: row for of_rank in self.ranks.gather(own) for sequence, row in of_rank.items()}
        return torch.stack([found[sequence] for sequence in range(sequences)])

    def _rows(self, sequences: int) -> int:
        return min(_ROWS, -(-sequences // self.ranks.world_size))

    def _rows_of(self, batch: list[int], seq_len: int, seed: int, progress: Callable[[float], None]) -> torch.Tensor:
        """[rows, seq_len] int32, on the host."""
        of_rows = torch.stack([chances(sequence, seq_len, seed) for sequence in batch]).to(self.device)
        tokens = torch.full((len(batch), seq_len), self.first_token, dtype=torch.int64, device=self.device)
        self.begin()
        for position in range(1, seq_len):
            logits = self.model(tokens[:, position - 1 : position])
            tokens[:, position] = draw(logits, of_rows[:, position])
            if position % _REPORTED_EVERY == 0:
                progress(position / seq_len)
        return tokens.int().cpu()


def _report(progress: ProgressCallback, number: int, batches: int, done: float) -> None:
    progress((number + done) / batches, f"batch {number + 1} of {batches}")


def draw(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The token of each row below which the distribution has `chance` of its mass.

    logits [rows, vocab], chance [rows] float64 in [0, 1) -> [rows] int64
    """
    below = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(below, (chance * below[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return token.clamp_max(logits.shape[-1] - 1)


def chances(sequence: int, seq_len: int, seed: int) -> torch.Tensor:
    """What `draw` takes at each token of a sequence. [seq_len] float64 in [0, 1)"""
    generator = torch.Generator().manual_seed(seed + (sequence + 1) * _BETWEEN_SEQUENCES)
    return torch.rand(seq_len, generator=generator, dtype=torch.float64)
