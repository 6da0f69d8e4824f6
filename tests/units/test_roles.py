"""Which side a unit matters to: by rank on each side, norms apart."""

from __future__ import annotations

import pytest

from adept_ds.units.registry import Unit
from adept_ds.units.roles import roles_of_units

MATRICES = [Unit(f"m{number}", "matrix", 0, "mlp", 10) for number in range(10)]
NORMS = [Unit(f"n{number}", "norm", 0, "norm", 10) for number in range(5)]


def test_a_unit_has_one_of_four_roles() -> None:
    general, domain = [*map(float, range(10))], [0.0, 1.0, 2.0, 3.0, 9.0, 5.0, 6.0, 7.0, 4.0, 8.0]
    roles = roles_of_units(general, domain, MATRICES, 0.3)
    assert roles == ["idle"] * 4 + ["domain"] + ["idle"] * 2 + ["shared", "general", "shared"]


def test_only_the_order_of_importances_matters() -> None:
    general, domain = [1.0, 5.0, 2.0, 9.0, 4.0], [3.0, 1.0, 4.0, 1.5, 9.0]
    roles = roles_of_units(general, domain, MATRICES[:5], 0.5)
    assert (
        roles_of_units([value**3 for value in general], [1e-9 * value for value in domain], MATRICES[:5], 0.5) == roles
    )


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_norms_and_all_else_are_ranked_apart(factor: float) -> None:
    values = [*map(float, range(10)), *(factor * number for number in range(5))]
    roles = roles_of_units(values, [1.0] * 15, [*MATRICES, *NORMS], 0.2)
    assert [unit for unit, role in zip([*MATRICES, *NORMS], roles, strict=True) if role == "general"] == [
        *MATRICES[8:],
        NORMS[4],
    ]


def test_where_all_are_equal_none_is_important() -> None:
    assert set(roles_of_units([2.0] * 10, [0.0] * 10, MATRICES, 0.5)) == {"idle"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_no_importance_can_be_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="importance of unit 'm3' is "):
        roles_of_units([1.0] * 10, [1.0] * 3 + [value] + [1.0] * 6, MATRICES, 0.5)
