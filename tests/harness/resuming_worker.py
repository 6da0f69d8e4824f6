"""What one rank does in test_resuming.py: trainings that are saved, and go on from what other ranks saved.

Usage: python -m harness.resuming_worker FOLDER CELL... with cells such as frozen/zero2 (two steps, a checkpoint, a
third step) or frozen/zero2@3/strict (the third step under `strict`, from what three ranks saved under zero2). Rank 0
writes the outcome of each to FOLDER/outcomes_RANKS.pt (torch.save).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from harness.lab import whole_values
from harness.models import VOCABULARY

from adept_ds.models.adapter_spec import LoraSpec
from adept_ds.models.adapters import adapters_train
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import Trains, everything_trains, layers_train
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.training.checkpoint import CheckpointManifest, load_checkpoint
from adept_ds.training.checkpoint_writer import CheckpointWriter, Retention
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import Engine, client_optimizer, release, zero_stage
from adept_ds.zero.gradients import loss_scale, set_loss_scale

ROWS, TOKENS, SAVED_AFTER = 12, 16, 2
LR = 1e-2

ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "strict": {"stage": 3, "stage3_param_persistence_threshold": 0},  # nothing stays gathered by itself
    "many_groups": {"stage": 3, "sub_group_size": 1000},
    "offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "offload_both": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def batch(step: int) -> torch.Tensor:
    """[ROWS, TOKENS]"""
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))


def two_groups(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Matrices decay, and learn faster than the rest, as is the custom."""
    matrices = [parameter for parameter in parameters if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    others = [parameter for parameter in parameters if not any(parameter is matrix for matrix in matrices)]
    groups = [
        {"params": matrices, "lr": 2 * LR, "weight_decay": 0.3},
        {"params": others, "lr": LR, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)


def one_group(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return UnitAdamW(parameters, lr=LR, weight_decay=0.1)


def build(kind: str, zero: str, model: ModelDirectory, ranks: Ranks) -> Engine:
    """What trains is said by `kind`: the whole model, two layers, or adapters."""
    trains: Trains = {
        "frozen": lambda: layers_train(model.family, [1, 3]),
        "lora": lambda: adapters_train(model.family, LoraSpec(rank=3, alpha=6.0), 5),
    }.get(kind, everything_trains)()
    settings = EngineSettings({"zero_optimization": ZERO[zero]}, PRECISIONS.get(kind, torch.float32), ranks)
    shape = StepShape(ROWS, ROWS // ranks.world_size, 1, 0.7)
    engine = build_training_engine(settings, model, trains, two_groups if kind == "groups" else one_group, shape)
    units = {name: f"unit {number % 5}" for number, (name, p) in enumerate(_named(engine)) if p.requires_grad}
    UnitLR(engine, units, ranks=ranks).set({unit: 0.5 + int(unit[-1]) / 10 for unit in units.values()})
    return engine


def _named(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return list(engine.module.named_parameters())


def take_step(engine: Engine, step: int, ranks: Ranks) -> float:
    """The loss before it."""
    rows = batch(step).view(ranks.world_size, -1, TOKENS)[ranks.rank]
    losses = engine(rows, rows)
    engine.backward((losses / (TOKENS - 1)).mean())
    engine.step()
    return float(ranks.sum([float(losses.detach().sum())])[0]) / (ROWS * (TOKENS - 1))


def state(engine: Engine, ranks: Ranks) -> dict[str, Any]:
    """All of it, put together by DeepSpeed itself."""
    optimizer, vectors = client_optimizer(engine), {}
    if zero_stage(engine) < 3:  # DeepSpeed finds moments from the first step on, and of the first group alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in _named(engine):
        if parameter.requires_grad:
            vectors[name, "fp32"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                vectors[name, key] = safe_get_full_optimizer_state(parameter, key).clone()
    return {
        "vectors": vectors,
        "forward": whole_values(engine),
        "steps": ranks.gather([float(of_one["step"]) for of_one in optimizer.state.values()]),
        "groups": [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "loss_scale": loss_scale(engine),
        "counted": engine.global_steps,  # type: ignore[attr-defined]
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def train(folder: Path, cell: str, ranks: Ranks) -> dict[str, Any]:
    """The state where the checkpoint is, and what the third step makes of it."""
    kind, _, rest = cell.partition("/")
    written, _, continued = rest.partition("@")
    size, _, zero = continued.partition("/") if continued else (str(ranks.world_size), "", written)
    engine = build(kind, zero, ModelDirectory.read(folder / "model"), ranks)
    checkpoints = folder / f"{kind}_{written}_{size}"
    manifest = CheckpointManifest(
        step=SAVED_AFTER, world_size=int(size), zero_stage=ZERO[written]["stage"], fingerprint="", settings={}
    )
    if continued:
        assert load_checkpoint(engine, checkpoints, manifest, ranks) == {"rank": 0}
    else:
        if kind == "fp16":
            set_loss_scale(engine, 2.0**9)
        for step in range(SAVED_AFTER):
            take_step(engine, step, ranks)
        writer = CheckpointWriter(engine, checkpoints, ranks, Retention(newest=1))
        writer.save(manifest, {"rank": ranks.rank}, lambda _: None)
    found = {"at": state(engine, ranks), "loss": take_step(engine, SAVED_AFTER, ranks), "after": state(engine, ranks)}
    release(engine)
    return found


def main() -> None:
    folder, cells = Path(sys.argv[1]), sys.argv[2:]
    ranks = join(rank_from_environment(os.environ))
    # DeepSpeed takes fp16 on a CPU for unsupported where it would be slow.
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        outcomes = {cell: train(folder, cell, ranks) for cell in cells}
    if ranks.is_main:
        torch.save(outcomes, folder / f"outcomes_{ranks.world_size}.pt")


if __name__ == "__main__":
    main()
