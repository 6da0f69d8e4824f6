"""What one rank does in run/test_unfinished.py: each stage that takes long once to its end, and once in two parts.

Usage: python -m harness.unfinished_worker WORKSPACE ROOT STAGE.... A stage has the run directories ROOT/STAGE/whole and
ROOT/STAGE/parts; rank 0 writes how often progress was reported to ROOT/reports.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.workspace import Workspace

from adept_ds.base.errors import StopRequestedError
from adept_ds.base.files import write_json
from adept_ds.base.terminal import Terminal
from adept_ds.config.loading import parse_config
from adept_ds.config.resolved import Purpose, resolve
from adept_ds.ranks import unfinished
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.anchor import anchor_text_stage
from adept_ds.run.context import Context
from adept_ds.run.evaluate import evaluate_base
from adept_ds.run.places import places_stage
from adept_ds.run.probe import probe_stage
from adept_ds.run.train import train_stage

IN_PLACE = {"expand": None, "importance": None}


@dataclass(frozen=True)
class Stage:
    run: Callable[[Context], object]
    purpose: Purpose
    killed: bool
    """By something that no process can act upon; else it is asked to stop."""
    sections: dict[str, Any] = field(default_factory=dict)


_PROBE = {"sequences": 12, "batch_sequences": 5, "micro_batch_size": 1}

STAGES = {
    "mask": Stage(probe_stage, "probe", False, {"probe": _PROBE}),
    "taylor": Stage(probe_stage, "probe", True, {"probe": _PROBE | {"method": "taylor"}}),
    "fisher": Stage(probe_stage, "probe", True, {"probe": _PROBE | {"method": "fisher"}}),
    "places": Stage(places_stage, "probe", False, {"probe": _PROBE, "expand": {"choose": "gain"}}),
    "evaluation": Stage(evaluate_base, "eval", True),
    "anchor": Stage(anchor_text_stage, "train", False, {"anchor": {"kind": "kl", "text": "sampled", "sequences": 70}}),
    "ewc": Stage(
        train_stage,
        "train",
        True,
        IN_PLACE | {"method": {"name": "ewc", "sequences": 7, "batch_sequences": 2}, "train": {"steps": 1}},
    ),
    "tasl": Stage(
        train_stage,
        "train",
        False,
        IN_PLACE | {"method": {"name": "tasl", "sequences": 7, "batch_sequences": 2}, "train": {"steps": 1}},
    ),
}


class Interruption(StopRequest):
    """At report number `at` of those that all ranks make together, rank 1 is asked to stop, or all are killed."""

    def __init__(self, ranks: Ranks, at: int | None = None, *, killed: bool = False) -> None:
        super().__init__()
        self._ranks, self._at, self._killed, self.reports = ranks, at, killed, 0

    def checked(self, stage: str, progress: Any, ranks: Ranks | None) -> Any:
        report = super().checked(stage, progress, ranks)

        def counted(share: float, text: str = "") -> None:
            if ranks is not None:
                self.reports += 1
                if self.reports == self._at:
                    if self._killed:
                        raise KeyboardInterrupt
                    self.requested = self._ranks.rank == 1
            report(share, text)

        return counted


def main() -> None:
    workspace, root = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    ranks = join(rank_from_environment(os.environ))
    unfinished._WORTH = 0.0  # everything is
    strict = root / "strict.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ranks.on_main(lambda: write_json(strict, {"zero_optimization": zero}))
    reports = {}

    for name in sys.argv[3:]:
        stage = STAGES[name]
        unfinished.EVERY = unfinished._PAYS = 0.0 if stage.killed else 1e9

        def run(part: str, at: int | None = None, name: str = name, stage: Stage = stage) -> int:
            tree = workspace.tree(root / name / part, deepspeed=str(strict), **stage.sections)
            tree = {key: value for key, value in tree.items() if value is not None}
            config, stop = parse_config(tree), Interruption(ranks, at, killed=stage.killed)
            try:
                stage.run(Context.of(resolve(config, stage.purpose, ranks.world_size), ranks, Terminal(None), stop))
            except (StopRequestedError, KeyboardInterrupt):
                assert at is not None
            else:
                assert at is None, f"{name} was not interrupted"
            return stop.reports

        whole = run("whole")
        at = whole // 2 + 1
        run("parts", at)
        reports[name] = {"whole": whole, "before": at - 1, "after": run("parts")}
    ranks.on_main(lambda: write_json(root / "reports.json", reports))


if __name__ == "__main__":
    main()
