"""One optimizer step: the learning rate that it has, and the gradient that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from adept_ds.config.train_sections import TrainSection
from adept_ds.data.training_data import BatchEntry, TrainingData, micro_batches
from adept_ds.ranks.collectives import Ranks
from adept_ds.units.importance import OnlineImportance
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import end_segment


def lr_factor(step: int, train: TrainSection) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of `train.lr`: warmup, then the schedule, to 0.

    wsd (warmup, stable, decay; Hu et al. 2024, arXiv 2404.06395) depends on the length of the run in its decay alone.
    """
    warmup = train.num_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "wsd":
        decaying = train.steps - train.flat_until
        return 1.0 - max(0, step - train.flat_until) / max(1, decaying)
    share = (step - warmup) / max(1, train.steps - warmup)
    if train.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0 - share if train.schedule == "linear" else 1.0


def accumulate_gradient(
    engine: Engine,
    data: TrainingData,
    entries: Sequence[BatchEntry],
    train: TrainSection,
    ranks: Ranks,
    online: OnlineImportance | None = None,
    further: Sequence[Callable[[], None]] = (),
) -> tuple[float, float]:
    """The gradient of the mean token loss over the global batch `entries`; weights change when the engine steps next.

    Returns the sum of this rank's token losses over domain sequences, and over replayed ones.

    Args:
        online: sees the gradient of the replayed rows alone; they must then fill whole micro-batches of every rank.
        further: micro-batches of the same step, behind those of `entries`. Each makes a backward pass, which adds to
            the gradient; the engine counts them among its accumulation steps.
    """
    batches = micro_batches(entries, train, ranks.rank, ranks.world_size)
    replayed = sum(rows[-1].replayed for rows in batches)
    num_micro_batches = len(batches) + len(further)
    # The engine averages over ranks; all tokens of the batch shall count alike.
    tokens = data.predicted_tokens(entries)
    tokens_per_row = tokens / len(entries)
    add_replayed: Callable[[], None] | None = None
    row_losses: list[torch.Tensor] = []
    for number, rows in enumerate(batches, start=1):
        losses = engine(*data.batch(rows).to(engine.device))
        row_losses.append(losses.detach())
        backward = partial(engine.backward, (losses / tokens_per_row).mean() / len(batches), scale_wrt_gas=False)
        if online and number == replayed:
            share = data.predicted_tokens([entry for entry in entries if entry.replayed]) / tokens
            add_replayed = end_segment(engine, backward, partial(online.observe, share))
        else:
            backward()
        if number < num_micro_batches:
            engine.step()  # counts the micro-batch
    for number, add_gradient in enumerate(further, start=len(batches) + 1):
        add_gradient()
        if number < num_micro_batches:
            engine.step()
    if add_replayed:
        add_replayed()
    domain_loss = replay_loss = 0.0
    flat = torch.cat(row_losses).tolist()  # the only time that the host waits for the device
    for entry, loss in zip((entry for rows in batches for entry in rows), flat, strict=True):
        if entry.replayed:
            replay_loss += loss
        else:
            domain_loss += loss
    return domain_loss, replay_loss
