"""What one rank does in test_place_gradients.py: all places of several models weighed, in one process group.

Usage: python -m harness.places_worker WORKSPACE ROOT FAMILY STAGE [FAMILY STAGE ...]. A family has a model in
WORKSPACE, and with a ZeRO stage a run directory below ROOT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.models import save_tiny_model
from harness.probe_worker import open_run
from harness.workspace import Workspace, write_corpus

from adept_ds.base.files import write_json
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.run.places import places_stage

FAMILIES = ("llama", "gemma3_text", "gpt2", "gpt_neox", "qwen2_moe")
"""Projections, norms behind sublayers, transposed weights and biases, a parallel residual, experts."""


def places_workspace(root: Path, families: Sequence[str] = FAMILIES) -> Workspace:
    for family in families:
        save_tiny_model(root / family, family)
    for seed, name in enumerate(("general", "domain", "second")):
        write_corpus(root / f"{name}.jsonl", seed, documents=20)
    return Workspace(root)


def places_config(
    workspace: Workspace,
    run_dir: Path,
    family: str = "llama",
    stage: int = 3,
    ranks: Ranks | None = None,
    **expand: Any,
) -> Config:
    """Seven sequences of each text, which fall unevenly on ranks and micro-batches; the domain has two sources."""
    second = {"files": [str(workspace.root / "second.jsonl")], "weight": 0.5, "name": "second"}
    deepspeed = run_dir.parent / f"zero{stage}.json"
    # Every parameter is cut among ranks, also the norms.
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    (ranks or Ranks()).on_main(lambda: write_json(deepspeed, {"zero_optimization": zero}))
    tree = workspace.tree(
        run_dir,
        model=str(workspace.root / family),
        data={"domain": [str(workspace.root / "domain.jsonl"), second]},
        probe={"micro_batch_size": 2},
        expand={"k": 2, "choose": "gain"} | expand,
        deepspeed=str(deepspeed),
    )
    return parse_config(tree)


def main() -> None:
    workspace, root = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    ranks = join(rank_from_environment(os.environ))
    for family, stage in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
        places_stage(open_run(places_config(workspace, root / f"{family}{stage}", family, int(stage), ranks), ranks))


if __name__ == "__main__":
    main()
