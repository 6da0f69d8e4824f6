"""What a run has kept, and how many starts of a job have kept nothing new."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from harness.finished_run import Finished
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory
from adept_ds.run.requeues import Kept, Requeues


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_every_thing_that_a_next_start_goes_on_with_is_farther(run: RunDirectory) -> None:
    """In the order in which a run keeps them; works go where their stage has finished, and do not lead back."""
    found = [Kept.by(run)]
    write(run.tokens / "domain-1" / "so_far.json", {"tokens": 5})
    found.append(Kept.by(run))
    write(run.tokens / "domain-1" / "so_far.json", {"tokens": 9})
    found.append(Kept.by(run))
    work = run.unfinished / "probe" / "probing" / "steps.json"
    write(work, {"steps": 3, "seconds": 1.0})
    found.append(Kept.by(run))
    write(work, {"steps": 4, "seconds": 1.0})
    found.append(Kept.by(run))
    work.unlink()
    write(run.ledger, {"probe": {}})
    found.append(Kept.by(run))
    write(run.expansion, {})
    found.append(Kept.by(run))
    for step in (20, 40):
        write(run.checkpoints / f"step_{step}" / "manifest.json", {})
        found.append(Kept.by(run))
    assert all(later > earlier for earlier, later in itertools.pairwise(found))


def test_what_is_computed_and_not_kept_is_nothing(run: RunDirectory) -> None:
    """A line in the log of a step behind the last checkpoint, and a checkpoint that was not finished."""
    before = Kept.by(run)
    write(run.metrics, {"step": 7, "loss": 1.0})
    (run.checkpoints / "step_8").mkdir(parents=True)
    assert Kept.by(run) == before


def test_damaged_files_count_for_nothing(run: RunDirectory) -> None:
    for file in (run.ledger, run.tokens / "a" / "manifest.json", run.unfinished / "probe" / "b" / "steps.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{\xff")
    run.requeues.write_text("[]")
    assert Kept.by(run) == Kept()
    assert Requeues.of("7", run).fruitless == 0


def ended(run: RunDirectory, job: str) -> int:
    """A start of the job that ends with what the directory holds now."""
    after = Requeues.of(job, run).after(Kept.by(run))
    after.save(run.requeues)
    return after.fruitless


def test_starts_that_keep_nothing_new_are_counted_until_one_does(run: RunDirectory) -> None:
    assert [ended(run, "7"), ended(run, "7")] == [1, 2]
    before = Requeues.of("7", run)
    write(run.checkpoints / "step_20" / "manifest.json", {})
    after = before.after(Kept.by(run))
    assert (after.fruitless, after.farthest.step) == (0, 20)
    after.save(run.requeues)
    assert ended(run, "7") == 1


def test_a_job_that_is_submitted_anew_begins_to_count_anew(run: RunDirectory) -> None:
    assert [ended(run, "7"), ended(run, "7"), ended(run, "8")] == [1, 2, 1]


def test_going_back_and_forth_is_no_progress(run: RunDirectory) -> None:
    """A checkpoint that gets lost and is written again, for ever."""
    checkpoint = run.checkpoints / "step_20" / "manifest.json"
    write(checkpoint, {})
    assert ended(run, "7") == 1
    for _ in range(2):
        checkpoint.unlink()
        before = Requeues.of("7", run)
        write(checkpoint, {})
        after = before.after(Kept.by(run))
        after.save(run.requeues)
    assert after.fruitless == 3


def test_a_finished_run_has_kept_all_of_it(whole_run: Finished) -> None:
    """Of a real one, whatever its files are called."""
    kept = Kept.by(RunDirectory(whole_run.directory))
    assert (kept.step, kept.work_steps) == (2, 0)
    assert kept.stages >= 4  # probe, expansion, export, evaluation
    assert kept.tokens > 1000


@pytest.fixture(scope="module")
def whole_run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    from harness.launching import adept

    root = tmp_path_factory.mktemp("whole") / "run"
    result = adept(1, "run", workspace.config(root, train={"steps": 2, "checkpoint_every": 1, "eval_every": 2}))
    assert result.returncode == 0, result.stderr
    return Finished(root)
