"""What the map from unit importance to learning-rate multipliers promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from adept_ds.config import LrPolicySection
from adept_ds.families import FAMILIES
from adept_ds.lr_policy import multipliers_from_importance
from adept_ds.units import UnitRegistry, build_registry

LINEAR, CONSTANT = LrPolicySection(map="linear"), LrPolicySection(map="constant")
MATRICES = [f"model.layers.2.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
NORMS = [f"model.layers.2.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]


@pytest.fixture
def registry() -> UnitRegistry:
    return build_registry(FAMILIES["llama"], [*NORMS, *MATRICES], [2])


def by_name(values: list[float], registry: UnitRegistry) -> dict[str, float]:
    return {name.rpartition(".")[2]: value for name, value in zip(registry.names, values, strict=True)}


def importance_of(registry: UnitRegistry, **values: float) -> list[float]:
    return [values[name.rpartition(".")[2]] for name in registry.names]


def test_multipliers_are_what_the_paper_computes_inside_each_scope(registry: UnitRegistry) -> None:
    importance = importance_of(
        registry,
        q_proj=3e-6,
        k_proj=1e-6,
        v_proj=5e-6,
        o_proj=2e-6,
        input_layernorm=4e-3,
        post_attention_layernorm=8e-3,
    )
    multipliers = by_name(multipliers_from_importance(importance, registry, LINEAR), registry)
    expected = {  # 2 * (1 - (I - min) / (max - min)), by hand; norms are a thousand times larger and stand apart
        "q_proj": 1.0,
        "k_proj": 2.0,
        "v_proj": 0.0,
        "o_proj": 1.5,
        "input_layernorm": 2.0,
        "post_attention_layernorm": 0.0,
    }
    assert multipliers == pytest.approx(expected, abs=1e-12)  # rounding of a few float64 operations


def test_the_extremes_are_exactly_0_and_2(registry: UnitRegistry) -> None:
    importance = [0.1 * 3, 0.7, 1e-9, 0.1 + 0.2 + 1e-3, 1e-4, 2e-4]
    multipliers = multipliers_from_importance(importance, registry, LINEAR)
    for kind in ("matrix", "norm"):
        scope = [i for i, unit in enumerate(registry.units) if unit.kind == kind]
        most, least = max(scope, key=lambda i: importance[i]), min(scope, key=lambda i: importance[i])
        assert (multipliers[most], multipliers[least]) == (0.0, 2.0)
    assert all(0.0 <= multiplier <= 2.0 for multiplier in multipliers)


def test_a_more_important_unit_never_moves_faster(registry: UnitRegistry) -> None:
    importance = [5e-7, 2e-3, 2e-3, 9e-2, 0.0, 1e-30]
    multipliers = multipliers_from_importance(importance, registry, LINEAR)
    for kind in ("matrix", "norm"):
        scope = sorted((i for i, unit in enumerate(registry.units) if unit.kind == kind), key=lambda i: importance[i])
        for lower, higher in pairwise(scope):
            assert multipliers[lower] >= multipliers[higher]
            assert importance[lower] == importance[higher] or multipliers[lower] > multipliers[higher]


@pytest.mark.parametrize("value", [0.0, 1e-12, 7.0])
def test_constant_importances_change_nothing(registry: UnitRegistry, value: float) -> None:
    assert multipliers_from_importance([value] * len(registry), registry, LINEAR) == [1.0] * len(registry)


def test_one_scope_may_be_constant_while_the_other_is_not(registry: UnitRegistry) -> None:
    importance = importance_of(
        registry, q_proj=1.0, k_proj=2.0, v_proj=3.0, o_proj=3.0, input_layernorm=9.0, post_attention_layernorm=9.0
    )
    multipliers = by_name(multipliers_from_importance(importance, registry, LINEAR), registry)
    assert multipliers["input_layernorm"] == multipliers["post_attention_layernorm"] == 1.0
    assert (multipliers["q_proj"], multipliers["k_proj"], multipliers["v_proj"]) == (2.0, 1.0, 0.0)


def test_the_map_constant_ignores_importance(registry: UnitRegistry) -> None:
    assert multipliers_from_importance([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], registry, CONSTANT) == [1.0] * 6


@pytest.mark.parametrize("policy", [LINEAR, CONSTANT], ids=["linear", "constant"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_an_impossible_importance_is_refused_and_its_unit_named(
    registry: UnitRegistry, bad: float, policy: LrPolicySection
) -> None:
    importance = [1.0] * len(registry)
    importance[registry.names.index("layers.2.self_attn.v_proj")] = bad
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.v_proj"):
        multipliers_from_importance(importance, registry, policy)


def test_a_wrong_number_of_importances_is_refused(registry: UnitRegistry) -> None:
    with pytest.raises(ValueError, match="shorter"):
        multipliers_from_importance([1.0] * (len(registry) - 1), registry, LINEAR)
