"""Which steps are skipped: the rule by itself, held against torch's own mean and standard deviation."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from adept_ds.config.train_sections import TrainSection
from adept_ds.training.skipping import Skips

NAN, INF = math.nan, math.inf
WINDOW = 8


def skips(sigma: float | None = 3.0, **keys: object) -> Skips:
    window = {"spike_window": WINDOW} if sigma is not None else {}
    return Skips(TrainSection.model_validate({"spike_sigma": sigma, **window, **keys}))


def is_spike(last: list[float], value: float, sigma: float) -> bool:
    """In plain torch; the standard deviation is that of a sample."""
    if len(last) < WINDOW // 2:
        return False
    std, mean = torch.std_mean(torch.tensor(last[-WINDOW:], dtype=torch.float64))
    return value > float(mean + sigma * std)


def test_a_spike_is_what_is_too_many_deviations_above_the_mean_of_the_last_steps() -> None:
    """Losses and norms of 300 steps, in which some jump; those that were skipped count among the last ones."""
    generator, rule = random.Random(0), skips()
    losses, norms, found = list[float](), list[float](), list[str | None]()
    for step in range(300):
        loss = 3 - step / 200 + generator.gauss(0, 0.05) + (2.0 if generator.random() < 0.03 else 0)
        norm = abs(generator.gauss(1, 0.1)) * (9 if generator.random() < 0.03 else 1)
        wanted = "loss spike" if is_spike(losses, loss, 3.0) else None
        wanted = wanted or ("gradient spike" if is_spike(norms, norm, 3.0) else None)
        found.append(rule.decide(loss, norm))
        assert found[-1] == wanted, step
        losses.append(loss)
        norms.append(norm)
    assert {"loss spike", "gradient spike"} < set(found)
    assert rule.total == sum(reason is not None for reason in found)


@pytest.mark.parametrize("sigma", [None, 6.0])
@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 1.0, "loss"),
        (INF, 1.0, "loss"),
        (-INF, 1.0, "loss"),
        (3.0, NAN, "gradient"),
        (3.0, INF, "gradient"),
        (NAN, NAN, "loss"),
        (3.0, 1.0, None),
    ],
)
def test_what_is_no_number_is_skipped_with_and_without_a_rule_for_spikes(
    sigma: float | None, loss: float, norm: float, reason: str | None
) -> None:
    rule = skips(sigma)
    assert (rule.largest_norm(loss) < 0) == (not math.isfinite(loss)), "known before the step"
    assert rule.decide(loss, norm) == reason


def test_what_is_no_number_does_not_make_the_steps_after_it_be_skipped() -> None:
    """In a mean it would: of a whole window."""
    rule = skips(6.0)
    steps = [(3.0, 1.0), (3.1, 1.1)] * 4
    assert [rule.decide(*step) for step in [*steps, (NAN, INF), (INF, NAN), *steps]] == [
        *[None] * 8,
        *["loss"] * 2,
        *[None] * 8,
    ]
    assert (rule.total, rule.in_a_row) == (2, 0)


def test_steps_in_a_row_are_counted_up_to_one_that_is_taken() -> None:
    rule, counts = skips(None), []
    for loss, norm in [(NAN, 1.0), (1.0, INF), (1.0, 1.0), (INF, 1.0)]:
        rule.decide(loss, norm)
        counts.append(rule.in_a_row)
    assert counts == [1, 2, 0, 1]


def test_in_fp16_a_gradient_that_overflows_is_no_sign_of_a_broken_model() -> None:
    """Losses are scaled down after it, a dozen times at the start of many runs; a loss that is no number is one."""
    rule = skips(None, precision="fp16")
    assert [rule.decide(3.0, INF) for _ in range(20)] == ["gradient"] * 20
    assert (rule.in_a_row, rule.total) == (0, 20)
    rule.decide(NAN, INF)
    assert rule.in_a_row == 1


def test_the_rule_goes_on_from_a_checkpoint_as_if_nothing_had_been() -> None:
    generator = random.Random(1)
    steps = [(generator.gauss(3, 0.1), generator.gauss(1, 0.1)) for _ in range(30)]
    whole, first, second = skips(1.0), skips(1.0), skips(1.0)
    wanted = [whole.decide(*step) for step in steps]
    found = [first.decide(*step) for step in steps[:17]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [second.decide(*step) for step in steps[17:]] == wanted
    assert second.total == whole.total > 3
