"""Equal time: what a step takes is measured before the study, alone, and what a method needs beside steps counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.made_up_run import write_lines
from harness.tiny_study import TinyStudy
from harness.workspace import Workspace

from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import RunSummary
from adept_ds.study.budget import Rate
from adept_ds.study.rates import rate_of


def test_a_rate_is_the_median_after_the_warm_up(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    seconds = [90.0] * 5 + [1.0, 2.0, 50.0, 3.0, 2.0]
    step = {"loss": 1.0, "tokens": 8, "tokens_per_second": 8.0, "mfu": 0.1}
    lines = [{"step": 0, "refresh_seconds": 4.0}]
    lines += [step | {"step": number, "seconds": took} for number, took in enumerate(seconds, start=1)]
    lines += [{"step": number, "refresh_seconds": took} for number, took in ((3, 5.0), (6, 7.0), (9, 9.0))]
    write_lines(run.metrics, lines)
    write_json(run.summary, {"preparation_seconds": 11.0})
    assert rate_of(run) == Rate(step_seconds=2.0, refresh_seconds=7.0, preparation_seconds=15.0)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> TinyStudy:
    study = TinyStudy(tmp_path_factory.mktemp("timed"), workspace.model)
    study.write_texts()
    seeds = {"search": [0], "confirm": []}
    base = study.tree()["base"]
    base["train"]["checkpoint_every"] = 10_000  # 3 seconds are a hundred steps
    base["guard"] = {"action": "warn"}  # it needs held-out text, of which a measurement has none
    changes = {"learning_rates": [1e-3], "seeds": seeds, "keep": "results", "evaluation": {"sequences": 64}}
    study.write(base=base, budget={"seconds": 3.0}, **changes)
    process = study.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return study


def test_every_method_gets_the_steps_that_fit(timed: TinyStudy) -> None:
    measured = read_json(timed.study_dir / "rates" / "rates.json")["variants"]
    assert measured.keys() == {"full", "adept"}
    for name, every in (("full", None), ("adept", 2)):
        rate = Rate(**measured[name]["rate"])
        config = timed.cells()[f"{name}_lr0.001_seed0"] / "config.yaml"
        assert f"\n  steps: {rate.steps_within(3.0, every)}\n" in config.read_text()
    assert measured["adept"]["rate"]["probe_seconds"] > 0
    assert measured["adept"]["rate"]["refresh_seconds"] > 0
    assert measured["full"]["rate"]["probe_seconds"] == measured["full"]["rate"]["refresh_seconds"] == 0


def test_the_page_states_rates_and_lengths(timed: TinyStudy) -> None:
    description = json.loads((timed.study_dir / "compare.json").read_text())["description"]
    assert "3 seconds each" in description["budget"]
    for name in ("full", "adept"):
        assert any(note.startswith(f"{name}: ") and "s a step" in note for note in description["facts"])
        steps = RunSummary.load(timed.cells()[f"{name}_lr0.001_seed0"] / "summary.json").steps
        assert any(note == f"{name}: {steps:,} steps of 128 tokens." for note in description["facts"])


def test_rates_are_measured_once(timed: TinyStudy) -> None:
    """So the cells of a study that goes on are the same ones."""
    rates, cells = timed.study_dir / "rates" / "rates.json", set(timed.cells().values())
    before = rates.stat().st_mtime_ns
    process = timed.start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "2 cells, 2 of them finished before" in out
    assert rates.stat().st_mtime_ns == before
    assert set(timed.cells().values()) == cells


def test_results_are_kept_without_weights(timed: TinyStudy) -> None:
    for run in timed.cells().values():
        assert not any((run / name).exists() for name in ("checkpoints", "export", "expanded"))
        assert (run / "document_losses.safetensors").is_file()
