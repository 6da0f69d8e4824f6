"""How units moved against their importance, from logs that were made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import interval, moved, write_lines

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.report.diagnosis_units import unit_courses


def refresh(step: int, **importance: float | None) -> dict[str, Any]:
    return {"step": step, "units": [{"unit": u, "kind": "matrix", "importance": i, "multiplier": 1.0}
                                    for u, i in importance.items()]}  # fmt: skip


def write_run(run_dir: Path, distances: dict[str, float], importance: dict[str, float], kind: str = "matrix") -> None:
    units = [moved(name, 1.0, distance, distance, kind=kind) for name, distance in distances.items()]
    write_lines(run_dir / "unit_movement.jsonl", [interval(0, 10, *units)])
    write_lines(run_dir / "unit_importance.jsonl", [refresh(0, **importance)])


def against(run_dir: Path) -> dict[str, float | None]:
    return {course.unit: course.against for course in unit_courses(RunDirectory(run_dir))}


IMPORTANCE = {"a": 1e-9, "b": 1e-6, "c": 1e-3}


def test_where_the_important_moves_the_less_all_is_in_balance(tmp_path: Path) -> None:
    """However far apart importances are: ranks decide."""
    write_run(tmp_path, {"a": 9.0, "b": 0.5, "c": 0.1}, IMPORTANCE)
    assert against(tmp_path) == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_the_most_important_that_moves_farthest_has_one_and_its_opposite_minus_one(tmp_path: Path) -> None:
    write_run(tmp_path, {"a": 0.1, "b": 0.5, "c": 9.0}, IMPORTANCE)
    assert against(tmp_path) == {"a": -1.0, "b": 0.0, "c": 1.0}


def test_equal_changes_share_their_rank(tmp_path: Path) -> None:
    write_run(tmp_path, {"a": 1.0, "b": 1.0, "c": 1.0}, IMPORTANCE)
    assert against(tmp_path) == {"a": -0.5, "b": 0.0, "c": 0.5}


def test_change_is_per_element(tmp_path: Path) -> None:
    units = [moved("a", 1.0, 3.0, 3.0, numel=9), moved("b", 1.0, 3.0, 3.0, numel=900)]
    write_lines(tmp_path / "unit_movement.jsonl", [interval(0, 10, *units)])
    assert {c.unit: c.change for c in unit_courses(RunDirectory(tmp_path))} == {"a": 1.0, "b": 0.1}


def test_norms_are_ranked_among_norms(tmp_path: Path) -> None:
    units = [moved(n, 1.0, d, d, kind=kind) for n, d, kind in
             [("a", 1.0, "matrix"), ("b", 2.0, "matrix"), ("n", 50.0, "norm"), ("m", 60.0, "norm")]]  # fmt: skip
    write_lines(tmp_path / "unit_movement.jsonl", [interval(0, 10, *units)])
    write_lines(tmp_path / "unit_importance.jsonl", [refresh(0, a=1.0, b=2.0, n=9.0, m=8.0)])
    assert against(tmp_path) == {"a": -1.0, "b": 1.0, "n": 0.0, "m": 0.0}


def test_multipliers_and_importances_are_means_over_the_steps_in_which_they_held(tmp_path: Path) -> None:
    """10 steps without importances, 20 after the first refresh, 70 after the second."""
    held = ((0, 10, 1.0), (10, 30, 0.5), (30, 100, 2.0))
    lines = [interval(since, step, moved("a", multiplier, 1.0, 1.0)) for since, step, multiplier in held]
    write_lines(tmp_path / "unit_movement.jsonl", lines)
    write_lines(tmp_path / "unit_importance.jsonl", [refresh(10, a=9.0), refresh(30, a=0.9)])
    (course,) = unit_courses(RunDirectory(tmp_path))
    assert course.multiplier == pytest.approx(0.1 * 1.0 + 0.2 * 0.5 + 0.7 * 2.0)
    assert course.importance == pytest.approx((20 * 9.0 + 70 * 0.9) / 90)


def test_a_run_without_importances_has_changes_and_no_conflict(tmp_path: Path) -> None:
    write_lines(tmp_path / "unit_movement.jsonl", [interval(0, 10, moved("a", 1.0, 2.0, 2.0))])
    (course,) = unit_courses(RunDirectory(tmp_path))
    assert (course.importance, course.against, course.change) == (None, None, 1.0)


def test_steps_that_were_run_again_count_once(tmp_path: Path) -> None:
    lines = [interval(0, 10, moved("a", 0.0, 1.0, 1.0)), interval(10, 20, moved("a", 0.0, 1.0, 1.0)),
             interval(10, 20, moved("a", 2.0, 4.0, 4.0))]  # fmt: skip
    write_lines(tmp_path / "unit_movement.jsonl", lines)
    (course,) = unit_courses(RunDirectory(tmp_path))
    assert (course.multiplier, course.change) == (1.0, 2.0)


def test_weights_that_overflowed_are_left_out(tmp_path: Path) -> None:
    units = [moved("a", 1.0, 1.0, 1.0), moved("b", 1.0, 1.0, 1.0) | {"moved_since_start": None}]
    write_lines(tmp_path / "unit_movement.jsonl", [interval(0, 10, *units)])
    assert [course.unit for course in unit_courses(RunDirectory(tmp_path))] == ["a"]


def test_no_log_is_no_unit_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    assert unit_courses(RunDirectory(tmp_path)) == ()
    lines = [interval(0, 10, moved("a", 1.0, 1.0, 1.0)), {"step": "ten"}, {"step": 20, "since": 10, "units": []}]
    (tmp_path / "unit_movement.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"unit_movement.jsonl' line 2 is damaged"):
        unit_courses(RunDirectory(tmp_path))
