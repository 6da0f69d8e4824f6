"""Held-out loss: sums of token losses and token counts, all-reduced in float64 and divided once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.base.errors import InputError, NonFiniteLossError
from adept_ds.base.progress import ProgressCallback
from adept_ds.data.blocks import Blocks
from adept_ds.data.order import rank_batches
from adept_ds.ranks.collectives import Ranks


@dataclass(frozen=True)
class EvalSet:
    """A held-out corpus: 'general' or 'domain'.

    Raises:
        InputError: it has no token that is predicted.
    """

    name: str
    blocks: Blocks
    indices: tuple[int, ...]
    """Of the blocks that are evaluated."""

    def __post_init__(self) -> None:
        if not self.blocks.predicted_tokens(self.indices):
            raise InputError(f"{self.key}: no token of it has one before it that it is predicted from; add text")

    @property
    def key(self) -> str:
        """Of the configuration."""
        return f"data.{self.name}_eval"


def evaluate(
    model: Callable[..., torch.Tensor],
    eval_sets: list[EvalSet],
    ranks: Ranks,
    *,
    micro_batch_size: int,
    device: torch.device | str,
    progress: ProgressCallback | None = None,
) -> dict[str, dict[str, Any]]:
    """Mean token loss of each corpus, in nats: {"general": {"loss", "tokens"}, ...}; the same on every rank.

    The result does not depend on the number of ranks, nor on how blocks fall on them.

    Raises:
        NonFiniteLossError: on every rank.
    """
    schedule = [
        (eval_set, batch)
        for eval_set in eval_sets
        for batch in rank_batches(eval_set.indices, ranks.rank, ranks.world_size, micro_batch_size)
    ]
    sums = {s.name: torch.zeros(2, dtype=torch.float64) for s in eval_sets}
    with torch.no_grad():
        for number, (eval_set, batch) in enumerate(schedule):
            if progress:
                progress(number / len(schedule), f"{eval_set.name} text")
            loss = float(model(*eval_set.blocks.batch(batch).to(device)).double().sum())
            sums[eval_set.name] += torch.tensor([loss, eval_set.blocks.predicted_tokens(batch)], dtype=torch.float64)
    results = {}
    for eval_set in eval_sets:
        loss, tokens = ranks.sum(sums[eval_set.name]).tolist()
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"{eval_set.key}: the held-out loss is {loss}")
        results[eval_set.name] = {"loss": loss / tokens, "tokens": int(tokens)}
    return results
