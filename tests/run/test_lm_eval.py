"""An export is a model that the evaluation harness takes as it is: by its own command line, offline, on a new task."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.own_task import expected_scores, needs_lm_eval, scored_by_the_command_line
from harness.trained_run import TrainedRun

pytestmark = needs_lm_eval


def test_the_harness_own_command_line_scores_an_export_offline(trained_run: TrainedRun, tmp_path: Path) -> None:
    accuracy, right = scored_by_the_command_line(trained_run.files.export, tmp_path)
    expected = expected_scores(trained_run.files.export)
    assert right == expected
    assert accuracy == pytest.approx(sum(expected) / len(expected))
