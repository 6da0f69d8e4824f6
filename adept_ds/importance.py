"""Unit importance (paper, equation 5): mean over a unit's elements of |w * dL/dw| on general text.

The gradient inside the absolute value is that of the mean token loss over one *global* probe batch, so importances
do not depend on the number of ranks. Every rank sums its own slices; one all-reduce of n_units float64 numbers is all
that is communicated beyond the backward pass itself.

General text comes from a probe corpus, in passes of its own, or from the sequences that a training batch replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds import zero
from adept_ds.data import Blocks, rank_batches
from adept_ds.distributed import max_over_ranks, rank, sum_over_ranks, world_size
from adept_ds.prefix import FrozenPrefix
from adept_ds.terminal import ProgressCallback
from adept_ds.units import UnitRegistry

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From elements of a weight and of its gradient to what is summed over a unit."""


def weight_times_grad(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return (weight * grad).abs_()


def grad_squared(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return grad.float().square()


@dataclass(frozen=True)
class ProbeBatches:
    """The general text that importance is estimated on: fixed for the whole run."""

    blocks: Blocks
    indices: tuple[int, ...]
    batch_sequences: int
    micro_batch_size: int

    def global_batches(self) -> list[list[int]]:
        step = self.batch_sequences
        return [list(self.indices[start : start + step]) for start in range(0, len(self.indices), step)]

    def batches_within(self, num_bytes: int, bytes_per_token: int) -> int:
        """How many micro-batches' hidden states fit into `num_bytes`."""
        return num_bytes // (self.micro_batch_size * self.blocks.seq_len * bytes_per_token)


def estimate_importance(
    engine: Any,
    registry: UnitRegistry,
    probe: ProbeBatches,
    progress: ProgressCallback | None = None,
    prefix: FrozenPrefix | None = None,
) -> list[float]:
    """Importance of every unit, in registry order; the same on every rank.

    Leaves no trace in training (see `zero.probing_gradients`).

    Args:
        prefix: kept from one estimate to the next with the same `probe`, it saves the frozen layers' forward passes.
    """
    parameters = parameters_of(engine, registry)
    sums = torch.zeros(len(registry), dtype=torch.float64)
    batches = probe.global_batches()
    with zero.probing_gradients(engine):
        for number in range(len(batches)):
            if progress:
                progress(number / len(batches), f"probe batch {number + 1} of {len(batches)}")
            sums += batch_sums(engine, registry, parameters, probe, number, prefix)[0]
    return (sum_over_ranks(sums) / (registry.sizes * len(batches))).tolist()


class OnlineImportance:
    """Running mean of importance over the training batches since it was last asked for.

    Its text is what the batches replay of the general corpus, so it needs no passes of its own. Every rank keeps sums
    of its own slices; only `take` communicates.
    """

    def __init__(self, engine: Any, registry: UnitRegistry) -> None:
        self._engine, self._registry = engine, registry
        self._parameters = parameters_of(engine, registry)
        self._sums, self._count = torch.zeros(len(registry), dtype=torch.float64), 0

    def observe(self, share: float) -> None:
        """Take in the gradient of a training batch's replayed sequences.

        To be called at their end (see `zero.end_segment`), when nothing else of the batch has had its backward pass.

        Args:
            share: of the batch, that is replayed: the loss of a training step is a mean over the whole batch.
        """
        sums = local_sums(self._engine, self._registry, self._parameters)
        if _has_overflowed(self._engine, sums):
            return  # the step will be skipped for the same reason
        self._sums += sums / share
        self._count += 1

    def take(self) -> list[float] | None:
        """Importance of every unit, in registry order, and begin anew; None if nothing was observed."""
        if not self._count:
            return None
        mean: list[float] = (sum_over_ranks(self._sums) / (self._registry.sizes * self._count)).tolist()
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Of this rank."""
        return {"sums": self._sums.tolist(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count = torch.tensor(state["sums"], dtype=torch.float64), state["count"]


def parameters_of(engine: Any, registry: UnitRegistry) -> list[tuple[str, Any]]:
    """Those that belong to a unit, by name."""
    return [(name, p) for name, p in engine.module.named_parameters() if name in registry.placements]


def batch_sums(
    engine: Any,
    registry: UnitRegistry,
    parameters: Sequence[tuple[str, Any]],
    probe: ProbeBatches,
    number: int,
    prefix: FrozenPrefix | None = None,
    score: Score = weight_times_grad,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's sums of the score for one global batch, [n_units] float64, and the summed loss of each of its rows.

    In fp16 the loss scale that training has arrived at may be too large for these gradients: it is lowered until all
    are finite.
    """
    while True:
        losses = backward_global_batch(engine, probe, number, prefix)
        sums = local_sums(engine, registry, parameters, score)
        zero.clear_probe_gradients(engine)
        if not _has_overflowed(engine, sums):
            return sums, losses
        zero.set_loss_scale(engine, max(1.0, zero.loss_scale(engine) / 16))


def _has_overflowed(engine: Any, sums: torch.Tensor) -> bool:
    """Whether loss scaling (fp16) was too much for the gradients of any rank."""
    return zero.loss_scale(engine) > 1 and bool(max_over_ranks(float(not sums.isfinite().all()))[0])


def backward_global_batch(
    engine: Any, probe: ProbeBatches, number: int, prefix: FrozenPrefix | None = None
) -> torch.Tensor:
    """Gradient of the mean token loss over global batch `number`, which is spread over the ranks.

    Returns the summed loss of each of this rank's rows, in the order of `rank_batches`, fillers included; float32.
    """
    batch = probe.global_batches()[number]
    total_tokens = probe.blocks.predicted_tokens(batch)
    micro_batches = rank_batches(batch, rank(), world_size(), probe.micro_batch_size)
    row_losses = []
    for position, indices in enumerate(micro_batches):
        input_ids, labels = (tensor.to(engine.device) for tensor in probe.blocks.batch(indices))
        engine.set_gradient_accumulation_boundary(position == len(micro_batches) - 1)
        # DeepSpeed averages over ranks; times world_size, the sum over ranks is left.
        with prefix.at((number, position)) if prefix else nullcontext():
            losses = engine(input_ids, labels)
            engine.backward(losses.sum() * (world_size() / total_tokens), scale_wrt_gas=False)
        row_losses.append(losses.detach())
    return torch.cat(row_losses).cpu()


@torch.no_grad()
def local_sums(
    engine: Any,
    registry: UnitRegistry,
    parameters: Sequence[tuple[str, Any]],
    score: Score = weight_times_grad,
) -> torch.Tensor:
    """[n_units] float64: sums of the score, by default |w * g|, over this rank's elements of each unit."""
    sums = torch.zeros(len(registry), dtype=torch.float64)
    for name, parameter in parameters:
        local = zero.local_weight_and_grad(engine, parameter)
        if local is not None:
            weight, grad, start = local
            # float64 so that the split over ranks does not show.
            values = score(weight, grad)
            for tile in registry.tiles(name, start, start + values.numel()):
                sums.index_add_(0, tile.units, tile.view(values).sum(1 - tile.axis, dtype=torch.float64).cpu())
    return sums
