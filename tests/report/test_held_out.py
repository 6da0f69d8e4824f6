"""What the report shows of held-out text: sources where there are several, positions of the dial, questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import write_evaluation, write_importance

from adept_ds.report.held_out import answer_rows, dial_rows, loss_rows
from adept_ds.report.page import write_report
from adept_ds.report.run_files import RunFiles, read_run


def corpus(loss: float, **sources: dict[str, Any]) -> dict[str, Any]:
    return {"loss": loss, "tokens": 30, "documents": 3, "sources": sources}


def evaluation() -> dict[str, Any]:
    one, two = {"loss": 2.0, "tokens": 10}, {"loss": 3.5, "tokens": 20}
    asked = {"questions": 8, "accuracy": 0.25, "accuracy_norm": 0.5}
    better = {"accuracy": 0.5, "accuracy_norm": 0.375, "loss": 3.0}
    return {
        "base": {"general": corpus(3.0, one=one, two=two | asked), "domain": corpus(2.0, only=one)},
        "adapted": {"general": corpus(2.5, one=one, two=two | asked | better), "domain": corpus(1.5, only=one)},
        "dial": [{"alpha": alpha, "corpora": {"domain": {"loss": 2 - alpha / 2}}} for alpha in (0.75, 0.25)],
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    write_importance(tmp_path)  # without which there is no run
    return read_run(tmp_path)


def test_sources_have_rows_where_a_corpus_has_several(run: RunFiles) -> None:
    assert [tuple(row) for row in loss_rows(run)] == [
        ("general", 3.0, 2.5, 30, False),
        ("one", 2.0, 2.0, 10, True),
        ("two", 3.5, 3.0, 20, True),
        ("domain", 2.0, 1.5, 30, False),
    ]


def test_the_dial_goes_from_base_to_adapted_model(run: RunFiles) -> None:
    rows = dial_rows(run)
    assert [row.alpha for row in rows] == [0, 0.25, 0.75, 1]
    assert [row.losses["domain"] for row in rows] == [2.0, 1.875, 1.625, 1.5]


def test_answers_to_questions_have_rows(run: RunFiles) -> None:
    assert [tuple(row) for row in answer_rows(run)] == [
        ("general: two, right", 8, 0.25, 0.5),
        ("general: two, right by length", 8, 0.5, 0.375),
    ]


@pytest.mark.usefixtures("no_figures")
def test_the_page_shows_all_of_them(run: RunFiles, tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("<body") :]))
    for row in (
        "two 3.5000 3.0000 \u22120.5000",
        "general: two, right 25.0% 50.0% +25.0% 8",
        "right by length 50.0% 37.5% \u221212.5%",
    ):
        assert row in words, row
    assert re.search(r"0\.75\s+1\.6250", words)


@pytest.mark.usefixtures("no_figures")
def test_without_any_of_it_the_page_is_as_it_was(tmp_path: Path) -> None:
    """Runs that were evaluated before there were sources."""
    write_evaluation(tmp_path, 2.21)
    write_importance(tmp_path)
    run = read_run(tmp_path)
    assert [row.title for row in loss_rows(run)] == ["general", "domain"]
    assert dial_rows(run) == [] and list(answer_rows(run)) == []
    assert "turned down" not in write_report(tmp_path).read_text(encoding="utf-8")
