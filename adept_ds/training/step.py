"""One optimizer step, and the learning rate that it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from adept_ds.config.schema import TrainSection
from adept_ds.data.blocks import TrainingData
from adept_ds.ranks.collectives import rank, world_size
from adept_ds.units.importance import OnlineImportance
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


def take_step(
    engine: Any, data: TrainingData, step: int, train: TrainSection, online: OnlineImportance | None
) -> tuple[float, float]:
    """Optimizer step `step` (from 0). Returns this rank's losses, summed over domain rows and over replayed ones.

    Args:
        online: sees the gradient of the replayed rows alone; they must then fill whole micro-batches of every rank.
    """
    domain_loss = replay_loss = 0.0
    batches = data.micro_batches(step, train, rank(), world_size())
    replayed = sum(rows[-1].replayed for rows in batches)
    add_replayed: Callable[[], None] | None = None
    for number, rows in enumerate(batches, start=1):
        input_ids, labels = (tensor.to(engine.device) for tensor in data.batch(rows))
        losses = engine(input_ids, labels) / (data.domain.seq_len - 1)  # blocks are full: all but the first token count
        backward = partial(engine.backward, losses.mean())
        if online and number == replayed:
            share = data.replayed / train.global_batch_size
            add_replayed = end_segment(engine, backward, partial(online.observe, share))
        else:
            backward()
        if add_replayed and number == len(batches):
            add_replayed()
        engine.step()
        for row, loss in zip(rows, losses.detach().tolist(), strict=True):
            domain_loss, replay_loss = domain_loss + loss * (not row.replayed), replay_loss + loss * row.replayed
    return domain_loss, replay_loss
