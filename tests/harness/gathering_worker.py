"""What one rank does in test_estimators.py: count what passes gather under ZeRO-3, from one batch on each rank.

Usage: python -m harness.gathering_worker WORKSPACE OUTPUT METHOD... Rank 0 writes the bytes of every all-gather, by
method and in their order, to OUTPUT (torch.save).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness.counting import Collectives
from harness.probe_worker import open_run, probe_config
from harness.workspace import Workspace

from adept_ds.probing import estimators
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.run.probe import probe_stage


def gathered(workspace: Workspace, run_dir: Path, method: str, ranks: Ranks) -> list[int]:
    """By the stage itself, from the moment that its engine is built."""
    config = probe_config(workspace, run_dir, ranks, method=method, sequences=2, micro_batch_size=1, stability=None)
    build, counted = estimators.build_forward_engine, Collectives()

    def build_and_begin(*args: Any) -> Any:
        built = build(*args)
        counted.__enter__()
        return built

    with mock.patch.object(estimators, "build_forward_engine", build_and_begin):
        probe_stage(open_run(config, ranks))
    counted.__exit__(None, None, None)
    return counted.gathered()


def main() -> None:
    workspace, output, methods = Workspace(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3:]
    ranks = join(rank_from_environment(os.environ))
    found = {method: gathered(workspace, output.parent / method, method, ranks) for method in methods}
    if ranks.is_main:
        torch.save(found, output)


if __name__ == "__main__":
    main()
