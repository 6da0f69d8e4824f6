"""A penalty on the way from the start, weighted by how much general text minds it (elastic weight consolidation).

It costs 8 bytes for each trained element over all ranks, on the device that steps it, and 4 in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.progress import ProgressCallback, by_batch
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import LongWork, State, Work
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.rule import Refresh, TrainingRule, check_start
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import GradientBatches, UnitSums, grad_squared
from adept_ds.weights.by_rank import SavedElements, elements_file
from adept_ds.weights.start_weights import StartWeights
from adept_ds.zero.engine import Engine
from adept_ds.zero.gradients import add_to_gradient, gradients_outside_training, local_weight_and_grad
from adept_ds.zero.layout import partition_layout

_FISHER = "fisher"

Slices = dict[str, torch.Tensor]
"""Of each parameter, by full name: this rank's elements, fp32, as they follow each other in the flattened parameter."""


class FisherPenalty(TrainingRule):
    """The term strength/2 * sum_i F_i (w_i - w0_i)^2 of the loss.

    F is the diagonal of the empirical Fisher matrix (see `estimate_fisher`) at the start; w0 are the weights at the
    start.

    Args:
        start: where the weights at the start are read.
        batches: general text; asked for once, where training begins.
        together: around the estimate (see `LongWork`).
    """

    def __init__(
        self,
        engine: Engine,
        unit_lr: UnitLR,
        ranks: Ranks,
        start: StartWeights,
        strength: float,
        batches: Callable[[], GradientBatches],
        together: LongWork,
    ) -> None:
        self._engine, self._unit_lr, self._ranks = engine, unit_lr, ranks
        self._strength, self._batches, self._together = strength, batches, together
        self._start: Slices = {
            name: start.elements(name, first, stop).to(device) for name, first, stop, device in _own_elements(engine)
        }
        self._fisher: Slices = {}

    def start(self) -> Refresh:
        """Estimate F. What is logged as importance is its mean over each unit; multipliers stay."""
        with self._together("estimating Fisher information") as (bar, work):
            found = estimate_fisher(self._engine, self._unit_lr, self._batches(), self._ranks, bar, work)
        self._fisher, means = found
        check_start(means)
        return Refresh(means, self._unit_lr.multipliers)

    def before_update(self) -> dict[str, torch.Tensor]:
        """Add the term's gradient; the term itself, at the weights before the update, is what is recorded."""
        terms: list[torch.Tensor] = []

        def gradient(name: str, weight: torch.Tensor, *_: int) -> torch.Tensor:
            # DeepSpeed hands out weights on the device, wherever the optimizer has them.
            change = weight - self._start[name].to(weight.device)
            pull = self._strength * self._fisher[name].to(weight.device) * change
            terms.append((pull * change).sum(dtype=torch.float64))
            return pull

        add_to_gradient(self._engine, gradient)
        nothing = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        return {"penalty": torch.stack(terms).sum().to(nothing) / 2 if terms else nothing}

    def save(self, files: CheckpointFiles) -> None:
        files.add_tensors(elements_file(_FISHER, self._ranks.rank), self._fisher)

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        saved = SavedElements(checkpoint, _FISHER)
        self._fisher = {
            name: saved.of(name, first, stop).to(device) for name, first, stop, device in _own_elements(self._engine)
        }


def estimate_fisher(
    engine: Engine,
    unit_lr: UnitLR,
    batches: GradientBatches,
    ranks: Ranks,
    progress: ProgressCallback | None = None,
    work: Work | None = None,
) -> tuple[Slices, list[float]]:
    """The diagonal of the empirical Fisher matrix of one token's prediction, and its mean over each unit.

    F_i = mean over batches of N (dL/dw_i)^2, L being the mean loss over the N predicted tokens of a batch. Where the
    gradients of tokens are uncorrelated, that is the mean over tokens of their squared gradients, whatever the size of
    the batches: it costs one backward pass a batch instead of one a token. Leaves no trace in training.

    Args:
        work: where it is kept, batch by batch.
    """
    registry, work = unit_lr.registry, work or Work()
    unit_sums, global_batches = UnitSums(engine, registry, ranks, grad_squared), batches.global_batches()
    total = work.tensor("total", len(registry))
    shares = [batches.blocks.predicted_tokens(batch) / len(global_batches) for batch in global_batches]

    def add(number: int) -> None:
        _add_squares(work.state, engine, shares[number])

    with gradients_outside_training(engine):
        for number, sums, _ in unit_sums.of_batches(batches, work, by_batch(progress) if progress else None, read=add):
            total += shares[number] * sums
    devices = {name: device for name, _, _, device in _own_elements(engine)}
    fisher = {name: work.state[_SUMS + name].to(device) for name, device in devices.items()}
    means: list[float] = (ranks.sum(total) / registry.sizes).tolist()
    return fisher, means


_SUMS = "fisher/"


def _add_squares(state: State, engine: Engine, share: float) -> None:
    """Add `share` times the square of the gradient that the engine holds right now, by parameter."""
    for name, parameter in engine.module.named_parameters():
        found = local_weight_and_grad(engine, parameter) if parameter.requires_grad else None
        if found is not None:
            squares = grad_squared(*found[:2]).to(found[0].device).mul_(share)
            known = state.get(_SUMS + name)
            state[_SUMS + name] = squares if known is None else known.to(squares.device).add_(squares)


def _own_elements(engine: Engine) -> Iterator[tuple[str, int, int, torch.device]]:
    """Name, first and last + 1 element, and their device, of each parameter that this rank steps elements of."""
    for partition in partition_layout(engine):
        for fragment in partition.fragments:
            yield fragment.parameter, fragment.param_start, fragment.param_stop, partition.tensor.device
