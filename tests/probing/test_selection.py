"""Which layers are chosen, and how many: rules on curves whose answer is known by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adept_ds.base.errors import InputError
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.probing.model_size import ModelSize
from adept_ds.probing.selection import knee, layers_without_probe, lowest_layers, select_layers, uniform_layers

SIZE = ModelSize((10,) * 6, 30, (10.0,) * 6, 20)
"""Six layers of 10 parameters, 30 others, 20 of them the head."""
DELTAS = [0.9, 0.1, 0.5, 0.3, 0.2, 5.0]


def select(deltas: list[float] = DELTAS, replicates: Any = None, size: ModelSize = SIZE, **section: Any) -> Any:
    return select_layers(ExpandSection(**section), deltas, size, 0, replicates)


# --- which ---------------------------------------------------------------------------------------------------------


def test_lowest_and_highest_deltas_are_chosen_and_ties_go_to_the_lower_layer() -> None:
    assert select(k=2).layers == (1, 4)
    assert select(k=2, choose="highest").layers == (0, 5)
    assert select([1.0, 0.5, 0.5, 0.5], k=2).layers == (1, 2)
    assert select([1.0, 1.0, 0.5, 1.0], k=2, choose="highest").layers == (0, 1)
    assert lowest_layers([-1.0, 2.0, -3.0], 2) == [0, 2]


def test_uniform_is_llama_pros_interleaving() -> None:
    """LLaMA-Pro: Llama-2's 32 layers in 8 groups of 4, a copy on top of each."""
    assert uniform_layers(32, 8) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert uniform_layers(30, 4) == [6, 14, 21, 29]  # groups of 7, 8, 7, 8
    for num_layers in range(1, 20):
        for k in range(1, num_layers + 1):
            tops = uniform_layers(num_layers, k)
            sizes = np.diff([-1, *tops])
            assert len(tops) == k
            assert tops[-1] == num_layers - 1
            assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("choose", ["lowest", "highest", "uniform", "random", "last"])
def test_layers_that_are_spared_do_not_count_for_anything(choose: str) -> None:
    """The choice is that of a model without them."""
    replicates = np.random.default_rng(0).normal(DELTAS, 0.3, (50, 6))
    found = select(k=3, choose=choose, spare_top=2, replicates=replicates.tolist())
    expected = select(DELTAS[:4], k=3, choose=choose, replicates=replicates[:, :4].tolist())
    assert (found.layers, found.rules, found.within_noise) == (expected.layers, expected.rules, expected.within_noise)
    assert found.reason == f"{expected.reason}; the last 2 layers are spared"


def test_evenly_spread_layers_that_spare_the_last() -> None:
    section = ExpandSection(k=8, choose="uniform", spare_top=2)
    assert layers_without_probe(section, 30, 0) == [2, 6, 9, 13, 16, 20, 23, 27]


def test_random_layers_depend_on_the_seed_alone() -> None:
    section = ExpandSection(k=3, choose="random")
    chosen = {seed: layers_without_probe(section, 12, seed) for seed in range(20)}
    assert chosen == {seed: layers_without_probe(section, 12, seed) for seed in range(20)}
    assert len({tuple(layers) for layers in chosen.values()}) > 10
    assert all(layers == sorted(set(layers)) and len(layers) == 3 for layers in chosen.values())
    assert {layer for layers in chosen.values() for layer in layers} == set(range(12))


def test_a_list_to_choose_means_the_same_as_layers() -> None:
    listed, chosen = ExpandSection(layers=[4, 2]), ExpandSection.model_validate({"choose": [4, 2]})
    assert listed == chosen
    assert layers_without_probe(chosen, 6, 0) == [2, 4]


# --- how many ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        pytest.param([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0], 4, id="flat, then a ramp"),
        pytest.param([0.0, 0.1, 0.2, 1.2, 2.2, 3.2], 3, id="two slopes"),
        pytest.param([0.0, 1.0, 2.0, 3.0, 4.0], 1, id="a straight line"),
        pytest.param([1.0, 1.0, 1.0], 1, id="all the same"),
        pytest.param([0.0, 2.0, 3.0, 3.5, 3.7, 3.8], 1, id="steep first"),
        pytest.param([-0.3, -0.29, -0.28, 0.4, 0.9, 1.5], 3, id="negative ones"),
        pytest.param([0.7], 1, id="one layer"),
        pytest.param([0.2, 0.7], 1, id="two layers"),
    ],
)
def test_the_knee_is_where_the_sorted_deltas_begin_to_rise(deltas: list[float], expected: int) -> None:
    shuffled = np.random.default_rng(0).permutation(deltas).tolist()
    assert knee(shuffled) == expected


def test_a_layer_that_nothing_works_without_does_not_move_the_knee() -> None:
    curve = [0.0, 0.02, 0.03, 0.05, 0.5, 0.9, 1.4, 1.8, 2.2, 2.6]
    assert knee(curve) == 4
    assert knee([*curve[:-1], 1e6]) == 4
    # with all of them, the line to the outlier lies above everything, and the knee just before it
    far = np.array([*curve[:-1], 1e6])
    assert (np.linspace(0, 1, 10) - far / 1e6).argmax() + 1 == 9


def test_the_knee_does_not_depend_on_unit_or_offset() -> None:
    """Deltas of another method are in other units."""
    curve = np.random.default_rng(1).gamma(0.5, size=24)
    assert {knee((curve * scale + offset).tolist()) for scale, offset in ((1, 0), (1e-9, 0), (1e6, 3), (2, -8))} == {
        knee(curve.tolist())
    }


def test_threshold_takes_deltas_below_a_share_of_the_median() -> None:
    # median 0.4: half of it is 0.2, which layer 4 has and is not below
    assert select(k="auto", rule="threshold").layers == (1,)
    assert select(k="auto", rule="threshold", threshold=0.8).layers == (1, 3, 4)
    assert select(k="auto", rule="threshold", threshold=0.01).layers == (1,), "at least one"
    assert select([-2.0, -1.0, -0.5, 0.1], k="auto", rule="threshold").layers == (0, 1)  # median -0.75


def test_budget_takes_as_many_as_both_limits_allow() -> None:
    # k copies: 10 k / (90 + 10 k) of the parameters, 10 k / 80 of a forward pass
    for k in range(1, 7):
        share, latency = 10 * k / (90 + 10 * k), 10 * k / 80
        assert select(k="auto", rule="budget", max_trainable_share=share + 1e-9).k == k
        assert select(k="auto", rule="budget", max_added_latency=latency + 1e-9).k == k
        if k > 1:
            assert select(k="auto", rule="budget", max_trainable_share=share - 1e-9).k == k - 1
            both: dict[str, Any] = {"max_trainable_share": share + 1e-9, "max_added_latency": latency - 1e-9}
            assert select(k="auto", rule="budget", **both).k == k - 1
    # in the order of choice: the cheap layers are the large ones here
    uneven = ModelSize((1, 40, 1, 1, 40, 1), 100, (1.0, 40.0, 1.0, 1.0, 40.0, 1.0), 20)
    assert select(k="auto", rule="budget", max_trainable_share=0.2, size=uneven).layers == (1,)
    assert select(k="auto", rule="budget", max_trainable_share=0.2, size=uneven, choose="highest").k == 5
    # tops of groups: 2 and 5; then 1, 3 and 5, where 1 is large
    assert select(k="auto", rule="budget", max_trainable_share=0.1, size=uneven, choose="uniform").layers == (2, 5)


def test_a_budget_that_no_copy_fits_is_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(
        InputError, match=r"expand\.max_trainable_share: 0\.05 does not allow .* layer 1 .* 0\.1; raise"
    ):
        select(k="auto", rule="budget", max_trainable_share=0.05)


def test_every_rule_says_what_it_would_have_given_and_why_this_k_came_out() -> None:
    found = select([0.0, 0.1, 0.2, 1.2, 2.2, 3.2], k="auto")
    assert (found.k, found.rule, found.rules) == (3, "knee", {"knee": 3, "threshold": 3})
    assert (
        found.reason
        == "k = 3: the knee of the sorted deltas; the next lowest delta is 1.2 (layer 3), 6.00 x that of number 3"
    )
    found = select(k="auto", rule="budget", max_trainable_share=0.2, max_added_latency=0.3)
    assert found.rules == {"knee": 3, "threshold": 1, "budget": 2}
    assert (
        "18.2% of the parameters train (limit 20.0%) and 25.0% is added to a forward pass (limit 30.0%)" in found.reason
    )
    limited = select(k="auto", max_trainable_share=0.2)
    assert (limited.k, limited.rule, limited.rules["knee"]) == (2, "knee", 3)
    assert "18.2% of the parameters train (limit 20.0%); knee alone would give 3;" in limited.reason
    assert select(k="auto", max_trainable_share=0.9).k == 3
    assert select(k=3).reason.startswith("k = 3: as configured; the next lowest delta is 0.5 (layer 2)")
    assert select().reason.startswith("k = 4: the default;")
    assert select(k=6).reason.endswith("no layer is left")
    assert select(k=1, choose="highest").reason == "k = 1: as configured; those with the highest delta are copied"
    low = select(k="auto", rule="threshold").reason
    assert low.startswith("k = 1: deltas below 0.2, 0.5 x the median; the next lowest delta is 0.2 (layer 4)")
    none = select(k="auto", rule="threshold", threshold=0.01).reason
    assert none.startswith("k = 1: one at least, though no delta is below 0.004, 0.01 x the median;")
    negative = select([-2.0, -1.0, -0.5, 0.1], k="auto", rule="threshold", size=SIZE).reason
    assert negative.startswith("k = 2: deltas below -0.75, the median;")
    assert select(k=3).rule is None


def test_a_delta_that_is_no_number_is_never_chosen_silently() -> None:
    with pytest.raises(InputError, match="the delta of layer 1 is nan"):
        select([0.1, math.nan, 0.3])


# --- how sure ------------------------------------------------------------------------------------------------------


def test_layers_whose_choice_another_sample_would_change_are_within_noise() -> None:
    """Layers 1 and 2 change places in a fifth of the samples, 0 and 3 in 4% of them."""
    often, seldom = [[0.0, 2.0, 1.0, 3.0]] * 20, [[3.0, 1.0, 2.0, 0.0]] * 4
    replicates = [[0.0, 1.0, 2.0, 3.0]] * 76 + often + seldom
    found = select([0.0, 1.0, 2.0, 3.0], replicates, ModelSize((1,) * 4, 0, (1.0,) * 4, 0), k=2)
    assert found.layers == (0, 1)
    assert found.within_noise == (1, 2)
    highest = select([0.0, 1.0, 2.0, 3.0], replicates, ModelSize((1,) * 4, 0, (1.0,) * 4, 0), k=2, choose="highest")
    assert highest.within_noise == (1, 2)
    assert select([0.0, 1.0, 2.0, 3.0], replicates, k=2, choose="uniform").within_noise == ()


# --- ties ------------------------------------------------------------------------------------------------------------


def scattered(deltas: list[float], *, common: float = 0.0, own: dict[int, float] | None = None) -> np.ndarray:
    """[1000, layers]: deltas that rise and fall together, and some also by themselves."""
    draw = np.random.default_rng(0)
    values = np.array(deltas) + common * draw.normal(size=(1000, 1))
    for layer, spread in (own or {}).items():
        values[:, layer] += spread * draw.normal(size=1000)
    return values


def test_of_layers_that_cannot_be_told_apart_the_highest_are_chosen() -> None:
    """Layers 1, 4 and 2 scatter as much as they differ; 3 does not, and 0 and 5 are far away."""
    deltas = [0.9, 0.30, 0.33, 0.5, 0.34, 5.0]
    replicates = scattered(deltas, own={1: 0.1, 2: 0.1, 4: 0.1})
    assert select(deltas, k=2).layers == (1, 2)
    found = select(deltas, replicates, k=2, tie_break="cost")
    assert found.layers == (2, 4)
    tie = found.tie_break
    assert (tie.lowest, tie.tied) == ((1, 2), (1, 2, 4))
    assert tie.rise == pytest.approx((0.34 - 0.30) / 2)
    assert tie.standard_error == pytest.approx(np.hypot(0.1, 0.1) / 2, rel=0.1)
    assert (tie.flops, tie.flops_of_lowest) == (None, None)
    assert select(deltas, replicates, k=2).layers == (1, 2), "only where it is asked for"
    assert select(deltas, replicates, k=2).tie_break is None


def test_where_the_limits_forbid_what_trains_faster_the_reason_says_so() -> None:
    """Layer 2 is as low as layer 0 and above it, and too large."""
    deltas, size = [0.30, 0.9, 0.31], ModelSize((10, 10, 40), 100, (1.0, 1.0, 4.0), 10)
    section = {"k": "auto", "rule": "budget", "max_trainable_share": 0.1, "tie_break": "cost"}
    found = select(deltas, scattered(deltas, own={0: 0.1, 2: 0.1}), size, **section)
    assert found.layers == (0,)
    assert found.reason.endswith("layers that train faster exceed the limits")


def test_what_layers_have_in_common_is_no_noise() -> None:
    """Every sample moves all deltas by ten times their differences, and all by the same."""
    deltas = [0.30, 0.32, 0.34, 0.36]
    found = select(deltas, scattered(deltas, common=0.2), ModelSize((1,) * 4, 0, (1.0,) * 4, 0), k=2, tie_break="cost")
    assert (found.layers, found.tie_break.tied) == ((0, 1), (1,))
    assert "tie_break: cost changes nothing" in found.reason
    assert found.tie_break.rise == found.tie_break.standard_error == 0


def test_a_layer_that_is_surely_lower_stays_and_only_what_saves_something_is_given_up() -> None:
    """Layer 1 is surely one of the lowest. Nothing above it costs less than anything else above it."""
    deltas = [0.50, 0.10, 0.48, 0.51, 0.49, 0.52]
    noise = {0: 0.2, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.2}
    found = select(deltas, scattered(deltas, own=noise), k=3, tie_break="cost")
    assert found.layers == (1, 2, 4), "the lowest deltas above layer 1, not the highest layers"
    first = [0.10, 0.49, 0.48, 0.51, 0.50, 0.47]
    assert select(
        first, scattered(first, own={0: 1e-3} | dict.fromkeys(range(1, 6), 0.2)), k=3, tie_break="cost"
    ).layers == (0, 2, 5)
    swapped = [0.47, 0.10, 0.48, 0.51, 0.49, 0.52]
    kept = select(swapped, scattered(swapped, own=noise), k=2, tie_break="cost")
    assert kept.layers == (1, 2), "layer 0 would be below layer 1"


def test_layers_with_equal_deltas_are_tied_even_without_noise() -> None:
    deltas = [0.5, 0.5, 0.5, 0.5]
    found = select(deltas, np.array([deltas] * 10), ModelSize((1,) * 4, 0, (1.0,) * 4, 0), k=2, tie_break="cost")
    assert found.layers == (2, 3)


def test_a_broken_tie_keeps_within_the_budget_and_says_what_it_saves() -> None:
    deltas = [0.30, 0.31, 0.9, 0.9, 0.32, 0.33]
    replicates = scattered(deltas, own=dict.fromkeys((0, 1, 4, 5), 0.2))
    even: dict[str, Any] = {"k": "auto", "rule": "budget", "max_trainable_share": 0.2, "tie_break": "cost"}
    section, samples = ExpandSection(**even), replicates.tolist()
    found = select_layers(section, deltas, SIZE, 0, samples, lambda layers: 100.0 - min(layers))
    assert found.layers == (4, 5)
    assert found.tie_break is not None
    assert (found.tie_break.flops, found.tie_break.flops_of_lowest) == (96, 100)
    assert "are copied: not 0, 1, but 4, 5 (mean delta +0.02 \u00b1 " in found.reason
    assert found.reason.endswith("which saves 4.0% of a training step's operations")
    uneven = ModelSize((10, 10, 10, 10, 30, 10), 30, (10.0,) * 6, 20)
    assert select(deltas, replicates, uneven, **even).layers == (0, 1), "layer 4 would be too much"
