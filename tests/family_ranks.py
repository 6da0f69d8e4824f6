"""What one rank does in test_families.py: probing, importances, a step and an export for a model of every family.

Usage: python tests/family_ranks.py FOLDER OUTPUT. FOLDER holds a directory for each family, with `source/` and
`expanded/`. Rank 0 writes what it found to OUTPUT (torch.save), and exports to `export/` of each family.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import VOCABULARY

from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.models.directory import family_of, layer_count
from adept_ds.models.families import Family
from adept_ds.probing.sweep import install_layer_sweep
from adept_ds.ranks.collectives import init_distributed, on_main_rank, rank, sum_over_ranks
from adept_ds.ranks.launchers import ranks_from_environment
from adept_ds.training.movement import UnitMovement
from adept_ds.units.registry import build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import local_sums
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.export import export_checkpoint
from adept_ds.zero.build import build_forward_engine, build_training_engine
from adept_ds.zero.engine import parameter_shapes, release
from adept_ds.zero.gathered import gather_layers_whole

ROWS, TOKENS = 2, 24


def batch() -> torch.Tensor:
    """[ROWS, TOKENS]: longer than the sliding windows of 16."""
    return torch.randint(VOCABULARY - 6, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))


def sweep(config: Config, source: Path, family: Family) -> torch.Tensor:
    """[layers + 1] loss sums: of the whole model, and without each layer."""

    def prepare(model: torch.nn.Module) -> None:
        install_layer_sweep(model, family, max_stack_tokens=3 * ROWS * TOKENS)
        gather_layers_whole(model, family.layer_modules(model))

    model, _ = build_forward_engine(config, source, prepare)
    with torch.no_grad():
        losses = model(batch(), batch()).double().view(layer_count(source) + 1, ROWS).sum(-1)
    release(model)
    return losses


def train(config: Config, folder: Path, family: Family) -> dict[str, Any]:
    """Importances of the copies' units, one step, a checkpoint and its export; every rank has the same batch."""
    expanded, checkpoint = folder / "expanded", folder / "checkpoint"
    copies = Expansion.load(expanded).copy_indices
    engine, optimizer, registry = build_training_engine(config, expanded, family, copies)
    UnitLR(engine, registry, config.lr_policy)
    movement = UnitMovement(engine, registry, expanded, torch.float32)
    engine.module.eval()  # some families have dropout
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    engine.backward(engine(batch(), batch()).sum() / (ROWS * (TOKENS - 1)))
    importances, shapes = {}, parameter_shapes(engine.module)
    for granularity in ("matrix", "fine"):
        units = build_registry(family, shapes, copies, granularity, engine.module.config)  # type: ignore[arg-type]
        parameters = [(name, p) for name, p in engine.module.named_parameters() if name in units.placements]
        sums = sum_over_ranks(local_sums(engine, units, parameters)).tolist()
        importances[granularity] = dict(zip(units.names, sums, strict=True))
    engine.step()
    moved = dict(zip(registry.names, movement.measure(1)[1], strict=True))
    engine.save_checkpoint(str(checkpoint), tag="step_1", exclude_frozen_parameters=True)
    trained = {name: gathered(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    release(engine)
    on_main_rank(lambda: export_checkpoint(expanded, checkpoint / "step_1", folder / "export"))
    return {"importances": importances, "trained": trained, "moved": moved}


def gathered(parameter: Any) -> torch.Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def main() -> None:
    root, output = Path(sys.argv[1]), Path(sys.argv[2])
    init_distributed(ranks_from_environment(os.environ))
    settings = root / "strict.json"
    strict = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    on_main_rank(lambda: settings.write_text(json.dumps(strict)))
    results: dict[str, Any] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        source = folder / "source"
        config = parse_config(
            {
                "model": str(source),
                "run_dir": str(folder / "run"),
                "deepspeed": str(settings),
                "importance": {"granularity": "fine"},
                "train": {"global_batch_size": 2, "micro_batch_size": 1, "weight_decay": 0.0, "clip_grad_norm": 0.0},
            }
        )
        family = family_of(source)
        results[folder.name] = {"sweep": sweep(config, source, family), **train(config, folder, family)}
    if rank() == 0:
        torch.save(results, output)


if __name__ == "__main__":
    main()
