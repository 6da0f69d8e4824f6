"""One optimizer step: the learning rate that it has, and the gradient that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from adept_ds.config.schema import TrainSection
from adept_ds.data.blocks import TrainingData
from adept_ds.ranks.collectives import Ranks
from adept_ds.units.importance import OnlineImportance
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import end_segment


def lr_factor(step: int, train: TrainSection) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of `train.lr`: warmup, then the schedule, to 0."""
    warmup = math.ceil(train.warmup_ratio * train.steps)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, train.steps - warmup)
    if train.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0 - share if train.schedule == "linear" else 1.0


def accumulate_gradient(
    engine: Engine,
    data: TrainingData,
    step: int,
    train: TrainSection,
    ranks: Ranks,
    online: OnlineImportance | None = None,
) -> tuple[float, float]:
    """The gradient of optimizer step `step` (from 0); weights change when the engine's `step` is called after it.

    Returns this rank's losses, mean over each sequence's tokens, summed over domain sequences and over replayed ones.

    Args:
        online: sees the gradient of the replayed rows alone; they must then fill whole micro-batches of every rank.
    """
    batches = data.micro_batches(step, train, ranks.rank, ranks.world_size)
    replayed = sum(entries[-1].replayed for entries in batches)
    add_replayed: Callable[[], None] | None = None
    row_losses: list[torch.Tensor] = []
    for number, entries in enumerate(batches, start=1):
        input_ids, labels = (tensor.to(engine.device) for tensor in data.batch(entries))
        losses = engine(input_ids, labels) / (data.domain.seq_len - 1)  # blocks are full: all but the first token count
        row_losses.append(losses.detach())
        backward = partial(engine.backward, losses.mean())
        if online and number == replayed:
            share = data.replayed / train.global_batch_size
            add_replayed = end_segment(engine, backward, partial(online.observe, share))
        else:
            backward()
        if number < len(batches):
            engine.step()  # counts the micro-batch
    if add_replayed:
        add_replayed()
    domain_loss = replay_loss = 0.0
    flat = torch.cat(row_losses).tolist()  # the only time that the host waits for the device
    for entry, loss in zip((entry for entries in batches for entry in entries), flat, strict=True):
        if entry.replayed:
            replay_loss += loss
        else:
            domain_loss += loss
    return domain_loss, replay_loss
