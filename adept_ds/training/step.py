"""One optimizer step: the learning rate that it has, and the gradient that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from adept_ds.config.train_sections import TrainSection
from adept_ds.data.training_data import StepBatch
from adept_ds.ranks.collectives import Ranks
from adept_ds.units.importance import OnlineImportance
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import end_segment
from adept_ds.zero.optimizer_step import step_below


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
    batch: StepBatch,
    online: OnlineImportance | None = None,
    further: Sequence[Callable[[], None]] = (),
) -> torch.Tensor:
    """The gradient of the mean token loss over the global batch; weights change when the engine steps next.

    The host waits for nothing.

    Args:
        batch: this rank's share of it.
        online: sees the gradient of the replayed rows alone; they must then fill whole micro-batches of every rank.
        further: micro-batches of the same step, behind those of `batch`. Each makes a backward pass, which adds to
            the gradient; the engine counts them among its accumulation steps.

    Returns:
        The sum of this rank's token losses over domain sequences, and over replayed ones. [2] float64
    """
    batches = batch.micro_batches(engine.device)
    num_micro_batches = len(batches) + len(further)
    # The engine averages over ranks; all tokens of the batch shall count alike.
    tokens_per_row = batch.predicted / batch.sequences
    add_replayed: Callable[[], None] | None = None
    row_losses: list[torch.Tensor] = []
    for number, rows in enumerate(batches, start=1):
        losses = engine(*rows)
        row_losses.append(losses.detach())
        backward = partial(engine.backward, (losses / tokens_per_row).mean() / len(batches), scale_wrt_gas=False)
        if online and number == batch.replayed_batches:
            share = batch.replay_predicted / batch.predicted
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
    flat = torch.cat(row_losses).double()
    return torch.stack([flat[batch.replayed_rows :].sum(), flat[: batch.replayed_rows].sum()])


def update_weights(
    engine: Engine,
    ranks: Ranks,
    own: Mapping[str, torch.Tensor],
    largest_norm: Callable[[Mapping[str, float]], float],
) -> tuple[dict[str, float], float]:
    """Take the optimizer's step, unless the gradient's norm is above `largest_norm` (see `step_below`).

    Args:
        own: numbers of this rank, the same names on every rank; float64 scalars on the device.
        largest_norm: from their sums over ranks.

    Returns:
        These sums, and the norm: on the host, in one copy.
    """

    def of_names(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(own, values, strict=True))

    told = ranks.sum_on_device(torch.stack(list(own.values())))
    values, norm = step_below(engine, told, lambda values: largest_norm(of_names(values)))
    return of_names(values), norm
