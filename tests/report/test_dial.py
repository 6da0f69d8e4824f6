"""What the report shows of the dial: the front, what was chosen and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import make_run, page_of, words

from adept_ds.base.errors import InputError
from adept_ds.report.dial_rows import Cost, position_rows
from adept_ds.report.run_files import read_run


def half(domain: float, rise: float, limit: float) -> dict[str, Any]:
    return {
        "general": {"wiki": {"loss": 2.0, "rise": rise, "limit": limit}, "<exams>": {"rise": -1.0, "limit": -0.9}},
        "domain": {"loss": domain, "rise": -0.1, "limit": -0.05},
    }


def dial() -> dict[str, Any]:
    positions = [
        {"alphas": [0.0, 0.0], "keeps": True, "validation": half(3.0, 0, 0), "test": half(3.1, 0, 0)},
        {"alphas": [1.0, 1.0], "keeps": False, "validation": half(2.0, 0.2, 0.3), "test": half(2.1, 0.1, 0.25)},
        {"alphas": [0.5, 1.0], "keeps": True, "validation": half(2.5, -0.1, -0.02), "test": half(2.6, -0.03, -0.01)},
    ]
    return {
        "kind": "copies",
        "sources": [3, 7],
        "max_general_rise": 0.0,
        "confidence": 0.95,
        "positions": positions,
        "chosen": [0.5, 1.0],
        "reason": "lowest domain loss of <all> that keep it",
        "promise": "general text: no worse than the base (rise -0.030, 95% limit -0.010)",
        "seconds": 12.5,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = make_run(tmp_path / "run")
    (directory / "dial.json").write_text(json.dumps(dial()))
    return directory


def test_positions_have_what_they_gain_and_what_they_cost_the_source_that_loses_most(run_dir: Path) -> None:
    rows = position_rows(read_run(run_dir))
    assert [(row.label, row.keeps, row.chosen, row.together) for row in rows] == [
        ("0", True, False, True),
        ("1", False, False, True),
        ("0.5, 1", True, True, False),
    ]
    assert rows[1].test == Cost(2.1, 0.1, 0.25) and rows[2].validation == Cost(2.5, -0.1, -0.02)


def test_the_page_says_what_was_chosen_and_why_beside_the_front(run_dir: Path) -> None:
    page = page_of(run_dir)
    section = page.split('<section id="dial"')[1].split("</section>")[0]
    assert "<svg" in section
    text = words(section)
    for part in (
        "general text: no worse than the base (rise -0.030, 95% limit -0.010)",
        "Chosen (of each copy, lowest first): alpha 0.5, 1; lowest domain loss of &lt;all&gt; that keep it.",
        "0.5, 1 (chosen) 2.5000 \u22120.1000 \u22120.0200 2.6000 \u22120.0300 \u22120.0100",
        "Limits are one-sided, at 95% confidence",
        "The dial took 12.5 s.",
    ):
        assert part in text, text


@pytest.mark.usefixtures("no_figures")
def test_without_a_dial_the_page_has_no_word_of_it(tmp_path: Path) -> None:
    assert '<section id="dial"' not in page_of(make_run(tmp_path / "run"))


def test_a_position_without_all_its_losses_is_left_out(run_dir: Path) -> None:
    tree = dial()
    tree["positions"][0]["test"]["domain"] = {}
    tree["positions"][1]["validation"]["general"] = {}
    (run_dir / "dial.json").write_text(json.dumps(tree))
    assert [row.label for row in position_rows(read_run(run_dir))] == ["0.5, 1"]
    page_of(run_dir)


@pytest.mark.parametrize("change", [{"positions": [{"alphas": []}]}, {"positions": "x"}, {"chosen": "0.5"}], ids=str)
def test_a_damaged_record_is_named(run_dir: Path, change: dict[str, Any]) -> None:
    (run_dir / "dial.json").write_text(json.dumps(dial() | change))
    with pytest.raises(InputError, match=r"dial\.json: .*put it aside"):
        read_run(run_dir)
