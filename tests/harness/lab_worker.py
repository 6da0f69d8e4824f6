"""What one rank does in the tests of training beside DeepSpeed: several small trainings in one process group.

Usage: python -m harness.lab_worker WORKSPACE OUTPUT PART, where PART is one of `PARTS`. Rank 0 writes what it found to
OUTPUT (torch.save).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from harness.lab import Lab, Outcome
from harness.launching import ROOT
from harness.workspace import Workspace

from adept_ds.config.schema import Config
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment

STAGES = ("zero1", "zero2", "zero3", "zero3_offload")


def shipped(name: str) -> str:
    return str(ROOT / "ds_configs" / f"{name}.json")


def beside(lab: Lab) -> dict[str, Any]:
    """Trainings with and without estimates of importances beside them."""
    plain, recompute = lab.config(), lab.config(train={"activation_checkpointing": True})
    strict = plain.model_copy(update={"deepspeed": lab.strict_zero3()})
    results: dict[str, Any] = {
        "plain": lab.train(plain),
        "probed": lab.train(plain, estimate_after=(0, 1, 3)),
        "recomputed": lab.train(recompute),
        "cached": lab.train(strict, estimate_after=(0, 1, 3), cached_batches=100),
        "bf16 online zero3": lab.train(_online(lab, "zero3"), estimate_after=(1, 3)),
    }
    return results | _within(lab, "zero3") | _online_within(lab, "zero2") | _overflow(lab, "zero2")


def beside_rest(lab: Lab) -> dict[str, Any]:
    """The same of other stages, and with activations that are recomputed."""
    recompute = lab.config(train={"activation_checkpointing": True})
    results: dict[str, Any] = {
        "recomputed_probed": lab.train(recompute, estimate_after=(0, 1, 3)),
        "cached_in_part": lab.train(recompute, estimate_after=(0, 1, 3), cached_batches=2),
        "recomputed_within": lab.train(recompute, estimate_within=(0, 1, 4)),
    }
    for name in ("zero1", "zero2", "zero3_offload"):
        results |= _within(lab, name)
    return results | _online_within(lab, "zero3") | _overflow(lab, "zero3")


def _within(lab: Lab, name: str) -> dict[str, Any]:
    config = lab.config(deepspeed=shipped(name))
    return {
        name: lab.train(config, estimate_after=(0, 2), refresh=True),
        f"{name} within": lab.train(config, estimate_after=(0, 2), refresh=True, estimate_within=(0, 1, 4)),
    }


def _online(lab: Lab, name: str) -> Config:
    replayed = {"replay": [str(lab.workspace.root / "general.jsonl")], "replay_share": 1 / 3}
    return lab.config(
        deepspeed=shipped(name), data=replayed, importance={"source": "online"}, train={"precision": "bf16"}
    )


def _online_within(lab: Lab, name: str) -> dict[str, Any]:
    config = _online(lab, name)
    return {
        f"bf16 online {name}": lab.train(config, estimate_after=(1, 3)),
        f"bf16 online {name} within": lab.train(config, estimate_after=(1, 3), estimate_within=(0, 2)),
    }


def _overflow(lab: Lab, name: str) -> dict[str, Any]:
    overflowing = lab.overflowing(lab.config(deepspeed=shipped(name), train={"precision": "fp16"}))
    return {f"overflow {name}": overflowing, "source importance": lab.source_importance(lab.config())}


def gathered(lab: Lab) -> dict[str, Any]:
    """Trainings in which frozen weights stay gathered."""
    plain = lab.config()
    strict = plain.model_copy(update={"deepspeed": lab.strict_zero3()})
    return {
        "plain": lab.train(plain),
        "probed": lab.train(plain, estimate_after=(0, 1, 3)),
        "kept": lab.train(strict, estimate_after=(0, 1, 3), keep_bytes=1 << 30),
    }


def gathered_rest(lab: Lab) -> dict[str, Any]:
    """The same where some of them do, and where activations are recomputed."""
    recompute = lab.config(train={"activation_checkpointing": True})
    strict = recompute.model_copy(update={"deepspeed": lab.strict_zero3()})
    return {"kept_in_part": lab.train(strict, estimate_after=(0, 1, 3), keep_bytes=40_000)}


def layout(lab: Lab) -> dict[str, Any]:
    """Where multipliers act, in half precision; and where this rank's fragments begin."""
    return _misplaced(lab, [("zero2", "bf16"), ("zero3", "fp16")]) | _cut_rows(lab, ["zero2", "zero3"])


def layout_rest(lab: Lab) -> dict[str, Any]:
    """The same at all stages and in both precisions."""
    return _misplaced(lab, itertools.product(STAGES, ("bf16", "fp16"))) | _cut_rows(lab, STAGES)


def _misplaced(lab: Lab, cells: Iterable[tuple[str, str]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, precision in cells:
        config = lab.config(deepspeed=shipped(name), importance={"granularity": "fine"}, train={"precision": precision})
        results[f"{precision} {name}"] = lab.misplaced_share(config)
    return results


def _cut_rows(lab: Lab, stages: Iterable[str]) -> dict[str, Any]:
    cut_rows = {name: lab.train(lab.config(deepspeed=shipped(name))).cut_rows for name in stages}
    return {f"cut rows {name}": lab.ranks.gather(rows) for name, rows in cut_rows.items()}


def units(lab: Lab) -> dict[str, Any]:
    """Units that stand still, and ranks that hold different multipliers."""
    silent = {"layers.2.mlp.up_proj": 0.0, "layers.2.input_layernorm": 0.0, "layers.5.self_attn.q_proj": 0.0}
    return {
        "silent": lab.train(lab.config(), multipliers=silent),
        "silent_units": list(silent),
        "disagreement": lab.disagreement(),
    }


PARTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "beside": beside,
    "beside_rest": beside_rest,
    "gathered": gathered,
    "gathered_rest": gathered_rest,
    "layout": layout,
    "layout_rest": layout_rest,
    "units": units,
}


def main() -> None:
    workspace, output, part = Workspace(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    lab = Lab(workspace, output.parent, join(rank_from_environment(os.environ)))
    # DeepSpeed takes fp16 on a CPU for unsupported where it would be slow.
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        found = PARTS[part](lab)
    if lab.ranks.is_main:
        results = {k: dataclasses.asdict(v) if isinstance(v, Outcome) else v for k, v in found.items()}
        torch.save(results | {"expanded": str(lab.expanded.path)}, output)


if __name__ == "__main__":
    main()
