"""What one rank does in test_families.py: probing, importances, a step and an export for a model of every family.

Usage: python -m harness.family_worker FOLDER OUTPUT FAMILY ... where FOLDER holds a directory for each family, with
`source/` and `expanded/`. Rank 0 writes what it found to OUTPUT (torch.save), and exports to `export/` of each family.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness.models import VOCABULARY

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.probing.sweep import install_layer_sweep
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.training.movement import UnitMovement
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import Granularity, build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import UnitSums
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.export import export_checkpoint
from adept_ds.zero.build import EngineSettings, StepShape, build_forward_engine, build_training_engine
from adept_ds.zero.engine import parameter_shapes, release
from adept_ds.zero.gathered import gather_layers_whole

GRANULARITIES: tuple[Granularity, ...] = ("matrix", "fine")
ROWS, TOKENS = 2, 24


def batch() -> torch.Tensor:
    """[ROWS, TOKENS]: longer than the sliding windows of 16."""
    return torch.randint(VOCABULARY - 6, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))


def sweep(settings: EngineSettings, source: ModelDirectory) -> torch.Tensor:
    """[layers + 1] loss sums: of the whole model, and without each layer."""

    def prepare(model: torch.nn.Module) -> None:
        install_layer_sweep(model, source.family, max_stack_tokens=3 * ROWS * TOKENS)
        gather_layers_whole(model, source.family.layer_modules(model))

    model, _ = build_forward_engine(settings, source, prepare)
    with torch.no_grad():
        losses: torch.Tensor = model(batch(), batch()).double().view(source.num_layers + 1, ROWS).sum(-1)
    release(model)
    return losses


def train(settings: EngineSettings, folder: Path) -> dict[str, Any]:
    """Importances of the copies' units, one step, a checkpoint and its export; every rank has the same batch."""
    ranks, expanded, checkpoint = settings.ranks, ModelDirectory.read(folder / "expanded"), folder / "checkpoint"
    copies = Expansion.read(expanded.path).copy_indices

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return UnitAdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)

    engine = build_training_engine(
        settings, expanded, layers_train(expanded.family, copies), optimizer, StepShape(2, 1, 1)
    )
    shapes = parameter_shapes(engine.module)
    registries = {
        granularity: build_registry(expanded.family, shapes, copies, granularity, engine.module.config)
        for granularity in GRANULARITIES
    }
    registry = registries["fine"]
    UnitLR(engine, registry, ranks=ranks)
    movement = UnitMovement(engine, registry, expanded, torch.float32, ranks)
    engine.module.eval()  # some families have dropout
    engine.backward(engine(batch(), batch()).sum() / (ROWS * (TOKENS - 1)))
    importances = {}
    for granularity, units in registries.items():
        sums = ranks.sum(UnitSums(engine, units, ranks).local()).tolist()
        importances[granularity] = dict(zip(units.names, sums, strict=True))
    engine.step()
    moved = dict(zip(registry.names, movement.measure(1)[1], strict=True))
    engine.save_checkpoint(str(checkpoint), tag="step_1", exclude_frozen_parameters=True)
    trained = {name: gathered(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    release(engine)
    ranks.on_main(lambda: export_checkpoint(expanded.path, checkpoint / "step_1", folder / "export"))
    return {"importances": importances, "trained": trained, "moved": moved}


def gathered(parameter: Any) -> torch.Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        whole: torch.Tensor = parameter.detach().clone()
    return whole


def main() -> None:
    root, output, families = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    ranks = join(rank_from_environment(os.environ))
    strict = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    settings = EngineSettings(strict, torch.float32, ranks)
    results: dict[str, Any] = {}
    for folder in (root / family for family in families):
        source = ModelDirectory.read(folder / "source")
        results[folder.name] = {"sweep": sweep(settings, source), **train(settings, folder)}
    if ranks.is_main:
        torch.save(results, output)


if __name__ == "__main__":
    main()
