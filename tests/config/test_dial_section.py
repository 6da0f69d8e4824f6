"""The section `dial`: absent by default, defaults for {}, and refused where it, or a key of it, can do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from adept_ds.base.errors import InputError
from adept_ds.config.dial_section import DialSection
from adept_ds.config.loading import dump_config, parse_config

BASE: dict[str, Any] = {"model": "m", "run_dir": "r", "data": {"general_eval": ["g"], "domain_eval": ["d"]}}


def test_without_the_section_there_is_no_dial_and_a_dump_says_nothing_of_it() -> None:
    for tree in (BASE, BASE | {"dial": None}):
        config = parse_config(tree)
        assert config.dial is None
        assert "dial" not in yaml.safe_load(dump_config(config))


def test_an_empty_section_has_the_defaults() -> None:
    dial = parse_config(BASE | {"dial": {}}).dial
    assert dial == DialSection() and dial is not None
    assert (dial.max_general_rise, dial.confidence, dial.per_copy) == (0.0, 0.95, True)
    assert dial.positions == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert parse_config(BASE, overrides=["dial={}"]).dial == dial


def test_both_ends_are_always_tried() -> None:
    assert parse_config(BASE | {"dial": {"alphas": [0.5, 0.25]}}).dial.positions == [0, 0.25, 0.5, 1]  # type: ignore[union-attr]
    assert DialSection(alphas=[]).positions == [0, 1]


@pytest.mark.parametrize(("confidence", "fewest"), [(0.5, 1), (0.9, 4), (0.95, 5), (0.99, 7), (0.999, 10)], ids=str)
def test_documents_that_all_agree_must_be_as_many_as_chance_would_hardly_give(confidence: float, fewest: int) -> None:
    """A coin shows the same side n times with probability 2^-n."""
    assert DialSection(confidence=confidence).fewest_documents == fewest
    assert 2.0**-fewest <= 1 - confidence + 1e-12 < 2.0 ** -(fewest - 1) + 1e-12


@pytest.mark.parametrize(
    ("dial", "complaint"),
    [
        ({"max_general_rise": -0.1}, r"dial\.max_general_rise: -0\.1 is not possible: .* greater than or equal to 0"),
        ({"confidence": 1}, r"dial\.confidence: 1 is not possible: .* less than or equal to 0\.999"),
        ({"alphas": [0.5, 1.5]}, r"dial\.alphas: 1\.5 is not possible: .* less than or equal to 1"),
        ({"alphas": [0.5, 0.50000001]}, r"dial: alphas: 0\.5 is there twice|dial\.alphas: 0\.5 is there twice"),
        ({"alpha": 0.5}, r"unknown key 'dial\.alpha'; did you mean 'dial\.alphas'\?"),
        (True, r"dial: True is no section; write its keys below it"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(dial: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_config(BASE | {"dial": dial})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"data": {"domain_eval": ["d"]}},
            "dial: chooses by losses .* data.general_eval is empty: list held-out files",
        ),
        ({"data": {"general_eval": ["g"]}}, "data.domain_eval is empty"),
        ({"eval": {"dial": [0.5]}}, r"eval\.dial: \[0\.5\] has no effect beside the section dial, .*: remove one"),
        ({"method": "full", "dial": {"per_copy": True}}, r"dial\.per_copy: has no effect with method: full"),
        (
            {"method": "lora", "dial": {"prefix_cache_mib": 1}},
            r"dial\.prefix_cache_mib: has no effect with method",
        ),
    ],
    ids=str,
)
def test_what_can_have_no_effect_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_config(BASE | {"dial": {}} | changes)


@pytest.mark.parametrize("method", ["adept", "llama_pro", "full", "freeze", "lora"])
def test_a_dump_has_what_takes_effect_and_is_read_back_the_same(method: str) -> None:
    tree = BASE | {"method": method, "dial": {"max_general_rise": 0.02}}
    config = parse_config(tree)
    dumped = yaml.safe_load(dump_config(config))
    assert parse_config(dumped) == config
    assert ("per_copy" in dumped["dial"]) == (method in ("adept", "llama_pro"))


def test_every_key_is_described() -> None:
    assert all(field.description for field in DialSection.model_fields.values())
