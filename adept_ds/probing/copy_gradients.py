"""How large the gradient of each unit of the copies is on a text (docs/diagnosis.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adept_ds.base.progress import ProgressCallback, by_batch
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import Trains
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work
from adept_ds.units.registry import Unit, UnitRegistry
from adept_ds.units.unit_sums import GradientBatches, UnitSums, grad_squared
from adept_ds.zero.build import EngineSettings, build_training_engine
from adept_ds.zero.engine import parameter_shapes, release
from adept_ds.zero.gradients import gradients_outside_training

MakeUnits = Callable[[Mapping[str, tuple[int, ...]], Any], UnitRegistry]
"""From the shapes of a model's parameters and its configuration to units."""


@dataclass(frozen=True)
class UnitGradients:
    """Of every unit, in the registry's order."""

    units: tuple[Unit, ...]
    rms: tuple[float, ...]
    """Root mean square over the unit's elements of dL/dw, L the mean token loss of the whole text."""


def unit_gradients(
    engines: EngineSettings,
    model_dir: ModelDirectory,
    trains: Trains,
    make_units: MakeUnits,
    batches: GradientBatches,
    *,
    seed: int,
    progress: ProgressCallback,
    work: Work,
) -> UnitGradients:
    """One backward pass over a text, which is one global batch; the same on every rank, at every ZeRO stage.

    No gradient is gathered: each rank squares the slices that it holds, and n_units sums are all-reduced.

    Args:
        work: where it is kept.
    """
    engine = build_training_engine(engines, model_dir, trains, seed=seed)
    ranks: Ranks = engines.ranks
    try:
        registry = make_units(parameter_shapes(engine.module), engine.module.config)
        unit_sums = UnitSums(engine, registry, ranks, grad_squared)
        total = work.tensor("total", len(registry))
        with gradients_outside_training(engine):
            for _, sums, _ in unit_sums.of_batches(batches, work, by_batch(progress)):
                total += sums
        mean_squares = ranks.sum(total) / (registry.sizes * len(batches.global_batches()))
        return UnitGradients(registry.units, tuple(mean_squares.sqrt().tolist()))
    finally:
        release(engine)
