"""What the map from unit importance to learning-rate multipliers promises."""

from __future__ import annotations

import math
import random
import statistics
import time
from itertools import pairwise
from typing import Any

import pytest

from adept_ds.config.rate_sections import LrPolicySection
from adept_ds.units.lr_policy import multipliers_from_importance, smooth
from adept_ds.units.registry import Unit, UnitKind

LINEAR, CONSTANT, OFFICIAL = LrPolicySection(), LrPolicySection(map="constant"), LrPolicySection(preset="official")
MAPS: dict[str, dict[str, Any]] = {
    "linear": {},
    "power": {"power": 3.0},
    "power below 1": {"power": 0.5},
    "exponential": {"temperature": 4.0},
    "exponential, almost linear": {"temperature": 1e-9},
    "exponential, very steep": {"temperature": 2000.0},
    "step": {"threshold": 0.3, "low": 0.25, "high": 1.75},
    "rank": {},
    "constant": {},
}
SCOPES = ("all", "norms_apart", "per_kind", "per_layer")
_POLICIES: dict[str, LrPolicySection] = {
    f"{name}, {scope}": LrPolicySection.model_validate({"map": name.split()[0].strip(","), "scope": scope} | options)
    for name, options in MAPS.items()
    for scope in SCOPES
}
POLICIES = [pytest.param(policy, id=name) for name, policy in _POLICIES.items()]
LEARNS_FROM_IMPORTANCE = [pytest.param(p, id=name) for name, p in _POLICIES.items() if p.map != "constant"]

NORMS = ("input_layernorm", "post_attention_layernorm")
PARTS: dict[str, tuple[UnitKind, int, int]] = {
    "self_attn.q_proj": ("matrix", 1, 4096),
    "self_attn.v_proj": ("matrix", 1, 1024),
    "mlp.up_proj": ("matrix", 1, 12288),
    "self_attn.head": ("head", 4, 2048),
    "self_attn.kv_head": ("head", 2, 512),
    "mlp.neuron": ("neuron", 16, 192),
    **dict.fromkeys(NORMS, ("norm", 1, 64)),
}
"""Part -> kind, number in a layer, elements of each. More than one granularity has at once, to mix scales."""

UNITS = [
    Unit(f"layers.{layer}.{part}" + (f".{number}" if count > 1 else ""), kind, layer, part, numel)
    for layer in (2, 5, 6)
    for part, (kind, count, numel) in PARTS.items()
    for number in range(count)
]
LAYER = [Unit(f"layers.2.{part}", "matrix", 2, part, 100) for part in ("q", "k", "v", "o")] + [
    Unit(f"layers.2.{part}", "norm", 2, part, 10) for part in NORMS
]


def random_importance(seed: int, units: list[Unit] = UNITS) -> list[float]:
    """Log-uniform over six decades, norms a thousand times larger, some units equal and some exactly zero."""
    draw = random.Random(seed)
    values = [10 ** draw.uniform(-9, -3) * (1e3 if unit.kind == "norm" else 1.0) for unit in units]
    for _ in range(len(units) // 6):
        values[draw.randrange(len(units))] = draw.choice((0.0, draw.choice(values)))
    return values


def scopes(units: list[Unit], scope: str) -> list[list[int]]:
    """Indices by scope, read off the units' names."""
    groups: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        _, layer, path = unit.name.split(".", 2)
        norm = "norm" if "layernorm" in path else "other"
        part = path.rstrip("0123456789").rstrip(".")
        key = {"all": "", "norms_apart": norm, "per_kind": part, "per_layer": layer + norm}[scope]
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def test_multipliers_are_what_the_paper_computes_inside_each_scope() -> None:
    importance = [3e-6, 1e-6, 5e-6, 2e-6, 4e-3, 8e-3]
    # 2 * (1 - (I - min) / (max - min)), by hand; norms are a thousand times larger and stand apart
    expected = [1.0, 2.0, 0.0, 1.5, 2.0, 0.0]
    multipliers = multipliers_from_importance(importance, LAYER, LINEAR)
    assert multipliers == pytest.approx(expected, abs=1e-12)  # rounding of a few float64 operations


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # of importances 1, 2, 3 and 9, scaled to 0, 1/8, 1/4 and 1; by hand
        pytest.param({"map": "linear"}, [2.0, 1.75, 1.5, 0.0], id="linear"),
        pytest.param({"map": "power"}, [2.0, 2 * 49 / 64, 2 * 9 / 16, 0.0], id="power, squared by default"),
        pytest.param({"map": "power", "power": 1.0}, [2.0, 1.75, 1.5, 0.0], id="power 1 is linear"),
        pytest.param(  # exp(-t s) is 1, 1/2, 1/4 and 1/256
            {"map": "exponential", "temperature": 8 * math.log(2)},
            [2.0, 2 * (1 / 2 - 1 / 256) / (255 / 256), 2 * (1 / 4 - 1 / 256) / (255 / 256), 0.0],
            id="exponential",
        ),
        pytest.param({"map": "exponential", "temperature": 1e-12}, [2.0, 1.75, 1.5, 0.0], id="shallow is linear"),
        pytest.param({"map": "exponential", "temperature": 1e4}, [2.0, 0.0, 0.0, 0.0], id="steep spares the least"),
        pytest.param({"map": "step"}, [2.0, 2.0, 2.0, 0.0], id="step, at one half by default"),
        pytest.param({"map": "step", "threshold": 0.25}, [2.0, 2.0, 0.0, 0.0], id="at the threshold is important"),
        pytest.param({"map": "step", "threshold": 0.26}, [2.0, 2.0, 2.0, 0.0], id="below the threshold is not"),
        pytest.param({"map": "step", "threshold": 0.0, "low": 0.5}, [0.5] * 4, id="all are above a threshold of 0"),
        pytest.param({"map": "step", "threshold": 1, "low": 0.5, "high": 3}, [3.0, 3.0, 3.0, 0.5], id="step levels"),
        pytest.param({"map": "rank"}, [2.0, 4 / 3, 2 / 3, 0.0], id="rank"),
        pytest.param({"map": "constant"}, [1.0] * 4, id="constant"),
    ],
)
def test_every_map_is_its_formula(options: dict[str, Any], expected: list[float]) -> None:
    multipliers = multipliers_from_importance([1.0, 2.0, 3.0, 9.0], LAYER[:4], LrPolicySection(**options))
    assert multipliers == pytest.approx(expected, abs=1e-11)  # a temperature of 1e-12 differs from linear by as much


def test_equal_importances_share_their_mean_rank() -> None:
    multipliers = multipliers_from_importance([5.0, 7.0, 5.0, 9.0], LAYER[:4], LrPolicySection(map="rank"))
    assert multipliers == pytest.approx([5 / 3, 2 / 3, 5 / 3, 0.0], abs=1e-12)  # ranks 1/2, 2, 1/2, 3 of 3


@pytest.mark.parametrize(
    ("scope", "expected"),
    [  # two layers of q (1, 3 and 5, 9), their norms 100 and 101; by hand
        ("all", [2.0, 2 * 0.98, 2 * 0.01, 2 * 0.96, 2 * 0.92, 0.0]),
        ("norms_apart", [2.0, 1.5, 2.0, 1.0, 0.0, 0.0]),
        ("per_kind", [2.0, 2.0, 2.0, 0.0, 0.0, 0.0]),
        ("per_layer", [2.0, 0.0, 1.0, 2.0, 0.0, 1.0]),
    ],
)
def test_a_scope_holds_the_units_that_its_name_says(scope: str, expected: list[float]) -> None:
    units = [
        Unit(f"layers.{layer}.{part}", "norm" if part == "input_layernorm" else "matrix", layer, part, 1)
        for layer in (0, 1)
        for part in ("q", "k", "input_layernorm")
    ]
    multipliers = multipliers_from_importance(
        [1.0, 3.0, 100.0, 5.0, 9.0, 101.0], units, LrPolicySection.model_validate({"scope": scope})
    )
    assert multipliers == pytest.approx(expected, abs=1e-12)


def test_heads_and_neurons_are_scaled_together_apart_from_norms() -> None:
    units = [
        Unit("layers.0.self_attn.head.0", "head", 0, "self_attn.head", 8),
        Unit("layers.0.self_attn.kv_head.0", "head", 0, "self_attn.kv_head", 4),
        Unit("layers.0.mlp.neuron.0", "neuron", 0, "mlp.neuron", 3),
        Unit("layers.0.input_layernorm", "norm", 0, "input_layernorm", 4),
        Unit("layers.1.input_layernorm", "norm", 1, "input_layernorm", 4),
    ]
    multipliers = multipliers_from_importance([3.0, 2.0, 1.0, 700.0, 500.0], units, LINEAR)
    assert multipliers == [0.0, 1.0, 2.0, 0.0, 2.0]


@pytest.mark.parametrize("policy", POLICIES)
def test_multipliers_stay_between_low_and_high(policy: LrPolicySection) -> None:
    low, high = (policy.low, policy.high) if policy.map == "step" else (0.0, 2.0)
    for seed in range(20):
        multipliers = multipliers_from_importance(random_importance(seed), UNITS, policy)
        assert all(type(multiplier) is float and low <= multiplier <= high for multiplier in multipliers)


@pytest.mark.parametrize("policy", LEARNS_FROM_IMPORTANCE)
def test_the_extremes_of_a_scope_are_reached_exactly(policy: LrPolicySection) -> None:
    low, high = (policy.low, policy.high) if policy.map == "step" else (0.0, 2.0)
    for seed in range(20):
        distinct = [value * (1 + index / 1e6) + 1e-12 * index for index, value in enumerate(random_importance(seed))]
        multipliers = multipliers_from_importance(distinct, UNITS, policy)
        for members in scopes(UNITS, policy.scope):
            most, least = max(members, key=distinct.__getitem__), min(members, key=distinct.__getitem__)
            assert (multipliers[most], multipliers[least]) == (low, high)


@pytest.mark.parametrize("mean", [False, True], ids=["plain", "preserve_mean"])
@pytest.mark.parametrize("policy", LEARNS_FROM_IMPORTANCE)
def test_a_more_important_unit_never_moves_faster(policy: LrPolicySection, mean: bool) -> None:
    policy = policy.model_copy(update={"preserve_mean": mean})
    for seed in range(20):
        importance = random_importance(seed)
        multipliers = multipliers_from_importance(importance, UNITS, policy)
        for members in scopes(UNITS, policy.scope):
            for lower, higher in pairwise(sorted(members, key=importance.__getitem__)):
                # Two roundings of exp or pow may differ by their last bit.
                assert multipliers[lower] >= multipliers[higher] * (1 - 1e-15)
                assert importance[lower] < importance[higher] or multipliers[lower] == multipliers[higher]


@pytest.mark.parametrize("mean", [False, True], ids=["plain", "preserve_mean"])
@pytest.mark.parametrize("value", [0.0, 1e-12, 0.1, 7.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_constant_importances_change_nothing(policy: LrPolicySection, value: float, mean: bool) -> None:
    policy = policy.model_copy(update={"preserve_mean": mean})
    assert multipliers_from_importance([value] * len(UNITS), UNITS, policy) == [1.0] * len(UNITS)


@pytest.mark.parametrize("policy", [*POLICIES, pytest.param(OFFICIAL, id="official")])
def test_a_unit_alone_has_multiplier_1(policy: LrPolicySection) -> None:
    for unit in (UNITS[0], UNITS[-1]):
        assert multipliers_from_importance([3e-5], [unit], policy) == [1.0]
    assert multipliers_from_importance([], [], policy) == []


def test_one_scope_may_be_constant_while_the_other_is_not() -> None:
    assert multipliers_from_importance([1.0, 2.0, 3.0, 3.0, 9.0, 9.0], LAYER, LINEAR) == [2.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_the_map_constant_ignores_importance() -> None:
    assert multipliers_from_importance([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], LAYER, CONSTANT) == [1.0] * 6


@pytest.mark.parametrize("mean", [False, True], ids=["plain", "preserve_mean"])
@pytest.mark.parametrize("policy", [*POLICIES, pytest.param(OFFICIAL, id="official")])
def test_the_order_of_the_units_does_not_matter(policy: LrPolicySection, mean: bool) -> None:
    policy = policy.model_copy(update={"preserve_mean": mean})
    for seed in range(10):
        importance = random_importance(seed)
        order = random.Random(seed).sample(range(len(UNITS)), len(UNITS))
        shuffled = multipliers_from_importance([importance[i] for i in order], [UNITS[i] for i in order], policy)
        straight = multipliers_from_importance(importance, UNITS, policy)
        # numpy's exp and pow may round the last elements of a vector, which fill no register, in another way
        assert shuffled == pytest.approx([straight[i] for i in order], rel=1e-14, abs=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_ranks_ignore_outliers_and_every_monotone_transformation(scope: str) -> None:
    policy = LrPolicySection.model_validate({"map": "rank", "scope": scope})
    for seed in range(20):
        importance = random_importance(seed)
        multipliers = multipliers_from_importance(importance, UNITS, policy)
        assert multipliers_from_importance([value**3 for value in importance], UNITS, policy) == multipliers
        largest = max(importance)
        with_outlier = [1e308 if value == largest else value * 1e-12 for value in importance]
        assert multipliers_from_importance(with_outlier, UNITS, policy) == multipliers


@pytest.mark.parametrize("seed", range(20))
def test_ranks_keep_the_mean_over_units(seed: int) -> None:
    multipliers = multipliers_from_importance(random_importance(seed), UNITS, LrPolicySection(map="rank", scope="all"))
    assert math.fsum(multipliers) / len(UNITS) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("policy", LEARNS_FROM_IMPORTANCE)
def test_preserve_mean_keeps_the_mean_over_parameters_and_all_ratios(policy: LrPolicySection) -> None:
    for seed in range(20):
        importance = random_importance(seed)
        plain = multipliers_from_importance(importance, UNITS, policy)
        kept = multipliers_from_importance(importance, UNITS, policy.model_copy(update={"preserve_mean": True}))
        for members in scopes(UNITS, policy.scope):
            numel = math.fsum(UNITS[i].numel for i in members)
            assert math.fsum(UNITS[i].numel * kept[i] for i in members) / numel == pytest.approx(1.0, abs=1e-12)
            for i, j in pairwise(members):
                # Smaller products are subnormal and have fewer digits.
                assert kept[i] * plain[j] == pytest.approx(kept[j] * plain[i], rel=1e-12, abs=1e-300)


def test_multipliers_that_are_all_zero_stay_so() -> None:
    policy = LrPolicySection(map="step", threshold=0.0, preserve_mean=True)
    assert multipliers_from_importance([1.0, 2.0, 3.0, 4.0], LAYER[:4], policy) == [0.0] * 4


def test_limits_act_last_and_everywhere() -> None:
    importance = [1.0, 2.0, 3.0, 9.0, 5.0, 5.0]  # linear: 2, 1.75, 1.5, 0 and twice 1; mean of the matrices 5.25 / 4
    limited = LrPolicySection(min_multiplier=0.25, max_multiplier=1.6)
    assert multipliers_from_importance(importance, LAYER, limited) == [1.6, 1.6, 1.5, 0.25, 1.0, 1.0]
    kept = LrPolicySection(min_multiplier=0.25, max_multiplier=1.5, preserve_mean=True)
    expected = [1.5, 4 / 3, 8 / 7, 0.25, 1.0, 1.0]
    assert multipliers_from_importance(importance, LAYER, kept) == pytest.approx(expected, abs=1e-12)
    frozen = LrPolicySection(max_multiplier=0.0)
    assert multipliers_from_importance(importance, LAYER, frozen) == [0.0] * 6


# Importances for general competence and for the domain, of two layers of q, k and a norm each.
BOTH_SIDES = [2.0, 8.0, 900.0, 4.0, 4.0, 100.0], [2.0, 2.0, 30.0, 1.0, 9.0, 70.0]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_map_ratio_compares_the_units_of_a_scope(scope: str) -> None:
    """By hand but for the mean; without limits, so that proportions are all there is."""
    units = [
        Unit(f"layers.{layer}.{part}", "norm" if part == "input_layernorm" else "matrix", layer, part, numel)
        for layer in (0, 1)
        for part, numel in (("q", 300), ("k", 100), ("input_layernorm", 10))
    ]
    general, domain = BOTH_SIDES
    policy = LrPolicySection.model_validate(
        {"map": "ratio", "scope": scope, "min_multiplier": 0, "max_multiplier": None}
    )
    found = multipliers_from_importance(general, units, policy, domain)
    for members in scopes(units, scope):
        eps = 0.01 * statistics.median(general[unit] for unit in members)
        ratios = [math.sqrt(domain[unit] / (general[unit] + eps)) for unit in members]
        mean = math.fsum(units[unit].numel * ratio for unit, ratio in zip(members, ratios, strict=True))
        mean /= sum(units[unit].numel for unit in members)
        assert [found[unit] for unit in members] == pytest.approx([ratio / mean for ratio in ratios], rel=1e-12)


def test_the_map_ratio_keeps_its_mean_within_its_limits_in_every_scope() -> None:
    for scope in SCOPES:
        policy = LrPolicySection.model_validate({"map": "ratio", "scope": scope})
        for seed in range(10):
            found = multipliers_from_importance(random_importance(seed), UNITS, policy, random_importance(seed + 100))
            assert all(0.25 <= multiplier <= 4.0 for multiplier in found)
            for members in scopes(UNITS, scope):
                numel = math.fsum(UNITS[i].numel for i in members)
                assert math.fsum(UNITS[i].numel * found[i] for i in members) / numel == pytest.approx(1.0, abs=1e-12)


def test_linear_with_preserve_mean_by_hand() -> None:
    """Scaled to 0, 1/8, 1/4, 1: multipliers 2, 1.75, 1.5, 0; with 100, 100, 100 and 500 parameters their mean is
    525 / 800. The norms, 5 and 7, have 2 and 0, and as many parameters each."""
    sizes = {"q": 100, "k": 100, "v": 100, "o": 500}
    units = [Unit(f"layers.2.{part}", "matrix", 2, part, numel) for part, numel in sizes.items()]
    found = multipliers_from_importance(
        [1.0, 2.0, 3.0, 9.0, 5.0, 7.0], [*units, *LAYER[4:]], LrPolicySection(preserve_mean=True)
    )
    mean = 525 / 800
    assert found == pytest.approx([2 / mean, 1.75 / mean, 1.5 / mean, 0.0, 2.0, 0.0], rel=1e-14)
    assert math.fsum(found[unit] * units[unit].numel for unit in range(4)) == pytest.approx(800, rel=1e-14)


def test_the_map_ratio_needs_both_sides_and_names_the_one_at_fault() -> None:
    ratio = LrPolicySection(map="ratio")
    with pytest.raises(ValueError, match="ratio needs importances for the domain too"):
        multipliers_from_importance([1.0] * 6, LAYER, ratio)
    with pytest.raises(ValueError, match="5 importances for the domain for 6 units"):
        multipliers_from_importance([1.0] * 6, LAYER, ratio, [1.0] * 5)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=rf"'layers\.2\.k' for the domain is {bad}"):
            multipliers_from_importance([1.0] * 6, LAYER, ratio, [1.0, bad, 1.0, 1.0, 1.0, 1.0])
        with pytest.raises(ValueError, match=rf"'layers\.2\.k' is {bad}"):
            multipliers_from_importance([1.0, bad, 1.0, 1.0, 1.0, 1.0], LAYER, ratio, [1.0] * 6)


def test_other_maps_do_not_look_at_the_domain() -> None:
    importance = random_importance(0)
    for policy in (LINEAR, OFFICIAL, CONSTANT):
        alone = multipliers_from_importance(importance, UNITS, policy)
        assert multipliers_from_importance(importance, UNITS, policy, random_importance(1)) == alone


def test_official_scales_norms_by_the_range_of_all_units_and_matrices_by_their_own() -> None:
    # Range of all units: 1 to 9; of the matrices: 1 to 5. By hand.
    multipliers = multipliers_from_importance([3.0, 1.0, 5.0, 2.0, 7.0, 9.0], LAYER, OFFICIAL)
    assert multipliers == pytest.approx([1.0, 2.0, 0.0, 1.5, 0.5, 0.0], abs=1e-12)


def test_official_holds_where_a_matrix_is_the_most_important_unit() -> None:
    multipliers = multipliers_from_importance([3.0, 2.0, 10.0, 4.0, 0.0, 5.0], LAYER, OFFICIAL)
    assert multipliers == pytest.approx([1.75, 2.0, 0.0, 1.5, 2.0, 1.0], abs=1e-12)


def test_official_leaves_matrices_as_the_default_does_and_nearly_stops_norms_of_similar_importance() -> None:
    importance = [3e-6, 1e-6, 5e-6, 2e-6, 7.9e-3, 8e-3]
    official = multipliers_from_importance(importance, LAYER, OFFICIAL)
    default = multipliers_from_importance(importance, LAYER, LINEAR)
    assert official[:4] == default[:4]
    assert default[4] == 2.0
    assert official[4] == pytest.approx(2 * 0.1 / 8, rel=1e-3)  # the least of all units is 1e-6, not 0


@pytest.mark.parametrize("equal", [0.0, 3.0])
def test_official_changes_nothing_where_a_range_is_empty(equal: float) -> None:
    assert multipliers_from_importance([equal] * 6, LAYER, OFFICIAL) == [1.0] * 6
    norms_differ = multipliers_from_importance([equal] * 4 + [4.0, 5.0], LAYER, OFFICIAL)
    assert norms_differ[:4] == [1.0] * 4
    assert norms_differ[5] == 0.0


@pytest.mark.parametrize("policy", [*POLICIES, pytest.param(OFFICIAL, id="official")])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_an_impossible_importance_is_refused_and_its_unit_named(bad: float, policy: LrPolicySection) -> None:
    importance = [1.0] * len(UNITS)
    importance[[unit.name for unit in UNITS].index("layers.5.self_attn.v_proj")] = bad
    with pytest.raises(ValueError, match=rf"'layers\.5\.self_attn\.v_proj' is {bad}"):
        multipliers_from_importance(importance, UNITS, policy)


def test_a_wrong_number_of_importances_is_refused() -> None:
    with pytest.raises(ValueError, match="5 importances for 6 units"):
        multipliers_from_importance([1.0] * 5, LAYER, LINEAR)


def test_smoothing_keeps_the_given_share_of_the_previous_value() -> None:
    assert smooth([4.0, 0.0], [8.0, 1.0], 0.75) == [5.0, 0.25]
    assert smooth(None, [8.0, 1.0], 0.75) == [8.0, 1.0], "the first value stands alone"
    importance = random_importance(0)
    assert smooth(random_importance(1), importance, 0.0) == importance, "no smoothing changes no bit"


def test_smoothing_over_refreshes_is_an_exponential_moving_average() -> None:
    history = [random_importance(seed) for seed in range(6)]
    held: list[float] | None = None
    for importance in history:
        held = smooth(held, importance, 0.6)
    weights = [0.6**5] + [0.4 * 0.6 ** (5 - age) for age in range(1, 6)]
    expected = [math.fsum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*history, strict=True)]
    assert held == pytest.approx(expected, rel=1e-12, abs=0)


def test_importances_of_other_units_are_not_averaged() -> None:
    with pytest.raises(ValueError, match="6 importances cannot be averaged with 5"):
        smooth([1.0] * 5, [1.0] * 6, 0.5)


@pytest.mark.parametrize("scope", SCOPES)
def test_sixty_thousand_units_are_mapped_within_seconds(scope: str) -> None:
    """Far above what it takes, and far below what a loop over pairs or over scopes times units would."""
    units = [Unit(f"layers.{n % 40}.mlp.neuron.{n // 40}", "neuron", n % 40, "mlp.neuron", 1728) for n in range(60_000)]
    importance = random_importance(0, units)
    start = time.perf_counter()
    policy = LrPolicySection.model_validate({"map": "rank", "scope": scope, "preserve_mean": True})
    multipliers_from_importance(importance, units, policy)
    assert time.perf_counter() - start < 5
