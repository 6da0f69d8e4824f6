"""Held-out loss: sums of token losses and token counts, all-reduced in float64 and divided once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.base.progress import ProgressCallback
from adept_ds.data.blocks import Blocks
from adept_ds.data.order import rank_batches
from adept_ds.ranks.collectives import Ranks


@dataclass(frozen=True)
class EvalSet:
    """A held-out corpus: 'general' or 'domain'."""

    name: str
    blocks: Blocks
    max_sequences: int

    @property
    def indices(self) -> range:
        return range(min(len(self.blocks), self.max_sequences))


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
            input_ids, labels = (tensor.to(device) for tensor in eval_set.blocks.batch(batch))
            loss = float(model(input_ids, labels).double().sum())
            sums[eval_set.name] += torch.tensor([loss, eval_set.blocks.predicted_tokens(batch)], dtype=torch.float64)
    results = {}
    for name, local in sums.items():
        loss, tokens = ranks.sum(local).tolist()
        results[name] = {"loss": loss / tokens, "tokens": int(tokens)}
    return results
