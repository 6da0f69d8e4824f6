"""What the figures show: letters are outlines on the page, so the drawings themselves are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.made_up_study import METHODS, description, make_study
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from adept_ds.comparison.figures import (
    PALETTE,
    draw_differences,
    draw_fronts,
    draw_progress,
    draw_reached,
    looks,
    spread,
    uses_held_out,
)
from adept_ds.comparison.findings import Findings, compare


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    folder = tmp_path_factory.mktemp("figures")
    return compare(folder, description(), make_study(folder))


def drawn(draw: Callable[[Findings, Figure], None], findings: Findings) -> Any:
    figure = Figure()
    draw(findings, figure)
    return figure


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 5.0], [0.0, 5.0]),
        ([1.0, 1.0], [0.5, 1.5]),
        ([0.0, 0.1, 0.2, 9.0], [-0.9, 0.1, 1.1, 9.0]),
        ([0.0, 0.9, 1.0], [-0.36666, 0.63333, 1.63333]),
        ([], []),
    ],
)
def test_labels_are_apart_and_as_near_as_can_be(values: list[float], expected: list[float]) -> None:
    assert spread(values, 1.0) == pytest.approx(expected, abs=1e-3)


def test_dials_lead_from_the_base_and_are_labelled_with_every_method(findings: Findings) -> None:
    (axes,) = drawn(draw_fronts, findings).axes
    assert set(METHODS) | {"base"} <= set(texts(axes))
    arms = findings.comparison.arms
    dials = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(dials) == sum(len(arm.learning_rates) for arm in arms)
    base = arms[0].points[0]
    assert all((line.get_xdata()[0], line.get_ydata()[0]) == (0, base.test_domain_loss) for line in dials)


def test_filled_marks_are_the_front(findings: Findings) -> None:
    (axes,) = drawn(draw_fronts, findings).axes
    marks = [dots for dots in axes.collections if list(dots.get_sizes()) == [30]]
    filled = [dots for dots in marks if to_hex(dots.get_facecolor()[0]) != "#ffffff"]
    assert [to_hex(dots.get_facecolor()[0]).upper() for dots in filled] == list(PALETTE[: len(METHODS)])
    for dots, arm in zip(filled, findings.comparison.arms, strict=True):
        front = [point for point in arm.points if point.on_front and point.evaluated and point.lr is not None]
        expected = [(point.test_general_rise, point.test_domain_loss) for point in front]
        assert np.sort(np.asarray(dots.get_offsets()), axis=0) == pytest.approx(np.sort(expected, axis=0))


def test_hollow_marks_are_those_that_break_the_bound_on_test_documents(findings: Findings) -> None:
    figure = drawn(draw_reached, findings)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["as trained", "D(0)", "D(0.02)", "D(0.05)"]  # no method reaches D(-0.02)
    for axes, criterion in zip(figure.axes, ("plain", "D(0)", "D(0.02)", "D(0.05)"), strict=True):
        hollow = [to_hex(dot.get_facecolor()[0]) == "#ffffff" for dot in axes.collections]
        chosen = [arm.chosen[criterion] for arm in findings.comparison.arms]
        assert hollow == [point is not None and point.excess > 0 for point in chosen]


def test_differences_leave_out_the_reference(findings: Findings) -> None:
    figure = drawn(draw_differences, findings)
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == [name for name in METHODS if name != "full"]


def test_curves_are_of_held_out_text_where_all_trials_have_it(findings: Findings) -> None:
    assert uses_held_out(findings)
    tokens, seconds = drawn(draw_progress, findings).axes
    assert "held-out" in tokens.get_ylabel()
    curve = tokens.lines[0].get_data()
    assert (curve[0][0], curve[0][-1]) == (0, 61_440)
    adept = list(METHODS).index("adept")
    assert seconds.lines[2 * adept].get_data()[0][-1] == pytest.approx(61_440 / 820)


def test_curves_are_of_training_where_one_trial_was_not_evaluated(tmp_path: Path) -> None:
    trials = make_study(tmp_path, {"full": METHODS["full"]})
    log = trials[-1].run_dir / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "eval" not in line))
    found = compare(tmp_path, description(), trials)
    assert not uses_held_out(found)
    tokens = drawn(draw_progress, found).axes[0]
    assert "training loss" in tokens.get_ylabel()
    assert len(tokens.lines[0].get_data()[0]) == 60


def test_more_methods_than_colours_differ_in_marks(findings: Findings) -> None:
    arms = findings.comparison.arms * 4
    renamed = [arm.model_copy(update={"name": f"m{i}"}) for i, arm in enumerate(arms)]
    assert len(set(looks(renamed).values())) == len(renamed)
