"""What one rank does in test_every_partition.py: the same small training in many settings, in one process group.

Usage: python -m harness.cells_worker WORKSPACE OUTPUT CELL... with cells such as zero3/fine or zero3/fine/attached;
several variants are written a+b.
Rank 0 writes the outcome of each to OUTPUT (torch.save).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness.lab import Lab
from harness.launching import ROOT
from harness.trainer_files import trainer_file
from harness.workspace import Workspace

from adept_ds.base.files import write_json
from adept_ds.config.schema import Config
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.units.adamw import UnitAdamW

REFRESH_AFTER = (0, 2)


def stock_adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Any optimizer that knows nothing of units."""
    return torch.optim.AdamW(parameters, foreach=True, **options)


def cpu_adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's own optimizer for offloaded states; compiled at first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)


def one_pass(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Steps as on an accelerator."""
    return UnitAdamW(parameters, one_pass=True, **options)


OTHER_OPTIMIZERS = {"attached": stock_adamw, "cpu_adam": cpu_adam, "one_pass": one_pass}

ZERO_SETTINGS: dict[str, dict[str, Any]] = {
    "above_threshold": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "around_threshold": {"stage": 3, "stage3_param_persistence_threshold": 1000},
    "many_groups": {"stage": 3, "sub_group_size": 3000},
    "params_offloaded": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    },
    "params_alone": {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0},
    "hpz": {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
    "hpz_offloaded": {
        "stage": 3,
        "zero_hpz_partition_size": 2,
        "offload_optimizer": {"device": "cpu"},
        "stage3_param_persistence_threshold": 1000,
        "sub_group_size": 3000,
    },
    "overlapping": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500},
}
"""Variants that are DeepSpeed settings."""


def deepspeed_file(lab: Lab, deepspeed: str, variants: list[str]) -> Path:
    """The shipped one, settings of a variant, or one of Hugging Face's Trainer of the same stage."""
    if "trainer" in variants:
        tree = trainer_file(int(deepspeed[-1]))
        lab.ranks.on_main(lambda: write_json(lab.scratch / f"{deepspeed}_trainer.json", tree))
        return lab.scratch / f"{deepspeed}_trainer.json"
    settings = [(variant, ZERO_SETTINGS[variant]) for variant in variants if variant in ZERO_SETTINGS]
    for variant, zero in settings:
        return lab.deepspeed_file(f"{deepspeed}_{variant}", **zero)
    return ROOT / "ds_configs" / f"{deepspeed}.json"


def config_of(lab: Lab, deepspeed: str, granularity: str, variant: str = "") -> Config:
    general = [str(lab.workspace.root / "general.jsonl")]
    variants = variant.split("+")
    online = "online" in variants
    sequences = 6 if online else 12  # of each text in a global batch
    return lab.config(
        deepspeed=str(deepspeed_file(lab, deepspeed, variants)),
        data={"replay": general, "replay_share": 0.5} if online else {},
        importance={"granularity": granularity, "source": "online" if online else "corpus"},
        train={
            "micro_batch_size": 1 if sequences % (2 * lab.ranks.world_size) else 2,
            "activation_checkpointing": "recomputed" in variants,
        },
    )


def train(lab: Lab, deepspeed: str, granularity: str, variant: str = "") -> dict[str, Any]:
    config = config_of(lab, deepspeed, granularity, variant)
    others = [OTHER_OPTIMIZERS[each] for each in variant.split("+") if each in OTHER_OPTIMIZERS]
    optimizer = others[0] if others else UnitAdamW
    outcome = lab.train(config, optimizer=optimizer, estimate_after=REFRESH_AFTER, refresh=True)
    importances = [dict(zip(outcome.units, values, strict=True)) for values in outcome.importances]
    return dataclasses.asdict(outcome) | {"importances": importances}


def main() -> None:
    workspace, output, cells = Workspace(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3:]
    lab = Lab(workspace, output.parent, join(rank_from_environment(os.environ)))
    outcomes = {cell: train(lab, *cell.split("/")) for cell in cells}
    source = {
        granularity: lab.source_importance(config_of(lab, "zero3", granularity)) for granularity in ("matrix", "fine")
    }
    if lab.ranks.is_main:
        found = {"expanded": str(lab.expanded.path), "layers": lab.layers, "cells": outcomes, "source": source}
        torch.save(found, output)


if __name__ == "__main__":
    main()
