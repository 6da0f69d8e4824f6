"""The section `guard`: absent by default, defaults for {}, and refused where it, or a key of it, can do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from adept_ds.base.errors import InputError
from adept_ds.config.guard_section import GuardSection
from adept_ds.config.loading import dump_config, parse_config

BASE: dict[str, Any] = {"model": "m", "run_dir": "r", "data": {"general_eval": ["g"], "domain_eval": ["d"]}}


def test_without_the_section_there_is_no_guard_and_a_dump_says_nothing_of_it() -> None:
    for tree in (BASE, BASE | {"guard": None}):
        config = parse_config(tree)
        assert config.guard is None
        assert "guard" not in yaml.safe_load(dump_config(config))


def test_an_empty_section_warns_of_what_has_risen_at_all() -> None:
    guard = parse_config(BASE | {"guard": {}}).guard
    assert guard == GuardSection() and guard is not None
    assert (guard.max_general_rise, guard.confidence, guard.action) == (0.0, 0.95, "warn")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"guard": {"action": "halt"}}, r"guard\.action: 'halt' is not possible: .*'warn', 'slow' or 'stop'"),
        ({"guard": {"slow_by": 0.1}}, r"guard: slow_by: 0\.1 belongs to action: slow, but action is warn: remove"),
        ({"guard": {"action": "slow", "slow_by": 1}}, r"guard\.slow_by: 1 is not possible: .* less than 1"),
        ({"guard": {"max_general_rise": -1}}, r"guard\.max_general_rise: -1 is not possible"),
        ({"data": {"domain_eval": ["d"]}}, r"guard: measures losses .* data\.general_eval is empty: list held-out"),
        ({"data": {"general_eval": ["g"]}}, r"data\.domain_eval is empty"),
        (
            {"train": {"eval_every": 0}},
            r"guard: measures when training is evaluated, but train\.eval_every is 0: raise",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_or_can_have_no_effect_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_config(BASE | {"guard": {}} | changes)


@pytest.mark.parametrize("action", ["warn", "slow", "stop"])
def test_a_dump_has_what_takes_effect_and_is_read_back_the_same(action: str) -> None:
    config = parse_config(BASE | {"guard": {"action": action}})
    dumped = yaml.safe_load(dump_config(config))
    assert parse_config(dumped) == config
    assert ("slow_by" in dumped["guard"]) == (action == "slow")


def test_every_key_is_described() -> None:
    assert all(field.description for field in GuardSection.model_fields.values())
