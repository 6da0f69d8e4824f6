"""Files of a run that are broken, cut short or written twice: the report makes the best of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import (
    figures,
    interval,
    make_run,
    moved,
    page_of,
    refresh_line,
    step_line,
    words,
    write_lines,
)
from harness.marks import slow
from harness.spoiling import put

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory
from adept_ds.probing.result import LayerImportance
from adept_ds.report.page import write_report
from adept_ds.training.run_log import RunLog
from adept_ds.units.registry import Unit
from adept_ds.weights.expansion import Expansion


def test_nothing_to_report_is_an_input_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"adept run CONFIG") as caught:
            write_report(place)
        assert str(place) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_broken_json_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "layer_importance.json").write_text('{"layers": [', encoding="utf-8")
    with pytest.raises(InputError, match=r"layer_importance\.json.*adept run CONFIG"):
        write_report(tmp_path)


def test_line_cut_by_a_crash_and_continued_is_skipped(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 9.0}', '{"step": 2, "lo{"step": 2, "loss": 5.0}', '{"step": 3, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert "Training loss 9.00 → 1.00 over 2 steps." in words(page_of(tmp_path))


def test_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    lines = {
        "metrics.jsonl": step_line(1, random.Random(0)),
        "unit_importance.jsonl": refresh_line(0, random.Random(0)),
    }
    for name, line in lines.items():
        (tmp_path / name).write_bytes(json.dumps(line).encode() + b"\n" + '{"step": 101, "loss": 1.5, "é'.encode()[:-1])
    page = page_of(tmp_path)
    assert [name for name, drawn in figures(page).items() if drawn] == ["training", "units", "speed"]


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 9.0} for step in (1, 2, 3, 4)] + [{"step": step, "loss": 1.0} for step in (2, 3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert "Training loss 9.00 → 1.00 over 3 steps." in words(page_of(tmp_path))


def test_the_made_up_run_of_these_tests_has_the_records_that_a_run_writes(tmp_path: Path) -> None:
    """Were a key renamed in the program, the report would be tested against files that nobody writes any more."""
    made_up, written = RunDirectory(make_run(tmp_path / "made_up")), RunDirectory(tmp_path / "written")
    assert LayerImportance.load(made_up.layer_importance).measures
    assert Expansion.read(made_up.expanded).source_layers == 30
    written.root.mkdir()
    log, unit = RunLog(written, 0, ""), Unit("layers.1.a", "matrix", 1, "a", 4)
    log.refresh(0, [unit], [0.5], [1.0], seconds=0.1)
    log.movement(1, 0, [unit], [1.0], [0.1], [0.1])
    log.close()
    for name in ("unit_importance.jsonl", "unit_movement.jsonl"):
        assert keys_of(made_up.root / name) == keys_of(written.root / name)


def keys_of(path: Path) -> set[frozenset[str]]:
    """Of the lines of a file, and of the units in them."""
    lines = read_json_lines(path)
    return {frozenset(record) for line in lines for record in (line, *line["units"])}


DAMAGED = [
    ("layer_importance.json", ["layers"], [None]),
    ("layer_importance.json", ["layers", 0, "delta"], "0.5"),
    ("layer_importance.json", ["layers", 0, "delta"], None),
    ("layer_importance.json", ["layers", 0, "index"], 10**9),
    ("layer_importance.json", ["layers", 0, "standard_error"], {}),
    ("layer_importance.json", ["selected"], ["a"]),
    ("layer_importance.json", ["selection"], "knee"),
    ("layer_importance.json", ["stability"], {"against": ["halves"]}),
    ("evaluation.json", ["base"], ""),
    ("evaluation.json", ["base", "general"], -2),
    ("evaluation.json", ["adapted", "domain", "loss"], "low"),
    ("summary.json", ["total_parameters"], "many"),
    ("summary.json", ["tokens"], 10**400),
    ("summary.json", ["peak_memory_bytes"], ["3"]),
    ("expanded/expansion.json", ["copies", 0], {"source": 12}),
    ("expanded/expansion.json", ["source_layers"], 10**9),
    ("layer_methods.json", ["methods"], {"mask": {"deltas": "all"}}),
    ("layer_methods.json", ["spearman"], {"mask": "high"}),
]


@pytest.mark.parametrize(("name", "keys", "value"), DAMAGED, ids=lambda part: str(part)[:40])
def test_a_record_with_values_of_other_types_is_named(tmp_path: Path, name: str, keys: Any, value: Any) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "layer_methods.json").write_text("{}")
    put(name, *keys, value=value)(run_dir)
    with pytest.raises(InputError, match=rf"{re.escape(name)}: .*; put it aside, then: adept run CONFIG"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", {"step": 10**400, "loss": 1.0}),
        slow("metrics.jsonl", {"step": 101, "eval": {"general": 3}}),
        ("unit_importance.jsonl", {"step": 101, "units": 3}),
        slow("unit_importance.jsonl", {"step": 101, "units": [{"unit": 0.5, "multiplier": 1.0}]}),
        slow("unit_importance.jsonl", {"step": 101, "units": [{"unit": "a", "multiplier": "1"}]}),
        slow("unit_movement.jsonl", {"step": 101, "since": 100, "units": "all"}),
        ("unit_movement.jsonl", interval(100, 101, moved("a", 10**400, 1.0, 1.0))),
    ],
    ids=lambda part: str(part)[:50],
)
def test_a_line_with_values_of_other_types_is_left_out(tmp_path: Path, page: str, name: str, line: Any) -> None:
    run_dir = make_run(tmp_path / "run")
    with (run_dir / name).open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert words(page_of(run_dir)) == words(page)


@pytest.mark.parametrize("text", ["a: 2020-13-45", "[" * 3000, "a: !!bool 7", "a: &a [*a]", "- 1", "\x00", "model: [b"])
def test_a_configuration_that_is_none_costs_only_the_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    (tmp_path / "config.yaml").write_text(text)
    assert "ADEPT run: unnamed model" in words(page_of(tmp_path))
