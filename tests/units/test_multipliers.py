"""Multipliers of units: which there are, which elements they hold for, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from harness.flat_units import (
    MULTIPLIERS,
    PADDING,
    SIZES,
    SLICES,
    TOTAL,
    UNITS,
    flat_tensor,
    gradient,
    run_of,
    unit_adamw,
    unit_of,
)

from adept_ds.base.errors import InputError
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.multipliers import MULTIPLIERS_KEY, NAMES_KEY, attach_multipliers
from adept_ds.units.placement import Placement
from adept_ds.units.segments import UnitSlice


def test_multipliers_are_handed_out_as_a_copy() -> None:
    optimizer = unit_adamw(flat_tensor())
    optimizer.multipliers.values["a"] = 5.0
    assert optimizer.multipliers.values["a"] == 1.0


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        pytest.param([run_of(0, 8, "a"), run_of(7, 20, "b")], "7:20 of unit 'b'", id="overlapping"),
        pytest.param([run_of(7, 20, "b"), run_of(0, 7, "a")], "0:7 of unit 'a'", id="out of order"),
        pytest.param([run_of(0, TOTAL + PADDING + 1, "a")], "of unit 'a'", id="past the end"),
        pytest.param([run_of(-1, 5, "a")], "-1:5 of unit 'a'", id="before the start"),
        pytest.param([run_of(5, 5, "a")], "5:5 of unit 'a'", id="empty"),
        pytest.param([run_of(0, 5, "zz")], "unit number 99 was not declared", id="unknown unit"),
    ],
)
def test_impossible_slices_are_refused(slices: list[UnitSlice], message: str) -> None:
    flat = flat_tensor()
    with pytest.raises(ValueError, match=message):
        unit_adamw(flat, slices)


@pytest.mark.parametrize(
    ("multipliers", "at_fault"),
    [
        pytest.param({"a": 1.0, "b": 1.0, "c": 1.0}, "d", id="one missing"),
        pytest.param(dict.fromkeys([*SIZES, "zz"], 1.0), "zz", id="one too many"),
    ],
)
def test_multipliers_must_name_every_unit(multipliers: dict[str, float], at_fault: str) -> None:
    optimizer = unit_adamw(flat_tensor())
    optimizer.multipliers.set(MULTIPLIERS)
    with pytest.raises(ValueError, match=f"'{at_fault}'"):
        optimizer.multipliers.set(multipliers)
    assert optimizer.multipliers.values == MULTIPLIERS


def test_the_map_of_a_parameter_is_smaller_than_a_hundredth_of_its_state() -> None:
    """A down projection of 64 x 4096: one number per column instead of one per element."""
    flat = torch.zeros(64 * 4096, requires_grad=True)
    optimizer = UnitAdamW([flat])
    optimizer.multipliers.name_units([str(unit) for unit in range(4096)])
    optimizer.multipliers.bind(flat, [UnitSlice(0, flat.numel(), Placement((64, 4096), 0, axis=1))])
    assert 0 < optimizer.multipliers.map_bytes <= 0.02 * 2 * flat.numel() * flat.element_size()


def test_multipliers_hold_while_groups_are_stepped_one_after_the_other() -> None:
    """As DeepSpeed does at stages 1 and 2: it takes the other groups away meanwhile."""
    first, second = flat_tensor(0), flat_tensor(1)
    groups = [{"params": [first], "weight_decay": 0.1}, {"params": [second], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    multipliers = attach_multipliers(optimizer)
    multipliers.name_units(UNITS)
    for tensor in (first, second):
        multipliers.bind(tensor, SLICES)
        tensor.grad = gradient(0)
    multipliers.set(MULTIPLIERS)
    before, both = second.detach().clone(), optimizer.param_groups
    for group in both:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = both
    steps = {unit_of(piece): (second.detach() - before)[piece.start : piece.stop].abs() for piece in SLICES}
    for unit, factor in MULTIPLIERS.items():  # the first step of AdamW without decay is the learning rate
        torch.testing.assert_close(steps[unit], torch.full_like(steps[unit], 0.05 * factor), rtol=1e-5, atol=1e-7)
    assert multipliers.values == MULTIPLIERS


# --- in checkpoints --------------------------------------------------------------------------------------------------


def loaded(names: Sequence[str]) -> UnitAdamW:
    """An optimizer whose units have these names, after it loaded what one with `MULTIPLIERS` had saved."""
    before, after = unit_adamw(flat_tensor()), unit_adamw(flat_tensor())
    before.multipliers.set(MULTIPLIERS)
    after.multipliers.name_units(names)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    return after


def test_a_checkpoint_holds_four_bytes_a_unit_and_no_names() -> None:
    group = unit_adamw(flat_tensor()).state_dict()["param_groups"][0]
    assert (group[MULTIPLIERS_KEY].dtype, group[MULTIPLIERS_KEY].shape) == (torch.float32, (len(UNITS),))
    assert not any(unit in str(value) for unit in ("'a'", "'b'") for value in group.values())


@pytest.mark.parametrize("names", [["b", "a", "c", "d"], ["a", "b", "c", "e"], ["a", "b", "c", "d", "e"]])
def test_a_checkpoint_of_other_units_is_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="the checkpoint is of other units"):
        _ = loaded(names).multipliers.values


def test_the_first_group_says_what_holds_after_a_universal_checkpoint_was_loaded() -> None:
    """Which gives all groups what the first one had."""
    groups = [{"params": [flat_tensor(seed)]} for seed in (0, 1)]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    multipliers = attach_multipliers(optimizer)
    multipliers.name_units(UNITS)
    multipliers.set(MULTIPLIERS)
    for group in optimizer.param_groups:
        group |= {MULTIPLIERS_KEY: torch.full((4,), 0.5), NAMES_KEY: optimizer.param_groups[0][NAMES_KEY]}
    assert multipliers.values == dict.fromkeys(UNITS, 0.5)
    multipliers.set(MULTIPLIERS)
    optimizer.param_groups = optimizer.param_groups[1:]
    assert multipliers.values == MULTIPLIERS


def test_smoothed_importances_are_kept_to_the_last_bit() -> None:
    optimizer = unit_adamw(flat_tensor())
    assert optimizer.multipliers.smoothed_importance is None
    optimizer.multipliers.smoothed_importance = [0.1, 1e-12, 3.0, 1 / 3]
    assert optimizer.multipliers.smoothed_importance == [0.1, 1e-12, 3.0, 1 / 3]
