"""A run of all stages that nobody disturbs, runs that are disturbed, and whether these end with the same."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from harness.fault_worker import Planted
from harness.finished_run import Finished
from harness.launching import adept, start
from harness.trained_run import merged
from harness.workspace import Workspace

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory

T = TypeVar("T")

STEPS, CHECKPOINT_EVERY = 6, 2

_SECTIONS: dict[str, Any] = {
    "train": {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": 3},
    "dial": {"alphas": [0.5], "per_copy": False},
    "data": {"eval_sequences": 40},
}
"""Every stage, two checkpoints before the last, a refresh and an evaluation between them."""


INJECTED, RECOVERED = "fault injected", "steps lost"


class Fault:
    """A row of the table that ends the tests."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def injected(self, kind: str) -> None:
        self._record(INJECTED, kind)

    def recovered(self, steps_lost: int) -> None:
        """A run that goes on has come to what it would have come to without the fault."""
        self._record(RECOVERED, steps_lost)


@dataclass(frozen=True)
class Run:
    """A run directory and its configuration."""

    workspace: Workspace
    root: Path
    ranks: int

    @property
    def files(self) -> RunDirectory:
        return RunDirectory(self.root)

    def config(self, **sections: Any) -> Path:
        return self.workspace.config(self.root, **merged(_SECTIONS, sections))

    def results(self) -> dict[str, Any]:
        """Everything that comes out of it, but times."""
        found = Finished(self.root)
        evaluation = read_json(self.files.evaluation)
        return {
            "weights": found.weights(),
            "steps": [(of["step"], of["loss"], of["grad_norm"], of["lr"]) for of in found.steps()],
            "multipliers": found.units("multiplier"),
            "movement": [of["units"] for of in found.movement()],
            "evaluations": [{name: of["loss"] for name, of in each.items()} for each in found.evaluations()],
            "evaluation": {key: evaluation[key] for key in ("base", "adapted")},
            "dial": read_json(self.files.dial)["chosen"],
        }

    @property
    def steps_done(self) -> int:
        """The last that the log knows."""
        if not self.files.metrics.is_file():
            return 0
        lines = self.files.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return max((record["step"] for record in records if "loss" in record), default=0)


@dataclass(frozen=True)
class Undisturbed:
    """What a run comes to, and how many events each of its ranks sees."""

    run: Run
    counts: list[dict[str, int]]

    @cached_property
    def results(self) -> dict[str, Any]:
        return self.run.results()


def mostly_slow(cases: Sequence[T], few: int) -> list[Any]:
    """As parameters of a test: `few` of them, spread, run with the others of the project; all of them with
    `make test-faults`."""
    quick = random.Random(len(cases)).sample(range(len(cases)), few)
    return [pytest.param(case, marks=[] if n in quick else [pytest.mark.slow]) for n, case in enumerate(cases)]


def undisturbed(workspace: Workspace, folder: Path, ranks: int) -> Undisturbed:
    run = Run(workspace, folder / "run", ranks)
    ended = disturbed(run, Planted("nothing"), folder)
    assert ended.codes == [0] * ranks, ended.said
    return Undisturbed(run, [read_json(folder / f"counts.{rank}") for rank in range(ranks)])


@dataclass(frozen=True)
class Ended:
    """By rank."""

    codes: list[int | None]
    """None: stopped, and alive."""
    said: list[str]
    """On stderr."""

    @property
    def lines(self) -> list[str]:
        return [line for text in self.said for line in text.splitlines()]


def disturbed(run: Run, fault: Planted, folder: Path, *, with_all: bool = False, **sections: Any) -> Ended:
    """Start it with the fault, and wait for its end.

    Args:
        with_all: as soon as the faulty rank has ended, all are killed.
        sections: of the configuration.
    """
    fault = replace(fault, root=str(run.root))
    arguments = [json.dumps(asdict(fault)), str(folder / "counts"), "run", str(run.config(**sections))]
    processes = start(run.ranks, ["-m", "harness.fault_worker", *arguments])
    try:
        if with_all:
            processes[fault.rank].wait(300)
            for process in processes:
                process.kill()
        alive = [rank for rank in range(run.ranks) if not (fault.what == "stop" and rank == fault.rank)]
        for rank in alive:
            processes[rank].wait(300)
        said = [process.said() for process in processes]
        return Ended([process.poll() for process in processes], said)
    finally:
        for process in processes:
            process.kill()


def point(of: Undisturbed, rank: int, event: str, share: float) -> int:
    """Which of the events of a rank it is, from 1."""
    return 1 + int(share * of.counts[rank][event])


def shares(kind: str, count: int) -> list[float]:
    """Of the way through a run: spread, but not evenly, and always the same."""
    generator = random.Random(kind)
    return [(number + generator.random()) / count for number in range(count)]


def go_on(run: Run, expected: dict[str, Any], **sections: Any) -> int:
    """Start it again, undisturbed: it ends as if nothing had happened; how many steps had to be taken again."""
    done = run.steps_done
    again = adept(run.ranks, "run", run.config(**sections))
    assert again.returncode == 0, again.stderr
    assert_same(run.results(), expected)
    assert leftovers(run.root) == []
    match = re.search(r"resuming after step (\d+)", again.stdout)
    if "finished before, not run again" in again.stdout:
        return 0
    return done - (int(match[1]) if match else 0)


def leftovers(root: Path) -> list[str]:
    return [str(path) for path in root.rglob("*") if re.search(r"\.(tmp|part)$", path.name)]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last bit."""
    weights, wanted = found["weights"], expected["weights"]
    assert weights.keys() == wanted.keys()
    different = [name for name, tensor in wanted.items() if not torch.equal(weights[name], tensor)]
    assert not different
    for key, value in expected.items():
        assert key == "weights" or found[key] == value, key
