"""Equal tokens and equal time: how many steps a cell gets."""

from __future__ import annotations

import itertools

import pytest

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.study.budget import Rate, refreshed_every, scaled, steps_of
from adept_ds.study.schema import Budget


def config(**sections: object) -> Config:
    train = {"global_batch_size": 4, "micro_batch_size": 1}
    return parse_config({"model": "m", "run_dir": "r", "data": {"seq_len": 256}, "train": train, **sections})


@pytest.mark.parametrize(("tokens", "steps"), [(1024, 1), (61_440, 60), (62_463, 60)])
def test_tokens_make_whole_steps(tokens: int, steps: int) -> None:
    assert steps_of(Budget(tokens=tokens), config(), "it") == steps


def steps_counted(rate: Rate, seconds: float, every: int | None) -> int:
    """Step by step, until the time is up; a refresh follows a step only if another step follows it."""
    left, steps = seconds - rate.probe_seconds - rate.preparation_seconds, 0
    while True:
        left -= rate.refresh_seconds if every and steps and steps % every == 0 else 0.0
        left -= rate.step_seconds
        if left < 0:
            return steps
        steps += 1


RATES = [  # in numbers that a float has exactly
    Rate(step_seconds=step, refresh_seconds=refresh, preparation_seconds=before / 2, probe_seconds=before / 2)
    for step, refresh, before in itertools.product((0.25, 1.0, 7.0), (0.0, 0.5, 11.0), (0.0, 20.0))
]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("every", [None, 1, 4, 50])
@pytest.mark.parametrize("seconds", [5.0, 61.75, 300.0])
def test_time_is_filled_and_never_exceeded(rate: Rate, every: int | None, seconds: float) -> None:
    assert rate.steps_within(seconds, every) == steps_counted(rate, seconds, every)


def test_a_method_that_prepares_gets_fewer_steps() -> None:
    plain, costly = Rate(step_seconds=1.0), Rate(step_seconds=1.0, probe_seconds=10.0, refresh_seconds=5.0)
    assert steps_of(Budget(seconds=60.0), config(method="full"), "full", plain) == 60
    adept = config(importance={"every": 20})
    assert refreshed_every(adept) == 20
    assert steps_of(Budget(seconds=60.0), adept, "adept", costly) == 40  # 10 + 40 + one refresh of 5; 41 would be two


def test_roles_of_parenting_are_found_again_and_take_time() -> None:
    probe = {"corpus": ["general.jsonl"]}
    data = {"seq_len": 256, "domain": ["domain.jsonl"]}
    parenting = config(method="parenting", importance={"every": 20}, probe=probe, data=data)
    assert refreshed_every(parenting) == 20
    assert refreshed_every(config(method="full")) is None


def test_time_that_is_gone_before_the_first_step_is_refused() -> None:
    rate = Rate(step_seconds=2.0, probe_seconds=59.0)
    with pytest.raises(InputError, match=r"budget.seconds: 60 leaves it without a step: 59.0 s go by"):
        steps_of(Budget(seconds=60.0), config(), "it", rate)


def test_a_larger_machine_gets_more_of_the_same() -> None:
    assert scaled(Budget(tokens=61_440), 1000) == Budget(tokens=61_440_000)
    assert scaled(Budget(seconds=60.0), 0.5) == Budget(seconds=30.0)
    assert scaled(Budget(tokens=10, measure_rates=True), 2) == Budget(tokens=20, measure_rates=True)
