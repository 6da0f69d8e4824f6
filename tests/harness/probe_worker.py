"""What one rank does in test_probing.py: stage one by every method, in one process group.

Usage: python -m harness.probe_worker WORKSPACE ROOT. Every method has a run directory below ROOT; rank 0 also writes
how often each rank reported progress, by method, to ROOT/progress.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from harness.models import save_tiny_model
from harness.workspace import Workspace, write_corpus

from adept_ds.base.files import write_json
from adept_ds.base.terminal import Terminal
from adept_ds.config.loading import parse_config
from adept_ds.config.resolved import resolve
from adept_ds.config.schema import Config
from adept_ds.probing.estimators import ESTIMATORS
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.context import Context
from adept_ds.run.probe import compare_methods, probe_stage


def small_workspace(root: Path) -> Workspace:
    """A model, and two corpora of which the second is so short that all of it is sampled."""
    save_tiny_model(root / "model")
    write_corpus(root / "general.jsonl", 0)
    write_corpus(root / "domain.jsonl", 1, documents=3)
    return Workspace(root)


def probe_config(workspace: Workspace, run_dir: Path, ranks: Ranks | None = None, **probe: Any) -> Config:
    """Two sources, of which the second has all its blocks in the sample; global batches of five, five and two."""
    section = {
        "corpus": [
            str(workspace.root / "general.jsonl"),
            {"files": [str(workspace.root / "domain.jsonl")], "weight": 2.5, "name": "second"},
        ],
        "sequences": 12,
        "batch_sequences": 5,
        "micro_batch_size": 2,
        "stability": "halves",
    }
    deepspeed = run_dir.parent / "strict.json"
    # Every parameter is cut among ranks, also the norms.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (ranks or Ranks()).on_main(lambda: write_json(deepspeed, {"zero_optimization": zero}))
    return parse_config(workspace.tree(run_dir, probe=section | probe, deepspeed=str(deepspeed)))


def open_run(config: Config, ranks: Ranks | None = None) -> Context:
    """A run on these ranks that says nothing."""
    return Context.of(resolve(config, "probe"), ranks or Ranks(), Terminal(None), StopRequest())


class Reports:
    """Counts progress that every rank must report together."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        checked = StopRequest.checked

        def counting(stop: StopRequest, stage: str, progress: Any, ranks: Ranks | None) -> Any:
            report = checked(stop, stage, progress, ranks)

            def counted(share: float, text: str = "") -> None:
                self.count += ranks is not None
                report(share, text)

            return counted

        StopRequest.checked = counting  # type: ignore[method-assign, assignment]

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def main() -> None:
    workspace, root = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    ranks = join(rank_from_environment(os.environ))
    reports, counts = Reports(), {}
    reports.install()
    for method in ESTIMATORS:
        run = open_run(probe_config(workspace, root / method, ranks, method=method), ranks)
        result = probe_stage(run)
        counts[method] = ranks.gather(reports.take())
        if method == "mask" and ranks.world_size == 2:
            compare_methods(run, result)
            reports.take()
    ranks.on_main(lambda: write_json(root / "progress.json", counts))


if __name__ == "__main__":
    main()
