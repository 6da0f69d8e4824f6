"""What one rank does in test_adapters.py: a few steps with every kind of adapter at every ZeRO stage.

Usage: python -m harness.adapter_worker MODEL OUTPUT STAGE.... Rank 0 writes {kind: {stage: what it found}} to OUTPUT
(torch.save), and leaves a checkpoint of each training in `KIND/stage_N` beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness.lab import whole_values
from harness.models import VOCABULARY

from adept_ds.models.adapter_spec import AdapterSpec, LoraSpec, OftSpec, adapter_multipliers, adapter_units
from adept_ds.models.adapters import adapters_train
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import parameter_shapes, release

STEPS, ROWS, TOKENS, SEED = 4, 4, 16, 5
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
RATIO = 4.0
"""Of LoRA+."""

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS: dict[str, AdapterSpec] = {
    "lora": LoraSpec(rank=3, alpha=6.0),
    "lora+": LoraSpec(rank=3, alpha=6.0),
    "dora": LoraSpec(rank=3, alpha=6.0, dora=True),
    "oft": OftSpec(block_size=4, targets=(*_ATTENTION, "mlp.gate_proj", "mlp.up_proj")),
}


def batches() -> torch.Tensor:
    """[STEPS, ROWS, TOKENS]: a global batch for each step."""
    return torch.randint(VOCABULARY, (STEPS, ROWS, TOKENS), generator=torch.Generator().manual_seed(3))


def train(kind: str, stage: int, model: ModelDirectory, ranks: Ranks, checkpoints: Path) -> dict[str, Any]:
    """Values of all parameters before and after, and which of them train."""
    rows = ROWS // 2  # of a micro-batch: one rank accumulates two of them
    settings = EngineSettings(
        {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}, torch.float32, ranks
    )
    engine = build_training_engine(
        settings,
        model,
        adapters_train(model.family, KINDS[kind], SEED),
        lambda parameters: UnitAdamW(parameters, **ADAMW),
        StepShape(ROWS, rows, 2 // ranks.world_size),
        seed=17,
    )
    shapes = parameter_shapes(engine.module)
    registry = UnitRegistry.from_mapping(adapter_units(model.family, shapes), shapes)
    multipliers = UnitLR(engine, registry, ranks=ranks)
    if kind == "lora+":
        multipliers.set(adapter_multipliers(registry.names, RATIO))
    before = whole_values(engine)
    for batch in batches():
        for micro in batch.split(rows)[ranks.rank :: ranks.world_size]:
            engine.backward(engine(micro, micro).sum() / (rows * (TOKENS - 1)))
            engine.step()
    trained = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    after = whole_values(engine)
    engine.save_checkpoint(str(checkpoints / kind), tag=f"stage_{stage}", exclude_frozen_parameters=True)
    release(engine)
    return {"before": before, "after": after, "trained": trained, "units": registry.names}


def main() -> None:
    model, output = ModelDirectory.read(Path(sys.argv[1])), Path(sys.argv[2])
    ranks = join(rank_from_environment(os.environ))
    stages = [int(stage) for stage in sys.argv[3:]]
    found = {kind: {stage: train(kind, stage, model, ranks, output.parent) for stage in stages} for kind in KINDS}
    if ranks.is_main:
        torch.save(found, output)


if __name__ == "__main__":
    main()
