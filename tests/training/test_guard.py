"""What the guard makes of what is measured: made-up readings, no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.guard_record import GuardStop, Reading, RiseLimits
from adept_ds.config.guard_section import GuardSection
from adept_ds.training.guard import Guard


def guard(texts: str = "held out", **keys: Any) -> Guard:
    def never(progress: Any) -> Any:
        raise AssertionError("nothing is measured here")

    return Guard(GuardSection.model_validate(keys), never, texts)


def reading(lower: float, domain: float = 2.0, **others: float) -> Reading:
    rises = {"wiki": lower} | others
    general = {name: RiseLimits(rise=low + 0.01, lower=low, upper=low + 0.02) for name, low in rises.items()}
    return Reading(general=general, domain=domain)


def test_what_counts_is_the_lower_limit_of_the_worst_source() -> None:
    """Of a rise that may be chance nothing is said; a source that got worse is not hidden by one that got better."""
    watch = guard(max_general_rise=0.05)
    assert watch.judge(10, reading(0.049))["forgotten"] is False, "the rise itself is 0.059"
    assert watch.complaint is None
    record = watch.judge(20, reading(-0.4, exams=0.06))
    assert (record["forgotten"], record["worst"]) == (True, "exams")
    assert watch.words() == (
        "general text 'exams' has risen by 0.0700 nats by step 20 (at least 0.0600 at 95% confidence), above "
        "guard.max_general_rise (0.05): forgotten"
    )
    watch.judge(30, reading(0.0))
    assert watch.complaint is None, "it came back"


def test_warnings_change_nothing_of_training() -> None:
    watch = guard()
    watch.judge(10, reading(1.0))
    assert (watch.factor, watch.stops, watch.keeps_best) == (1.0, False, False)


def test_each_time_that_something_is_forgotten_multipliers_fall() -> None:
    watch = guard(action="slow", slow_by=0.25)
    factors = [watch.judge(step, reading(lower))["factor"] for step, lower in ((1, 0.1), (2, -0.1), (3, 0.2))]
    assert factors == [0.25, 0.25, 0.0625]
    assert not watch.stops


def test_the_best_checkpoint_is_that_of_the_lowest_domain_loss_with_nothing_forgotten() -> None:
    watch, best = guard(action="stop"), []
    for step, lower, domain in ((0, 0.0, 1.0), (10, -0.1, 3.0), (20, -0.1, 2.5), (30, -0.1, 2.7), (40, 0.1, 2.0)):
        watch.judge(step, reading(lower, domain))
        best.append(watch.best)
    assert best == [0, 10, 20, 20, 20], "the base is no checkpoint, and what forgot is not good"
    assert watch.stops
    stop = watch.stop(40)
    assert (stop.step, stop.best, stop.max_general_rise, stop.confidence) == (40, 20, 0.0, 0.95)
    assert watch.words().endswith("training ends, and the checkpoint of step 20 is the result")


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_been() -> None:
    readings = [(step, reading(0.3 - 0.1 * (step % 4), 3 - step / 10)) for step in range(1, 9)]
    for action in ("slow", "stop"):
        whole, first, second = (guard(action=action) for _ in range(3))
        wanted = [whole.judge(*of) for of in readings]
        found = [first.judge(*of) for of in readings[:5]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())), range(9))
        assert found + [second.judge(*of) for of in readings[5:]] == wanted
        assert (second.best, second.factor) == (whole.best, whole.factor)


def test_only_what_may_be_kept_is_the_best() -> None:
    """A step that was skipped gets no checkpoint: another step's would be exported in its place."""
    watch = guard(action="stop")
    watch.judge(10, reading(-0.1, 3.0))
    watch.judge(20, reading(-0.1, 2.0), is_kept=False)
    assert watch.best == 10
    watch.judge(30, reading(-0.1, 2.5))
    assert watch.best == 30, "and it sets no mark for those after it"


def test_a_best_checkpoint_that_is_gone_is_none() -> None:
    """Put aside since it was damaged, or left with the trunk: the best of those to come is the result."""
    first, second = guard(action="stop"), guard(action="stop")
    first.judge(10, reading(-0.1, 2.0))
    second.load_state_dict(first.state_dict(), [20, 30])
    assert second.best == 0
    second.judge(40, reading(-0.1, 2.5))
    assert second.best == 40


@pytest.mark.parametrize(
    ("changed", "best"),
    [
        ({}, 10),
        ({"max_general_rise": 0.01}, 0),
        ({"max_general_rise": 0.06}, 10),
        ({"confidence": 0.9}, 0),
        ({"max_general_rise": 0.06, "confidence": 0.9}, 0),
        ({"texts": "others"}, 0),
    ],
    ids=str,
)
def test_the_best_by_other_limits_or_other_texts_is_not_the_best(changed: dict[str, Any], best: int) -> None:
    """It has risen by 0.04 at least: within 0.05, and so within 0.06, but not within 0.01. By other limits or of other
    texts nobody knows."""
    first = guard(action="stop", max_general_rise=0.05)
    second = guard(**{"action": "stop", "max_general_rise": 0.05, **changed})
    first.judge(10, reading(0.04, 2.0))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), [10])
    assert second.best == best
    second.judge(20, reading(0.0, 2.5))
    assert second.best == (best or 20), "whatever loss the best of before had"


# --- its end of training --------------------------------------------------------------------------------------------

STOP = GuardStop(max_general_rise=0.1, confidence=0.95, step=40, best=20, reason="general text 'wiki' has risen")


def test_training_that_was_ended_stays_ended_by_the_same_settings_alone(tmp_path: Path) -> None:
    file = tmp_path / "guard.json"
    assert GuardStop.of(file, 0.1, 0.95) is None
    STOP.save(file)
    assert GuardStop.of(file, 0.1, 0.95) == STOP
    assert GuardStop.of(file, 0.2, 0.95) is None and GuardStop.of(file, 0.1, 0.9) is None


def test_an_end_with_no_good_checkpoint_is_a_mistake_with_a_remedy(tmp_path: Path) -> None:
    STOP.model_copy(update={"best": 0}).save(tmp_path / "guard.json")
    with pytest.raises(
        InputError, match=r"^guard\.max_general_rise: 0\.1, but general text 'wiki' .*; lower train\.lr"
    ):
        GuardStop.of(tmp_path / "guard.json", 0.1, 0.95)
