"""A study as jobs of Slurm: what is submitted, and which cell a task is."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.inprocess import Ended, run_here
from harness.launching import ROOT
from harness.shell_scripts import complaints
from harness.tiny_study import TinyStudy
from harness.workspace import Workspace

from adept_ds.study.submission import ranges

SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
printf '%s;cluster\\n' "$((100 + $(wc -l <"$CALLS")))"
"""


@pytest.fixture
def study(tmp_path: Path, workspace: Workspace) -> TinyStudy:
    found = TinyStudy(tmp_path, workspace.model)
    found.write_texts()
    found.write(slurm={"options": ["--partition=gpu", "--comment=two words"], "at_once": 2})
    return found


def compare(study: TinyStudy, *arguments: str, **env: str) -> Ended:
    ended = run_here(["compare", str(study.file), *arguments], ROOT, **env)
    assert ended.code == 0, ended.err
    return ended


def finish(study: TinyStudy, *names: str) -> None:
    """Begin all cells of the search, and leave what tells that these have finished."""
    for index in range(4):
        compare(study, "--cell", f"search:{index}")
    for name in names:
        for file in ("evaluation.json", "document_losses.safetensors", "task_scores.json"):
            (study.cells()[name] / file).write_text("{}")


def jobs(study: TinyStudy) -> dict[str, dict[str, Any]]:
    found = json.loads(compare(study, "--submit", "--dry-run", "--json").out)
    assert found["ids"] == {}
    return {job["name"]: job for job in found["jobs"]}


def test_what_others_share_is_made_first_and_the_page_last(study: TinyStudy) -> None:
    """Cells in the order full, full, adept, adept: one of each begins, since their probes differ."""
    found = jobs(study)
    assert {name: job["array"] for name, job in found.items()} == {
        "leaders": "0,2",
        "search": "1,3",
        "confirm": "0-3",
        "report": None,
    }
    assert [job["after"] for job in found.values()] == [None, "leaders", "search", "confirm"]


def test_finished_cells_are_not_submitted(study: TinyStudy) -> None:
    finish(study, "full_lr0.001_seed0", "adept_lr0.002_seed0")
    found = jobs(study)
    waiting = [cell for name in ("leaders", "search") if name in found for cell in found[name]["cells"]]
    assert {cell.rpartition("_")[0] for cell in waiting} == {"full_lr0.002_seed0", "adept_lr0.001_seed0"}
    arrays = ",".join(found[name]["array"] for name in ("leaders", "search") if name in found)
    assert set(arrays.split(",")) in ({"1", "2"}, {"1-2"})


def test_jobs_are_handed_to_sbatch_in_a_chain(study: TinyStudy, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    calls = tmp_path / "calls"
    ended = compare(study, "--submit", "--json", CALLS=str(calls), PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    script = study.study_dir / "slurm" / "study.sbatch"
    assert calls.read_text().splitlines() == [
        f"--parsable --array=0,2%2 {script} search",
        f"--parsable --dependency=afterany:101 --array=1,3%2 {script} search",
        f"--parsable --dependency=afterany:102 --array=0-3%2 {script} confirm",
        f"--parsable --dependency=afterany:103 {script} report",
    ]
    assert json.loads(ended.out)["ids"] == {"leaders": "101", "search": "102", "confirm": "103", "report": "104"}


def test_without_slurm_it_is_said(study: TinyStudy) -> None:
    ended = run_here(["compare", str(study.file), "--submit"], ROOT, PATH="/nowhere")
    assert ended.code == 2
    assert "sbatch cannot be started" in ended.err


def test_the_script_is_sound_and_has_the_sites_options(study: TinyStudy) -> None:
    compare(study, "--submit", "--dry-run", "--scale", "2", "seeds.search=[0, 3]")
    script = study.study_dir / "slurm" / "study.sbatch"
    assert not complaints(script)
    text = script.read_text()
    assert '#SBATCH --partition=gpu\n#SBATCH --comment="two words"\n' in text
    assert "'seeds.search=[0, 3]' --scale=2)" in text
    assert text.index("#SBATCH --comment") < text.index("set -euo pipefail")


def test_a_task_runs_its_cell_as_a_job(study: TinyStudy) -> None:
    """With a stand-in for `adept job` that only says which configuration it was given."""
    compare(study, "--submit", "--dry-run")
    script = study.study_dir / "slurm" / "study.sbatch"
    text = script.read_text()
    runs = f"exec {shlex.quote(sys.executable)} -m adept_ds job "
    assert runs in text
    script.write_text(text.replace(runs, "exec printf '%s\\n' "))
    result = subprocess.run(
        ["bash", str(script), "search"],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "3"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    config = study.cells()["adept_lr0.002_seed0"] / "config.yaml"
    assert result.stdout == f"{config}\n"
    assert config.is_file()


def test_a_task_that_is_not_needed_has_nothing_to_run(study: TinyStudy) -> None:
    """A finished cell, an index beyond the plan, and further seeds while no search has finished."""
    finish(study, "full_lr0.001_seed0")
    assert compare(study, "--cell", "search:0").out.strip() == ""
    assert compare(study, "--cell", "search:4").out.strip() == ""
    assert compare(study, "--cell", "search:1").out.strip() != ""


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7"), (list(range(100)), "0-99")]
)
def test_indices_are_written_as_sbatch_takes_them(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text
