"""What the page says about how far units moved (unit_movement.jsonl)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import interval, moved, page_of, words, write_lines


def movement_of(run_dir: Path, *lines: dict[str, Any]) -> str:
    """The section of a run that has written nothing else."""
    write_lines(run_dir / "metrics.jsonl", [{"step": 1}])
    write_lines(run_dir / "unit_movement.jsonl", list(lines))
    return page_of(run_dir).split('<section id="movement"')[1].split("</section>")[0]


def test_units_that_move_as_their_multipliers_say_have_correlation_1(page: str) -> None:
    """Norms are 576 times smaller than matrices here, and move as far by element."""
    assert "within an interval between refreshes: 1.00 on average over 5 intervals (1.00 to 1.00)" in words(page)


def test_the_mean_multiplier_weighs_each_by_how_long_it_held(tmp_path: Path) -> None:
    matrix, norm = "layers.1.mlp.up_proj", "layers.1.norm"
    first = interval(0, 10, moved(matrix, 2.0, 1, 1), moved(norm, 1, 1, 1, kind="norm"))
    then = interval(10, 40, moved(matrix, 0.4, 1, 3), moved(norm, 1, 1, 1, kind="norm"))
    text = words(movement_of(tmp_path, first, then))
    assert f"{matrix} 0.800 1.5" in text  # (10 * 2 + 30 * 0.4) / 40; norm 3 over 4 elements
    assert f"{norm} 1.000 0.5" in text


def test_movement_is_compared_with_the_multiplier_that_held_meanwhile(tmp_path: Path) -> None:
    """The order turns round at the refresh, and the learning rate falls to a tenth: columns that are one line off
    correlate negatively, and ranks over both intervals together correlate less than perfectly."""
    first = [moved(f"layers.{layer}.a", layer, layer, layer) for layer in range(1, 5)]
    then = [moved(f"layers.{layer}.a", 5 - layer, 0.1 * (5 - layer), 1.0) for layer in range(1, 5)]
    text = words(movement_of(tmp_path, interval(0, 10, *first), interval(10, 20, *then)))
    assert "within an interval between refreshes: 1.00 on average over 2 intervals (1.00 to 1.00)" in text


def test_units_that_ignore_their_multipliers_have_no_high_correlation(tmp_path: Path) -> None:
    units = [moved(f"layers.{n}.a", n, distance, 1.0) for n, distance in enumerate((3, 1, 4, 2))]
    # Ranks (1 2 3 4) and (3 1 4 2): 1 - 6 * (4 + 1 + 1 + 4) / (4 * 15)
    assert "within an interval between refreshes: 0.00." in words(movement_of(tmp_path, interval(0, 10, *units)))


def test_a_unit_that_moved_although_it_was_stopped_is_named(tmp_path: Path) -> None:
    stopped, moving = moved("layers.1.a", 0.0, 0.0, 1.0), moved("layers.1.c", 1.0, 1, 1)
    section = movement_of(tmp_path, interval(0, 10, stopped, moved("layers.1.b", 0.0, 1e-9, 1.0), moving))
    assert '<div class="verdict warn"><strong>Units that moved although their multiplier was 0: 1 of 2' in section
    assert "layers.1.b by 1e-9 (L2 norm) from step 0 to 10." in words(section)
    assert "none of them moved" not in section


def test_stopped_units_are_counted_once_and_only_their_own_intervals_matter(tmp_path: Path) -> None:
    a, b = "layers.1.a", "layers.1.b"
    lines = [interval(0, 10, moved(a, 0.0, 0, 0), moved(b, 1.0, 1, 1))]
    lines += [interval(10, 20, moved(a, 0.0, 0, 0), moved(b, 0.0, 0, 1)), interval(20, 30, moved(a, 1, 1, 1))]
    section = movement_of(tmp_path, *lines)
    assert "2 units (8 elements) had multiplier 0 in an interval between refreshes; none of them moved" in section
    assert "verdict" not in section


def test_lines_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    lost = [interval(0, 10, moved("layers.1.a", 1.0, 9, 9)), interval(10, 20, moved("layers.1.a", 0.0, 9, 9))]
    lines = [*lost, interval(4, 10, moved("layers.1.a", 0.5, 1, 1)), interval(14, 16, moved("layers.1.a", 1.5, 1, 4))]
    section = movement_of(tmp_path, *lines)
    assert "layers.1.a 0.750 2" in words(section)  # (6 * 0.5 + 2 * 1.5) / 8
    assert "verdict" not in section


def test_the_units_that_moved_most_and_least_are_named(tmp_path: Path) -> None:
    units = [moved(f"layers.{n}.a", 0.1 * n, n, n) for n in range(1, 31)]
    table = words(movement_of(tmp_path, interval(0, 10, *units)).split("<table>")[1].split("</table>")[0])
    assert re.findall(r"layers\.(\d+)\.a", table) == ["30", "29", "28", "27", "26", "5", "4", "3", "2", "1"]
    assert "… 20 units between …" in table


def test_thousands_of_neurons_are_shown_by_their_layers_mean(tmp_path: Path) -> None:
    units = [moved(f"layers.{layer}.mlp.neuron.{n}", n % 3, n % 3, n % 3) for layer in (3, 7) for n in range(6000)]
    section = movement_of(tmp_path, interval(0, 10, *units))
    text = words(section)
    assert "Each dot is the mean of a layer's units" in text.replace("&#39;", "'")
    assert "layers.3.mlp.neuron.* 1.000 0.5" in text
    assert "layers.7.mlp.neuron.* 1.000 0.5" in text
    assert "within an interval between refreshes: 1.00." in text  # over neurons, not over the two means
    assert len(section) < 60_000


@pytest.mark.parametrize("name", ["layers.{}.self_attn.q_proj", "mine{}", "{}"])
def test_movement_of_units_of_any_name_stays_small(tmp_path: Path, name: str) -> None:
    words_of_numbers = ("".join("abcdefghij"[int(digit)] for digit in str(n)) for n in range(6000))
    numbers = words_of_numbers if name == "{}" else map(str, range(6000))
    units = [moved(name.format(number), 1 + n % 7, 1 + n % 7, 1 + n % 7) for n, number in enumerate(numbers)]
    section = movement_of(tmp_path, interval(0, 10, *units))
    assert "<svg" in section and len(section) < 150_000


FINE = interval(0, 10, moved("layers.1.a", 1, 1, 1), moved("layers.1.b", 2, 1, 1))


@pytest.mark.parametrize(
    "line",
    [
        {"step": 20},
        {"step": 20, "since": 10},
        {"step": 20, "since": None, "units": FINE["units"]},
        {"step": 20, "since": 20, "units": FINE["units"]},
        {"step": 20, "since": 10, "units": None},
        {"step": 20, "since": 10, "units": []},
        {"step": 20, "since": 10, "units": [{}, "layers.1.a", None, {"unit": "layers.1.a", "multiplier": 1.0}]},
        interval(10, 20, {**FINE["units"][0], "multiplier": None}),
        interval(10, 20, {**FINE["units"][0], "numel": 0}),
    ],
)
def test_a_line_that_cannot_be_used_is_skipped(tmp_path: Path, line: dict[str, Any]) -> None:
    assert "Left out: no unit_movement.jsonl" in movement_of(tmp_path, line)
    assert "layers.1.a 1.000 0.5" in words(movement_of(tmp_path, FINE, line))


def test_unknown_fields_of_movement_do_no_harm(tmp_path: Path) -> None:
    extended = {**FINE, "new": [], "units": [{**unit, "new": {}} for unit in FINE["units"]]}
    assert movement_of(tmp_path, extended) == movement_of(tmp_path, FINE)


def test_units_whose_weights_overflowed_are_counted_and_left_out(tmp_path: Path) -> None:
    units = [*FINE["units"], moved("layers.1.c", 1.0, math.nan, math.nan), moved("layers.1.d", 1.0, 1, math.inf)]
    text = words(movement_of(tmp_path, interval(0, 10, *units, moved("layers.1.e", 1.5, 3, 3))))
    assert "2 units have weights that are not finite numbers" in text
    assert "layers.1.c" not in text and "layers.1.d" not in text and "nan" not in text
    broken = movement_of(tmp_path, interval(0, 10, moved("layers.1.c", 1.0, math.nan, math.nan)))
    assert "Left out: no weight is a finite number any more." in broken


def test_where_all_units_have_one_rate_there_is_no_line_to_look_for(tmp_path: Path) -> None:
    units = [moved("layers.1.a", 1, 1, 3), moved("layers.1.b", 1, 1, 1), moved("layers.1.c", 1, 1, math.nan)]
    section = movement_of(tmp_path, interval(0, 10, *units))
    assert "<svg" not in section
    text = words(section)
    assert "How far each unit moved All units had the same learning rate" in text
    assert "layers.1.a 1.000 1.5" in text and "layers.1.b 1.000 0.5" in text
    assert "1 unit has weights that are not finite numbers" in text
