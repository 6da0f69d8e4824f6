"""Which position is chosen: driven by losses that are known functions of it, and held against the best on a grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from adept_ds.base.dial_record import Alphas
from adept_ds.evaluation.dial_search import BETWEEN, PROPOSALS, Scores, Trial, search

COMMON = (0.0, 0.25, 0.5, 0.75, 1.0)
Losses = Callable[[np.ndarray], tuple[float, list[float]]]
"""From a position to a domain loss and the limit of each general source, both 0 at the base."""


def driven(
    losses: Losses, copies: int, max_rise: float = 0.0, per_copy: bool = True
) -> tuple[Alphas, list[Trial], dict[Alphas, Scores]]:
    """What is chosen, and everything that was evaluated on the way."""
    course = search(COMMON, copies, max_rise, per_copy=per_copy)
    trials, found = [next(course)], dict[Alphas, Scores]()
    while True:
        domain, limits = losses(np.array(trials[-1].alphas))
        found[trials[-1].alphas] = Scores(domain, tuple(limits))
        try:
            trials.append(course.send(found[trials[-1].alphas]))
        except StopIteration as end:
            return end.value, trials, found


def separable(x: np.ndarray) -> tuple[float, list[float]]:
    """The first copy learns for nothing; the second learns more, and costs from the start."""
    domain = float(np.sum([-1.0, -1.5] * x + [0.2, 0.4] * x**2))
    return domain, [float(np.sum([-0.3, 0.4] * x + [0.1, 0.3] * x**2)), -0.1 * float(x.sum())]


def test_copies_that_differ_are_turned_differently_and_better_than_alike() -> None:
    """Within 0.01 of the best on a grid of steps of 0.01: proposals are rounded to thousandths."""
    chosen, trials, found = driven(separable, 2)
    grid = [np.array(x) for x in itertools.product(np.linspace(0, 1, 101), repeat=2)]
    best = min(separable(x)[0] for x in grid if max(separable(x)[1]) <= 0)
    common = min(found[(a, a)].domain for a in COMMON if max(found[(a, a)].limits) <= 0)
    assert found[chosen].domain <= best + 0.01
    assert found[chosen].domain < common - 0.1
    assert max(found[chosen].limits) <= 0
    assert [trial.tried_as for trial in trials[:9]] == ["common"] * 5 + ["single"] * 4, "alike, only the base keeps it"
    assert {trial.tried_as for trial in trials[9:]} == {"proposed"} and len(trials) <= 9 + PROPOSALS


def test_alike_it_is_the_best_common_position_that_keeps_the_promise() -> None:
    chosen, trials, _ = driven(separable, 2, per_copy=False)
    assert [trial.alphas for trial in trials] == [(alpha, alpha) for alpha in COMMON]
    assert chosen == (0.0, 0.0), "the limit is above 0 from the first step on"
    chosen, trials, _ = driven(separable, 2, max_rise=0.16, per_copy=False)
    assert [trial.alphas for trial in trials] == [(alpha, alpha) for alpha in (*COMMON, 0.51)]
    assert chosen == (0.51, 0.51), "0.1 x + 0.4 x^2 comes to 0.16 before 0.52"


def test_between_the_usual_positions_a_few_are_tried_and_none_counts_that_breaks_the_promise() -> None:
    """A limit with a kink at 0.6, which no curve through the usual positions knows of."""

    def losses(x: np.ndarray) -> tuple[float, list[float]]:
        return -float(x[0]), [-0.1 * float(x[0]) + 2.0 * max(0.0, float(x[0]) - 0.6)]

    chosen, trials, found = driven(losses, 1, per_copy=False)
    further = [trial.alphas[0] for trial in trials[len(COMMON) :]]
    assert 1 <= len(further) <= BETWEEN and all(0.5 < alpha < 0.75 for alpha in further)
    assert {trial.tried_as for trial in trials} == {"common"}
    assert max(found[chosen].limits) <= 0 and chosen[0] >= 0.5


def test_what_gains_less_than_a_thousandth_is_not_evaluated() -> None:
    _, trials, _ = driven(lambda x: (float((x[0] - 0.74) ** 2), [-0.1 * float(x[0])]), 1, per_copy=False)
    assert [trial.alphas for trial in trials] == [(alpha,) for alpha in COMMON]


def test_with_room_for_everything_all_is_turned_up_that_helps() -> None:
    chosen, _, _ = driven(separable, 2, max_rise=10.0)
    assert chosen == (1.0, 1.0)


def test_where_nothing_but_the_base_keeps_the_promise_the_base_is_chosen() -> None:
    chosen, _, found = driven(lambda x: (-float(x.sum()), [float(x.sum())]), 3)
    assert chosen == (0.0, 0.0, 0.0)
    assert len(found) >= 5 + 6, "each copy was tried by itself"


def test_a_copy_that_harms_is_turned_off_where_only_0_is_common() -> None:
    chosen, _, _ = driven(lambda x: (-float(x.sum()), [float(-0.1 * x[0] + 2 * x[1])]), 2)
    assert chosen[0] == 1.0 and chosen[1] <= 0.05


def test_every_source_has_to_keep_it() -> None:
    """Two sources that each forbid the opposite half."""
    losses: Losses = lambda x: (-float(x.sum()), [float(x[0] - 0.5), float(x[1] - 0.25)])  # noqa: E731
    chosen, _, _ = driven(losses, 2)
    assert chosen == (0.5, 0.25)


def test_a_proposal_that_does_not_keep_its_promise_counts_for_nothing() -> None:
    """What copies do together is not the sum of what each does: only the evaluation knows."""

    def losses(x: np.ndarray) -> tuple[float, list[float]]:
        together = 50.0 * max(0.0, float(x[0]) - 0.4) * max(0.0, float(x[1]) - 0.4)
        return -float(x.sum()), [float(0.2 * x[0] - 0.3 + 0.2 * x[1]) + together]

    chosen, trials, found = driven(losses, 2)
    proposed = [trial.alphas for trial in trials if trial.tried_as == "proposed"]
    assert proposed and max(found[proposed[0]].limits) > 0
    assert max(found[chosen].limits) <= 0
    assert found[chosen].domain == min(of.domain for of in found.values() if max(of.limits) <= 0)


def test_a_method_without_copies_has_one_number_and_no_single_copies() -> None:
    chosen, trials, _ = driven(lambda x: (float((x[0] - 0.7) ** 2), [-0.1 * float(x[0])]), 1, per_copy=False)
    assert chosen == (0.7,)
    assert [trial.alphas for trial in trials] == [(alpha,) for alpha in (*COMMON, 0.7)]


def test_a_single_copy_is_turned_between_the_usual_positions() -> None:
    """To the minimum at 0.7, which no usual position is; no position is evaluated twice."""
    chosen, trials, _ = driven(lambda x: (float((x[0] - 0.7) ** 2), [-0.1 * float(x[0])]), 1)
    assert chosen == (0.7,)
    assert len({trial.alphas for trial in trials}) == len(trials)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_is_the_best_of_all_that_was_evaluated(seed: int) -> None:
    noise = np.random.default_rng(seed)
    a, b = noise.normal(-0.5, 1, 3), noise.normal(0, 1, 3)

    def losses(x: np.ndarray) -> tuple[float, list[float]]:
        return float(a @ x + 0.5 * np.prod(x)), [float(b @ x + 0.3 * (x**2).sum())]

    chosen, _, found = driven(losses, 3, 0.02)
    assert found[chosen].domain == min(of.domain for of in found.values() if max(of.limits) <= 0.02)
