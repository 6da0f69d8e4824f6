"""Sentences about a choice: what a reader may believe of general text, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from adept_ds.base.dial_record import DialPosition, DialRecord, HalfLosses, LossChange, label_of
from adept_ds.evaluation.dial_words import promise_of, reason_of


def half(domain: float, **limits: float) -> HalfLosses:
    general = {
        name: LossChange(loss=2.0, rise=limit - 0.02, limit=limit, tokens=9, documents=6)
        for name, limit in limits.items()
    }
    return HalfLosses(
        general=general, domain=LossChange(loss=domain, rise=domain - 3, limit=domain - 2.9, tokens=9, documents=6)
    )


def position(
    alphas: tuple[float, ...], domain: float, wiki: float, how: Any = "common", test: dict[str, float] | None = None
) -> DialPosition:
    validation = half(domain, wiki=wiki)
    return DialPosition(
        alphas=alphas,
        tried_as=how,
        validation=validation,
        test=half(domain, **(test or {"wiki": wiki})),
        keeps=validation.keeps(0.0),
        seconds=0.0,
    )


BASE = DialPosition(
    alphas=(0.0, 0.0),
    tried_as="common",
    validation=half(3.0, wiki=0.0),
    test=half(3.0, wiki=0.0),
    keeps=True,
    seconds=0.0,
)


def record(chosen: tuple[float, ...], *positions: DialPosition, max_rise: float = 0.0) -> DialRecord:
    return DialRecord(
        kind="copies",
        sources=(1, 2),
        max_general_rise=max_rise,
        confidence=0.95,
        samples=10_000,
        positions=(BASE, *positions),
        chosen=chosen,
        reason="",
        promise="",
        seconds=0.0,
    )


@pytest.mark.parametrize(
    ("max_rise", "test", "wanted"),
    [
        (0.0, {"wiki": -0.01}, "general text: no worse than the base (rise -0.030, 95% limit -0.010)"),
        (0.05, {"wiki": 0.04}, "general text: at most 0.05 nats worse than the base (rise +0.020, 95% limit +0.040)"),
        (
            0.0,
            {"wiki": 0.004},
            "general text: not shown to be no worse than the base on test documents (rise -0.016, 95% limit +0.004)",
        ),
        (0.0, {"wiki": 0.05}, "general text: worse than promised on test documents (rise +0.030, 95% limit +0.050)"),
        (
            0.0,
            {"wiki": -0.03, "exams": -0.01},
            "general text: no worse than the base (rise -0.030, 95% limit -0.010 of 2 sources, in 'exams' most)",
        ),
    ],
    ids=str,
)
def test_the_promise_is_told_by_test_documents(max_rise: float, test: dict[str, float], wanted: str) -> None:
    chosen = position((0.5, 0.5), 2.0, -0.1, test=test)
    assert promise_of(record((0.5, 0.5), chosen, max_rise=max_rise)) == wanted


def test_a_broken_promise_is_told_of_the_source_that_rose_most() -> None:
    """Another may have a higher limit, and may not have risen at all."""
    chosen = position((0.5, 0.5), 2.0, -0.1, test={"wiki": 0.05, "exams": 0.03})
    wide = chosen.test.general["wiki"].model_copy(update={"rise": -0.001})
    test = chosen.test.model_copy(update={"general": chosen.test.general | {"wiki": wide}})
    found = promise_of(record((0.5, 0.5), chosen.model_copy(update={"test": test})))
    assert found.startswith("general text: worse than promised on test documents (rise +0.010, 95% limit +0.030")
    assert "in 'exams' most" in found


def test_where_only_the_base_keeps_the_promise_both_sentences_say_so() -> None:
    found = record((0.0, 0.0), position((1.0, 1.0), 2.0, 0.1))
    assert reason_of(found).startswith("nothing but 0 keeps every general source within 0 nats of the base")
    assert "base's own function" in reason_of(found) and "base's own function" in promise_of(found)


def test_where_what_keeps_it_learned_nothing_that_is_said() -> None:
    found = record((0.0, 0.0), position((1.0, 1.0), 3.5, -0.1))
    assert reason_of(found).startswith("of 1 other positions that keep")
    assert reason_of(found).endswith("none has a lower domain loss than the base")


def test_the_reason_counts_positions_and_says_what_single_copies_were_good_for() -> None:
    common, single = position((0.5, 0.5), 2.5, -0.1), position((0.5, 0.75), 2.4, -0.1, "single")
    too_far = position((1.0, 1.0), 2.0, 0.2)
    assert reason_of(record((0.5, 0.5), common, too_far)) == (
        "lowest domain loss (2.5000, -0.5000 against the base) of 2 positions, of 3 tried, that keep every general "
        "source within 0 nats of the base, at 95% confidence"
    )
    better = reason_of(record((0.5, 0.75), common, single, too_far))
    assert better.endswith("; 0.1000 lower than with all copies at 0.5")
    worse = position((0.25, 0.5), 2.6, -0.1, "single")
    assert reason_of(record((0.5, 0.5), common, worse)).endswith("; none with copies turned by themselves was better")


def test_a_position_has_one_number_where_copies_are_alike() -> None:
    assert label_of((0.5, 0.5)) == "0.5" and label_of((0.5, 1.0, 0.0)) == "0.5, 1, 0"
