"""What one rank does in test_whole_model.py: trainings of every parameter, in many settings, in one process group.

Usage: python -m harness.whole_worker FOLDER OUTPUT CELL... with cells such as llama/zero3/plain; FOLDER holds a model
of each name. Rank 0 writes the outcome of each to OUTPUT (torch.save).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from harness.lab import whole_master_weights
from harness.models import VOCABULARY

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.head_loss import IGNORED_LABEL
from adept_ds.models.loading import everything_trains
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.training.checkpoint import CheckpointManifest, load_checkpoint
from adept_ds.training.checkpoint_writer import CheckpointWriter, Retention
from adept_ds.training.movement import UnitMovement
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import UnitSums
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import Engine, parameter_shapes, release, zero_stage
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import add_to_gradient, set_loss_scale

STEPS, SAVED_AFTER = 4, 2
ROWS, TOKENS, ACCUMULATION = 8, 20, 2
LR, PULL = 3e-3, 0.15
LISTENING = "listening"
"""Of the outcomes, beside the cells: of each rank at which port ranks have met, how many process groups it is in at the
end, and where it listens."""
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 0.7}

ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "strict": {"stage": 3, "stage3_param_persistence_threshold": 0},  # nothing stays gathered by itself
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """input_ids and labels [ROWS, TOKENS] of each step; some labels are ignored, so that rows have unequal numbers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        input_ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
        labels = input_ids.masked_fill(torch.rand(ROWS, TOKENS, generator=generator) < 0.2, IGNORED_LABEL)
        found.append((input_ids, labels))
    return found


def unlike_multipliers(units: Iterable[str]) -> dict[str, float]:
    """Another one for each unit, so that one that acts on its neighbour shows."""
    return {unit: 0.25 + 0.13 * (number % 11) for number, unit in enumerate(sorted(units))}


def build(settings: EngineSettings, model: ModelDirectory, variant: str) -> tuple[Engine, UnitRegistry]:
    clip = OPTIONS["clip_grad_norm"]
    engine = build_training_engine(
        settings,
        model,
        everything_trains(),
        lambda parameters: UnitAdamW(
            parameters, lr=LR, betas=OPTIONS["betas"], eps=OPTIONS["eps"], weight_decay=OPTIONS["weight_decay"]
        ),
        StepShape(ROWS, ROWS // ACCUMULATION // settings.ranks.world_size, ACCUMULATION, clip),
        recompute_activations=variant == "recomputed",
    )
    shapes = parameter_shapes(engine.module)
    registry = build_registry(model.family, shapes, range(model.num_layers), config=engine.module.config, outside=True)
    unit_lr = UnitLR(engine, registry, ranks=settings.ranks)
    if variant != "exported":
        unit_lr.set(unlike_multipliers(registry.names))
    return engine, registry


def accumulate(engine: Engine, step: int, ranks: Ranks) -> float:
    """The gradient of the mean token loss of step `step`; that loss."""
    input_ids, labels = batches()[step]
    tokens, total = int((labels[:, 1:] != IGNORED_LABEL).sum()), 0.0
    own = torch.arange(ROWS).view(ACCUMULATION, ranks.world_size, -1)[:, ranks.rank]
    for number, rows in enumerate(own, start=1):
        losses = engine(input_ids[rows], labels[rows])
        engine.backward((losses * (ROWS / tokens)).mean())
        total += float(losses.sum()) / tokens
        if number < ACCUMULATION:
            engine.step()
    return float(ranks.sum([total])[0])


def save(engine: Engine, directory: Path, step: int, ranks: Ranks) -> CheckpointManifest:
    stage, size = zero_stage(engine), ranks.world_size
    manifest = CheckpointManifest(step=step, world_size=size, zero_stage=stage, fingerprint="", settings={})
    CheckpointWriter(engine, directory, ranks, Retention(1)).save(manifest, {}, lambda _: None)
    return manifest


def train(ranks: Ranks, folder: Path, name: str, zero: str, variant: str) -> dict[str, Any]:
    """Four steps, the last two of which a variant `resumed` takes in a new engine, from a checkpoint."""
    model = ModelDirectory.read(folder / name)
    precision = torch.float16 if variant == "fp16" else torch.float32
    settings = EngineSettings({"zero_optimization": ZERO[zero]}, precision, ranks)
    checkpoints = folder / f"checkpoints_{name}_{zero}_{ranks.world_size}"
    engine, registry = build(settings, model, variant)
    if variant == "fp16":
        set_loss_scale(engine, 2.0**10)
    movement = UnitMovement(engine, registry, model, precision, ranks)
    start = whole_master_weights(engine)

    def pull(name: str, weight: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        return PULL * (weight - start[name].flatten()[first:stop] / 2)

    found: dict[str, Any] = {"losses": [], "norms": [], "weights": [], "checkpoints": checkpoints}
    for step in range(STEPS):
        found["losses"].append(accumulate(engine, step, ranks))
        if step == 0:
            sums = ranks.sum(UnitSums(engine, registry, ranks).local())
            found["products"] = dict(zip(registry.names, sums.tolist(), strict=True))
        if variant in ("pulled", "fp16"):
            add_to_gradient(engine, pull)
        engine.step()
        if zero_stage(engine) == 3:
            found["kept"] = keep_frozen_gathered(engine, 1 << 30)
        found["norms"].append(float(engine.get_global_grad_norm()))
        found["weights"].append(whole_master_weights(engine))
        if variant == "resumed" and step + 1 == SAVED_AFTER:
            manifest = save(engine, checkpoints, SAVED_AFTER, ranks)
            release(engine)
            engine, _ = build(settings, model, variant)
            load_checkpoint(engine, checkpoints, manifest, ranks)
    if variant == "exported":
        found["moved"] = math.hypot(*movement.measure(STEPS)[1])
        save(engine, checkpoints, STEPS, ranks)
    release(engine)
    return found


def listening() -> list[tuple[str, int]]:
    """Addresses and ports that this process listens at, as the kernel has them ('0100007F' is 127.0.0.1)."""
    own = {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    found = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:]:
            address, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in own:
                host, port = address.split(":")
                found.append((host, int(port, 16)))
    return found


def main() -> None:
    folder, output, cells = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    ranks = join(rank_from_environment(os.environ))
    # DeepSpeed takes fp16 on a CPU for unsupported where it would be slow.
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        outcomes = {cell: train(ranks, folder, *cell.split("/")) for cell in cells}
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    ports = ranks.gather((int(os.environ["MASTER_PORT"]), groups, listening()))
    if ranks.is_main:
        torch.save(outcomes | {LISTENING: ports}, output)


if __name__ == "__main__":
    main()
