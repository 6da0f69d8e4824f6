"""A sentence that one method is better is written where interval and seeds say so, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from harness.made_up_study import FOUR, METHODS, description, make_study, write_small

from adept_ds.base.errors import InputError
from adept_ds.comparison.findings import compare
from adept_ds.comparison.record import Comparison
from adept_ds.comparison.trials import Trial
from adept_ds.comparison.verdicts import agreed_sign

TOKENS = dict.fromkeys(FOUR, (10, 30, 20, 40, 25, 35))


def two_arms(
    folder: Path, gains: Mapping[str, Sequence[float]], general: float = 3.0, noise: float = 0.01
) -> list[Trial]:
    """`gains`: of each seed, in domain loss; every document gets it within `noise`."""
    trials = []
    for label, of in gains.items():
        for seed, gain in enumerate(of):
            random = np.random.default_rng([seed, *label.encode()])
            adapted = {source: [general] * 6 for source in FOUR}
            for source in FOUR[2:]:
                adapted[source] = [3.0 - gain + float(x) for x in random.normal(0, noise, 6)]
            losses = {"base": {source: [3.0] * 6 for source in FOUR}, "adapted": adapted}
            trials.append(write_small(folder, label, 1e-4, seed, losses, TOKENS))
    return trials


def compared(folder: Path, trials: Sequence[Trial], reference: str = "old") -> Comparison:
    return compare(folder, description(reference=reference), trials).comparison


def test_a_clear_difference_is_claimed_in_a_sentence(tmp_path: Path) -> None:
    found = compared(tmp_path, two_arms(tmp_path, {"old": [0.2, 0.21, 0.19], "new": [0.3, 0.31, 0.32]}))
    gap = found.gap("D(0)", "new", "old")
    assert gap is not None
    assert gap.told_apart
    assert gap.low < gap.value < gap.high < 0
    (sentence,) = found.claims("D(0)")
    expected = (
        f"new reaches a domain loss {-gap.value:.3f} nats lower than old (95% {-gap.high:.3f} to {-gap.low:.3f}; "
    )
    assert sentence == f"{expected}3 seeds), with no general source above the base."
    assert found.gap("D(0)", "old", "new") == (-gap.value, -gap.high, -gap.low, 3, True)


def test_the_sentence_names_the_better_one_whatever_the_order(tmp_path: Path) -> None:
    trials = two_arms(tmp_path, {"old": [0.3, 0.3], "new": [0.2, 0.2]})
    (sentence,) = compared(tmp_path, trials).claims("plain")
    assert sentence.startswith("old reaches a domain loss 0.")
    assert "lower than new" in sentence
    assert compared(tmp_path, trials[::-1]).claims("plain") == [sentence]


@pytest.mark.parametrize(
    ("old", "new", "noise"),
    [
        ([0.2, 0.2, 0.2], [0.5, 0.5, 0.19], 0.001),  # better on average, but not in every seed
        ([0.2, 0.2, 0.2], [0.5, 0.5, 0.2], 0.0),  # not better in one seed, nor worse
        ([0.2, 0.2], [0.205, 0.205], 0.1),  # documents are too few
        ([0.2], [0.2], 0.0),  # the same
    ],
)
def test_nothing_is_claimed_without_evidence(tmp_path: Path, old: list[float], new: list[float], noise: float) -> None:
    found = compared(tmp_path, two_arms(tmp_path, {"old": old, "new": new}, noise=noise))
    assert found.differences
    assert {pair.better for pair in found.differences} == {None}
    assert {pair.sentence for pair in found.differences} == {None}


@pytest.mark.parametrize("swapped", [False, True])
def test_one_seed_of_many_that_disagrees_is_enough_to_claim_nothing(tmp_path: Path, swapped: bool) -> None:
    """Though the interval excludes 0: of six seeds, one is too rarely drawn often enough."""
    gains = {"old": [0.2] * 6, "new": [0.5] * 5 + [0.19]}
    trials = two_arms(tmp_path, gains, noise=0.001)
    found = compared(tmp_path, trials[::-1] if swapped else trials)
    gap = found.gap("plain", "new", "old")
    assert gap is not None
    assert gap.high < 0
    assert not gap.told_apart
    assert found.claims("plain") == []


@pytest.mark.parametrize("seed", range(3))
def test_no_claim_has_seeds_that_disagree_or_an_interval_with_0(tmp_path: Path, seed: int) -> None:
    """In studies where methods differ by about as much as seeds do, so that some pairs are told apart."""
    random = np.random.default_rng(seed)
    gains = {f"m{i}": (0.2 + 0.015 * i + random.normal(0, 0.02, 3)).tolist() for i in range(5)}
    found = compared(tmp_path, two_arms(tmp_path, gains), reference="m0")
    claimed = [pair for pair in found.differences if pair.better is not None]
    assert 0 < len(claimed) < len(found.differences)
    for pair in found.differences:
        one_sign = len({value > 0 for value in pair.by_seed}) == 1
        assert (pair.better is not None) == (one_sign and not pair.low <= 0 <= pair.high)
        assert pair.difference == pytest.approx(np.mean(pair.by_seed))
        if pair.better:
            assert pair.better == (pair.first if pair.difference < 0 else pair.second)


@pytest.mark.parametrize(
    ("by_seed", "low", "high", "sign"),
    [
        ([-1, -2], -3, -0.1, -1),
        ([1, 2], 0.1, 3, 1),
        ([-1, 2], 0.1, 3, 0),
        ([1, -2], -3, -0.1, 0),
        ([1, 2], -0.1, 3, 0),
        ([0, 1], 0.1, 1, 0),
    ],
)
def test_the_rule(by_seed: list[float], low: float, high: float, sign: int) -> None:
    assert agreed_sign(by_seed, low, high) == sign


def test_methods_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    first, second = two_arms(tmp_path, {"old": [0.2], "new": [0.1, 0.3]})[0::2]
    found = compared(tmp_path, [first, second])
    assert found.gap("plain", "new", "old") is None


def test_who_stays_at_the_base_is_compared_under_the_seeds_of_the_other(tmp_path: Path) -> None:
    """The first method forgets everywhere: within the bound it has the base alone."""
    trials = two_arms(tmp_path / "1", {"old": [0.3]}, general=3.5)
    trials += two_arms(tmp_path / "2", {"new": [0.2, 0.2]})
    found = compared(tmp_path, trials)
    (pair,) = [pair for pair in found.differences if pair.criterion == "D(0)"]
    assert pair.seeds == [0, 1]
    assert found.claims("D(0)")[0].startswith("new reaches a domain loss 0.")


def test_a_claim_says_where_test_documents_break_the_bound(tmp_path: Path) -> None:
    tokens = dict.fromkeys(FOUR, (10,))
    base = {source: [3.0] for source in FOUR}
    new = {**base, "general/test/g": [3.03], "domain/validation/d": [2.0], "domain/test/d": [2.0]}
    trials = [write_small(tmp_path, name, 1e-4, 0, {"base": base, "adapted": of}, tokens)
              for name, of in {"old": base, "new": new}.items()]  # fmt: skip
    found = compared(tmp_path, trials)
    beyond = "On test documents it is 0.010 nats beyond that bound (g)."
    assert found.claims("D(0.02)")[0].endswith(f"0.02 nats above the base. {beyond}")
    assert "beyond" not in found.claims("D(0.05)")[0]
    chosen = next(arm for arm in found.arms if arm.name == "new").chosen
    told = {name: chosen[name] for name in ("D(0.02)", "D(0.05)", "plain")}
    assert {name: point and point.holds_on_test for name, point in told.items()} == {
        "D(0.02)": False, "D(0.05)": True, "plain": None}  # fmt: skip


@pytest.mark.parametrize(("reference", "expected"), [(None, "full"), ("lora", "lora")])
def test_the_reference_is_the_one_asked_for_or_full(tmp_path: Path, reference: str | None, expected: str) -> None:
    trials = make_study(tmp_path, {name: METHODS[name] for name in ("lora", "full")}, more_seeds=())
    assert compare(tmp_path, description(reference=reference), trials).comparison.reference == expected


def test_a_reference_that_is_not_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reference: 'ewc' is none of the methods compared; choose one of old"):
        compared(tmp_path, two_arms(tmp_path, {"old": [0.1]}), reference="ewc")
