"""The report shows what a run gained for what it forgot, over time, where a guard looked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from harness.made_up_run import make_run, page_of, words, write_lines
from matplotlib.figure import Figure

from adept_ds.report.figures import FIGURES
from adept_ds.report.run_files import read_run


def guard_line(step: int, domain: float, **rises: float) -> dict[str, Any]:
    general = {name: {"rise": of, "lower": of - 0.01, "upper": of + 0.01} for name, of in rises.items()}
    forgotten = any(of - 0.01 > 0.02 for of in rises.values())
    return {"step": step, "guard": {"general": general, "domain": domain, "forgotten": forgotten}}


LINES = [guard_line(0, 1.9, web=0.0, facts=0.0), guard_line(50, 1.7, web=0.015, facts=-0.02)]
LINES += [guard_line(100, 1.6, web=0.05, facts=0.01)]


def guarded(run_dir: Path) -> Path:
    run = make_run(run_dir)
    with (run / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("guard: {max_general_rise: 0.02, action: stop}\n")
    write_lines(run / "metrics.jsonl", LINES)
    return run


def test_gain_and_rises_are_drawn_with_the_limit_and_what_was_forgotten(tmp_path: Path) -> None:
    figure = Figure()
    FIGURES["guard"](read_run(guarded(tmp_path / "run")), figure)
    domain, general = (cast(Any, axes) for axes in figure.axes)
    assert [list(line.get_ydata()) for line in domain.lines] == [[1.9, 1.7, 1.6]]
    drawn: dict[str, Any] = {str(line.get_label()): line for line in general.lines}
    assert drawn.keys() == {"max_general_rise (0.02)", "web", "facts", "found forgotten"}
    assert list(drawn["web"].get_ydata()) == [0.0, 0.015, 0.05]
    assert list(drawn["max_general_rise (0.02)"].get_ydata()) == [0.02, 0.02]
    ((x, y),) = drawn["found forgotten"].get_xydata().tolist()
    assert (x, round(y, 6)) == (100, 0.04)
    assert len(general.collections) == 2, "a band for each source"


@pytest.mark.usefixtures("no_figures")
def test_the_page_has_it_where_there_was_a_guard_and_only_there(tmp_path: Path) -> None:
    assert "What the guard saw" in words(page_of(guarded(tmp_path / "run")))
    assert "What the guard saw" not in page_of(make_run(tmp_path / "other"))
