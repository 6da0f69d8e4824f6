"""What one rank does in the tests of training beside DeepSpeed: several small trainings in one process group.

Usage: python -m harness.lab_worker WORKSPACE OUTPUT. Rank 0 writes what it found to OUTPUT (torch.save).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from harness.lab import Lab, Outcome
from harness.launching import ROOT
from harness.workspace import Workspace

from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment


def main() -> None:
    workspace, output = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    ranks = join(rank_from_environment(os.environ))
    lab = Lab(workspace, output.parent, ranks)
    plain = lab.config()
    recompute = lab.config(train={"activation_checkpointing": True})
    strict, strict_recompute = (c.model_copy(update={"deepspeed": lab.strict_zero3()}) for c in (plain, recompute))
    silent = {"layers.2.mlp.up_proj": 0.0, "layers.2.input_layernorm": 0.0, "layers.5.self_attn.q_proj": 0.0}
    results: dict[str, Any] = {
        "plain": lab.train(plain),
        "probed": lab.train(plain, estimate_after=(0, 1, 3)),
        "recomputed": lab.train(recompute),
        "recomputed_probed": lab.train(recompute, estimate_after=(0, 1, 3)),
        "kept": lab.train(strict, estimate_after=(0, 1, 3), keep_bytes=1 << 30),
        "kept_in_part": lab.train(strict_recompute, estimate_after=(0, 1, 3), keep_bytes=40_000),
        "cached": lab.train(strict, estimate_after=(0, 1, 3), cached_batches=100),
        "cached_in_part": lab.train(recompute, estimate_after=(0, 1, 3), cached_batches=2),
        "silent": lab.train(plain, multipliers=silent),
        "silent_units": list(silent),
        "recomputed_within": lab.train(recompute, estimate_within=(0, 1, 4)),
        "disagreement": lab.disagreement(),
        "expanded": str(lab.expanded.path),
    }
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        config = lab.config(deepspeed=str(ROOT / "ds_configs" / f"{name}.json"))
        results[name] = lab.train(config, estimate_after=(0, 2), refresh=True)
        results[f"{name} within"] = lab.train(config, estimate_after=(0, 2), refresh=True, estimate_within=(0, 1, 4))
    replayed = {"replay": [str(workspace.root / "general.jsonl")], "replay_share": 1 / 3}
    for name in ("zero2", "zero3"):
        config = lab.config(
            deepspeed=str(ROOT / "ds_configs" / f"{name}.json"),
            data=replayed,
            importance={"source": "online"},
            train={"precision": "bf16"},
        )
        results[f"bf16 online {name}"] = lab.train(config, estimate_after=(1, 3))
        results[f"bf16 online {name} within"] = lab.train(config, estimate_after=(1, 3), estimate_within=(0, 2))
    # DeepSpeed takes fp16 on a CPU for unsupported where it would be slow.
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        for name, precision in itertools.product(("zero1", "zero2", "zero3", "zero3_offload"), ("bf16", "fp16")):
            config = lab.config(
                deepspeed=str(ROOT / "ds_configs" / f"{name}.json"),
                importance={"granularity": "fine"},
                train={"precision": precision},
            )
            results[f"{precision} {name}"] = lab.misplaced_share(config)
        for name in ("zero2", "zero3"):
            path = str(ROOT / "ds_configs" / f"{name}.json")
            results[f"overflow {name}"] = lab.overflowing(lab.config(deepspeed=path, train={"precision": "fp16"}))
    results["source importance"] = lab.source_importance(plain)
    results["second_rank_cut_rows"] = ranks.gather(results["plain"].cut_rows)[1]
    if ranks.is_main:
        torch.save({k: dataclasses.asdict(v) if isinstance(v, Outcome) else v for k, v in results.items()}, output)


if __name__ == "__main__":
    main()
