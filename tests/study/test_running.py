"""A whole study, and one that is killed and goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.inprocess import run_here
from harness.launching import ROOT
from harness.tiny_study import TinyStudy
from harness.workspace import Workspace

SEARCHED = {f"{method}_lr{lr:g}_seed0" for method in ("full", "adept") for lr in (1e-3, 2e-3)}


def make_study(root: Path, workspace: Workspace, **changes: object) -> TinyStudy:
    study = TinyStudy(root, workspace.model)
    study.write_texts()
    study.write(**changes)
    return study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> TinyStudy:
    """Run to its end at once."""
    study = make_study(tmp_path_factory.mktemp("finished"), workspace)
    process = study.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return study


def test_every_rate_is_searched_and_the_best_get_more_seeds(finished: TinyStudy) -> None:
    cells = finished.cells()
    confirmed = cells.keys() - SEARCHED
    assert cells.keys() >= SEARCHED
    assert {name.partition("_")[0] for name in confirmed} == {"full", "adept"}
    assert all(name.endswith("_seed1") for name in confirmed)
    comparison = json.loads((finished.study_dir / "compare.json").read_text())
    for arm in comparison["arms"]:
        best = {f"{arm['name']}_lr{point['lr']:g}_seed1" for point in arm["chosen"].values() if point and point["lr"]}
        assert best & confirmed
    assert (finished.study_dir / "compare.html").is_file()


def test_every_cell_is_a_run_that_anyone_can_repeat(finished: TinyStudy) -> None:
    """`adept run` on a cell's configuration finds everything done but what was thrown away on purpose."""
    run = finished.cells()["full_lr0.001_seed0"]
    result = subprocess.run(
        [sys.executable, "-m", "adept_ds", "show", str(run / "config.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "validation/domain" in result.stdout
    assert not (run / "checkpoints").exists()
    assert (run / "export" / "model.safetensors").is_file()


def test_what_cells_have_in_common_is_done_once(finished: TinyStudy) -> None:
    """The probe by the first that probes, tokens and the base's losses by the first of all: others find it done."""
    probed = {name for name, count in finished.said("unchanged, not run again").items() if count}
    assert probed == {name for name in finished.cells() if name.startswith("adept")} - {"adept_lr0.001_seed0"}
    inodes: dict[str, set[int]] = {}
    for run in finished.cells().values():
        shared = ("document_losses_base.safetensors", "evaluation_base.json", "task_scores_base.json")
        for file in (file for pattern in (*shared, "cache/tokens/*/*.bin") for file in run.glob(pattern)):
            inodes.setdefault(str(file.relative_to(run)), set()).add(file.stat().st_ino)
    assert len(inodes) > 10
    assert {name for name, found in inodes.items() if len(found) > 1} == set()


def test_scores_on_tasks_are_compared(finished: TinyStudy) -> None:
    comparison = json.loads((finished.study_dir / "compare.json").read_text())
    assert set(comparison["base_scores"]) == {"quiz.jsonl"}
    for trial in comparison["trials"]:
        scores = json.loads((finished.study_dir / trial["run_dir"] / "task_scores.json").read_text())["models"]
        assert comparison["base_scores"] == scores["base"]
        assert trial["scores"] == {"0.5": scores["alpha=0.5"], "1": scores["adapted"]}
    assert "quiz.jsonl: accuracy_norm" in (finished.study_dir / "compare.html").read_text()


def test_a_cell_that_was_killed_before_it_was_asked_is_not_finished(tmp_path: Path, finished: TinyStudy) -> None:
    shutil.copytree(finished.root, tmp_path / "copy")
    study = TinyStudy(tmp_path / "copy", finished.model)
    study.write()
    study.cells()["full_lr0.001_seed0"].joinpath("task_scores.json").unlink()
    plan = run_here(["compare", str(study.file), "--dry-run"], ROOT).out
    assert f"1 of {len(study.cells())} cells to run" in plan


def test_a_finished_study_runs_nothing_again(finished: TinyStudy) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.study_dir.rglob("metrics.jsonl")}
    process = finished.start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "4 cells, 4 of them finished before" in out
    assert before == {path: path.stat().st_mtime_ns for path in finished.study_dir.rglob("metrics.jsonl")}


@pytest.mark.slow
def test_a_killed_study_goes_on_and_runs_nothing_twice(
    tmp_path: Path, workspace: Workspace, finished: TinyStudy
) -> None:
    """SIGKILL in the middle of a cell, SIGTERM in another: the run in progress writes a checkpoint, and every step of
    every cell is trained once; results are those of the study that nobody disturbed."""
    study = make_study(tmp_path, workspace)
    for number, name, code in (
        (signal.SIGKILL, "full_lr0.002_seed0", -signal.SIGKILL),
        (signal.SIGTERM, "adept_lr0.001_seed0", 3),
    ):
        process = study.start()
        wait_for_step(study, name)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    process = study.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    steps = study.steps_run()
    assert set(steps.values()) == {1}
    assert len(steps) == 4 * len(finished.cells())
    assert study.cells().keys() == finished.cells().keys()
    assert sum(study.said("resuming after step").values()) >= 1
    assert numbers_of(study) == pytest.approx(numbers_of(finished), abs=1e-12)


def numbers_of(study: TinyStudy) -> dict[str, float]:
    """All results; names of cells depend on contents alone, which are the same."""
    found: dict[str, float] = {}

    def collect(key: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(f"{key}/{name}", inner)
        elif isinstance(value, int | float):
            found[key] = value

    collect("", dict(study.losses()))
    return found


def wait_for_step(study: TinyStudy, name: str, timeout: float = 120.0) -> None:
    """Until a cell has trained a step and its checkpoint is there."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        run = study.cells().get(name)
        if run is not None and list(run.glob("checkpoints/step_*/manifest.json")):
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} has not trained a step; there are {list(study.cells())}")


def test_a_cell_that_fails_does_not_end_the_study(tmp_path: Path, workspace: Workspace) -> None:
    """It is named at the end, with its last words, and tried again by the next command. `--only` runs nothing else."""
    study = make_study(tmp_path, workspace, reference="adept", seeds={"search": [0], "confirm": []})
    config = Path(run_here(["compare", str(study.file), "--cell", "search:0"], ROOT).out.strip())
    in_the_way = config.with_name("checkpoints")
    in_the_way.write_text("not a directory\n")
    process = study.start("--only", "full")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "1 cells failed: full, learning rate 0.001, seed 0" in err
    failure = config.with_name("failure.json")
    assert json.loads(failure.read_text())["code"] == 2
    assert "a directory of the run belongs; move it away" in json.loads(failure.read_text())["reason"]
    page = (study.study_dir / "compare.html").read_text()
    assert "Failed: full, learning rate 0.001, seed 0" in page
    assert "adept, which others are to be compared with, has no finished cell." in page

    in_the_way.unlink()
    process = study.start("--only", "full")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert not failure.exists()
    assert study.cells().keys() == {"full_lr0.001_seed0", "full_lr0.002_seed0"}
    assert set(study.steps_run().values()) == {1}
