"""TODO units.unit_sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.data.blocks import Blocks
from adept_ds.data.order import rank_batches
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import max_over_ranks, rank, world_size
from adept_ds.units.registry import UnitRegistry
from adept_ds.zero.gradients import clear_probe_gradients, local_weight_and_grad, loss_scale, set_loss_scale

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
        clear_probe_gradients(engine)
        if not _has_overflowed(engine, sums):
            return sums, losses
        set_loss_scale(engine, max(1.0, loss_scale(engine) / 16))


def _has_overflowed(engine: Any, sums: torch.Tensor) -> bool:
    """Whether loss scaling (fp16) was too much for the gradients of any rank."""
    return loss_scale(engine) > 1 and bool(max_over_ranks(float(not sums.isfinite().all()))[0])


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
        local = local_weight_and_grad(engine, parameter)
        if local is not None:
            weight, grad, start = local
            # float64 so that the split over ranks does not show.
            values = score(weight, grad)
            for tile in registry.tiles(name, start, start + values.numel()):
                sums.index_add_(0, tile.units, tile.view(values).sum(1 - tile.axis, dtype=torch.float64).cpu())
    return sums
