"""What a trial cost: what it says itself, or what its method takes where nothing else runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.made_up_run import write_lines
from harness.made_up_study import FOUR, write_trial

from adept_ds.comparison.trials import Timing, Trial, read_cell

LOSSES = {model: {source: [2.0, 2.0] for source in FOUR} for model in ("base", "adapted")}
STEP = {"loss": 2.0, "tokens_per_second": 512.0, "mfu": 0.1}


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Two steps, the second slow since the machine did something else, and refreshes before them and between."""
    summary = {"tokens": 2048, "seconds": 107.0, "tokens_per_second": 100.0}
    summary |= {"preparation_seconds": 5.0, "overhead_seconds": 10.0}
    trial = Trial(label="adept", lr=1e-3, seed=0, run_dir=tmp_path / "cell", shared_seconds=30.0)
    write_trial(trial, dict.fromkeys(FOUR, (2, 4)), LOSSES, summary=summary)
    write_lines(
        trial.run_dir / "metrics.jsonl",
        [
            {"step": 0, "refresh_seconds": 3.0},
            {"step": 1, "tokens": 1024, "seconds": 8.0, **STEP},
            {"step": 1, "refresh_seconds": 2.0},
            {"step": 2, "tokens": 2048, "seconds": 99.0, **STEP},
        ],
    )
    return trial


def test_without_another_measurement_it_is_what_the_trial_itself_took(trial: Trial) -> None:
    cell = read_cell(trial)
    assert cell.training.seconds.tolist() == [30 + 5 + 3 + 8, 30 + 5 + 3 + 8 + 2 + 99]
    assert (cell.summary.seconds, cell.summary.overhead_seconds, cell.summary.tokens_per_second) == (107.0, 10.0, 100.0)


def test_a_measurement_alone_stands_for_all_of_it(trial: Trial) -> None:
    """4 s a step, 1.5 s a refresh after the start, 20 s before the first step, the probe included."""
    timing = Timing(step_seconds=4.0, refresh_seconds=1.5, before_seconds=20.0)
    cell = read_cell(trial.model_copy(update={"timing": timing}))
    assert cell.training.seconds.tolist() == [20 + 4, 20 + 4 + 1.5 + 4]
    assert (cell.summary.seconds, cell.summary.overhead_seconds) == (8.0, 21.5)
    assert cell.summary.tokens_per_second == 2048 / 8
