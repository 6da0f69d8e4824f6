"""What one rank does in tests of conversions: plain DeepSpeed on a tiny model, with nothing of adept-ds.

Usage: python -m harness.plain_worker FOLDER train CELL...    two steps of FOLDER/model, and FOLDER/CELL/step_2
       python -m harness.plain_worker FOLDER load CELL=UNIVERSAL...    a fresh engine of this kind, from UNIVERSAL

A cell is TRAINS-STAGE[-full], such as some-zero3: `some` trains two of the layers, `all` everything; `full` saves
frozen weights too. Rank 0 writes what DeepSpeed itself puts together of each engine to FOLDER/WHAT_RANKS.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from harness.launching import free_port

TRAINED_LAYERS = (1, 3)
STEPS = 2
LR = 1e-2

ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "groups3": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1000},
}


def build(folder: Path, cell: str, *, universal: bool = False) -> Any:
    """A DeepSpeed engine as any program makes one. Under stage 3 the model is partitioned once it is loaded."""
    from transformers import AutoModelForCausalLM

    trains, zero, *_ = cell.split("-")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else ""
        parameter.requires_grad_(trains == "all" or layer in map(str, TRAINED_LAYERS))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": ZERO[zero],
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    rows = torch.randint(engine.module.config.vocab_size, (2, 12), generator=generator)
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()


def state(engine: Any) -> dict[str, Any]:
    """Whole weights as the forward pass sees them, and of what trains masters, moments and steps."""
    zero, weights, vectors = engine.optimizer, {}, {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
        if parameter.requires_grad and engine.zero_optimization_stage():
            if engine.zero_optimization_stage() < 3:  # found from the first step on
                zero._hp_optimizer_states_linked = False
                zero._lazy_init_hp_params_optimizer_state()
            vectors[name, "fp32"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                vectors[name, key] = safe_get_full_optimizer_state(parameter, key).clone()
    inner = zero.optimizer if engine.zero_optimization_stage() else zero
    groups = [{key: of for key, of in group.items() if key != "params"} for group in inner.param_groups]
    return {
        "weights": weights,
        "vectors": vectors,
        "steps": {float(of["step"]) for of in inner.state.values()},
        "groups": groups,
        "counted": engine.global_steps,
    }


def train(folder: Path, cell: str) -> dict[str, Any]:
    engine = build(folder, cell)
    for number in range(STEPS):
        step(engine, number)
    found = state(engine)
    full = cell.endswith("-full")
    engine.save_checkpoint(folder / cell, tag="step_2", client_state={"mine": 7}, exclude_frozen_parameters=not full)
    engine.destroy()
    return found


def load(folder: Path, cell: str, universal: str) -> dict[str, Any]:
    engine = build(folder, cell, universal=True)
    place, client = engine.load_checkpoint(folder / universal)
    assert place is not None
    found = state(engine) | {"mine": client["mine"]}
    step(engine, STEPS)  # what was loaded is a state that training goes on from
    assert all(bool(weight.isfinite().all()) for weight in state(engine)["weights"].values())
    engine.destroy()
    return found


def main() -> None:
    folder, what, cells = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({"MASTER_PORT": str(free_port())} | alone | dict(os.environ))
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    outcomes = {cell: train(folder, cell) if what == "train" else load(folder, *cell.split("=")) for cell in cells}
    if dist.get_rank() == 0:
        torch.save(outcomes, folder / f"{what}_{dist.get_world_size()}.pt")


if __name__ == "__main__":
    main()
