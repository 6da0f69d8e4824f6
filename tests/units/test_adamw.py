"""UnitAdamW against PyTorch's own AdamW with one parameter group per unit: each way to take a step, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness.flat_units import (
    MULTIPLIERS,
    OPTIONS,
    OPTIONS_OF_OURS,
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

from adept_ds.units.adamw import UnitAdamW, _merge_neighbours
from adept_ds.units.multipliers import MULTIPLIERS_KEY, NAMES_KEY, attach_multipliers
from adept_ds.units.placement import Placement
from adept_ds.units.segments import UnitSlice

STEPS = 6


@pytest.fixture(params=[False, True], ids=["views", "one pass"], autouse=True)
def one_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a CPU, and as on an accelerator. In chunks so small that some end inside a unit."""
    monkeypatch.setattr("adept_ds.units.one_pass.CHUNK", 10)
    monkeypatch.setitem(OPTIONS_OF_OURS, "one_pass", request.param)
    return bool(request.param)


def train(optimizer: UnitAdamW, flat: torch.Tensor, steps: range, lrs: Sequence[float] | None = None) -> None:
    for step in steps:
        flat.grad = gradient(step)
        if lrs:
            optimizer.param_groups[0]["lr"] = lrs[step]
        optimizer.step()


def reference(steps: int, lrs: Sequence[float] | None = None, **options: Any) -> tuple[torch.Tensor, list[Any]]:
    """torch.optim.AdamW on separate tensors, one group per unit with the learning rate already multiplied."""
    start = flat_tensor().detach()
    options = OPTIONS | options
    base_lr = options.pop("lr")
    parts = {unit_of(s): start[s.start : s.stop].clone().requires_grad_(True) for s in SLICES}
    groups = [{"params": [part], "lr": base_lr * MULTIPLIERS[unit]} for unit, part in parts.items()]
    optimizer = torch.optim.AdamW(groups, lr=base_lr, fused=True, **options)
    for step in range(steps):
        whole = gradient(step)
        for piece, group in zip(SLICES, optimizer.param_groups, strict=True):
            group["lr"] = (lrs[step] if lrs else base_lr) * MULTIPLIERS[unit_of(piece)]
            group["params"][0].grad = whole[piece.start : piece.stop].clone()
        optimizer.step()
    states = [optimizer.state[part] for part in parts.values()]
    return torch.cat([part.detach() for part in parts.values()]), states


# Bit-equality cannot be asked for: the fused kernel handles the elements that fill a vector register and the few left
# over by different instructions, and which elements are left over depends on where a tensor begins. Both are correct
# to rounding: a relative 1e-6 is a few units in the last place of float32 after several steps.
ROUNDING: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_unit_moves_as_under_adamw_with_its_own_learning_rate(weight_decay: float) -> None:
    flat = flat_tensor()
    optimizer = unit_adamw(flat, weight_decay=weight_decay)
    optimizer.multipliers.set(MULTIPLIERS)
    lrs = [0.01, 0.05, 0.05, 0.04, 0.02, 0.001]  # a schedule rides below the multipliers
    train(optimizer, flat, range(STEPS), lrs)
    expected, states = reference(STEPS, lrs, weight_decay=weight_decay)
    torch.testing.assert_close(flat.detach()[:TOTAL], expected, **ROUNDING)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            optimizer.state[flat][key][:TOTAL], torch.cat([state[key] for state in states]), **ROUNDING
        )
    assert float(optimizer.state[flat]["step"]) == STEPS == float(states[0]["step"])


def test_with_multipliers_of_1_it_is_adamw_on_the_whole_tensor() -> None:
    flat, plain = flat_tensor(), flat_tensor()
    optimizer, stock = unit_adamw(flat), torch.optim.AdamW([plain], fused=True, **OPTIONS)
    for step in range(STEPS):
        flat.grad, plain.grad = gradient(step), gradient(step)
        optimizer.step()
        stock.step()
    torch.testing.assert_close(flat[:TOTAL], plain[:TOTAL], **ROUNDING)


def test_how_a_unit_is_cut_into_slices_does_not_matter() -> None:
    """Bit-equal when the cuts fall on multiples of 64 bytes, where the kernel does the same arithmetic."""
    results = []
    for cuts in ([0, 16, 64], [0, 64], [0, 32, 48, 64]):
        flat = torch.randn(64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        optimizer = UnitAdamW([flat], **OPTIONS, **OPTIONS_OF_OURS)
        optimizer.multipliers.name_units(UNITS)
        # Units alternate in the list, so that touching slices are not merged away; both have the same multiplier.
        pieces = [run_of(start, stop, "ab"[i % 2]) for i, (start, stop) in enumerate(pairwise(cuts))]
        optimizer.multipliers.bind(flat, pieces)
        optimizer.multipliers.set({"a": 0.7, "b": 0.7, "c": 1.0, "d": 1.0})
        for step in range(3):
            flat.grad = gradient(step).repeat(2)[:64]
            optimizer.step()
        results.append(flat.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_multiplier_0_moves_nothing_by_one_bit_while_the_moments_go_on() -> None:
    flat = flat_tensor()
    before = flat.detach().clone()
    optimizer = unit_adamw(flat, weight_decay=0.5)
    optimizer.multipliers.set(MULTIPLIERS)
    train(optimizer, flat, range(STEPS))
    still = slice(SLICES[1].start, SLICES[1].stop)
    assert torch.equal(flat.detach()[still], before[still])
    _, states = reference(STEPS)
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[flat][key][still].abs().min() > 0
        torch.testing.assert_close(optimizer.state[flat][key][still], states[1][key], **ROUNDING)
    moved = [piece for piece in SLICES if MULTIPLIERS[unit_of(piece)] > 0]
    assert all((flat.detach()[p.start : p.stop] != before[p.start : p.stop]).all() for p in moved)


def test_a_unit_that_stood_still_goes_on_with_its_moments() -> None:
    """After a refresh, a unit's first step is the one AdamW would do with the moments collected so far."""
    flat = flat_tensor()
    optimizer = unit_adamw(flat, weight_decay=0.0)
    optimizer.multipliers.set(dict.fromkeys(SIZES, 0.0))
    train(optimizer, flat, range(3))
    optimizer.multipliers.set(dict.fromkeys(SIZES, 1.0))
    before = flat.detach().double().clone()
    train(optimizer, flat, range(3, 4))
    (beta1, beta2), first, second = OPTIONS["betas"], 0.0, 0.0
    for step in range(4):
        grad = gradient(step).double()
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
    update = (first / (1 - beta1**4)) / ((second / (1 - beta2**4)).sqrt() + OPTIONS["eps"])
    expected = before - OPTIONS["lr"] * update  # Adam's formula, in float64
    # atol: one float32 rounding of weights of size 1 (6e-8) plus one of the update.
    torch.testing.assert_close(flat.detach().double()[:TOTAL], expected[:TOTAL], rtol=1e-6, atol=2e-7)


def test_padding_takes_part_in_nothing() -> None:
    flat = flat_tensor()
    before = flat.detach().clone()
    optimizer = unit_adamw(flat, weight_decay=0.5)
    train(optimizer, flat, range(STEPS))
    assert torch.equal(flat.detach()[TOTAL:], before[TOTAL:])
    for key in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[flat][key][TOTAL:].any()


def test_a_tensor_without_gradient_is_left_alone() -> None:
    flat = flat_tensor()
    before = flat.detach().clone()
    unit_adamw(flat).step()
    assert torch.equal(flat.detach(), before)


def test_state_dict_keeps_multipliers_and_continues_bit_for_bit() -> None:
    straight = flat_tensor()
    through = unit_adamw(straight)
    through.multipliers.set(MULTIPLIERS)
    train(through, straight, range(STEPS))

    first = flat_tensor()
    before = unit_adamw(first)
    before.multipliers.set(MULTIPLIERS)
    train(before, first, range(3))
    saved = copy.deepcopy(before.state_dict())

    second = first.detach().clone().requires_grad_(True)
    after = unit_adamw(second)
    assert after.multipliers.values == dict.fromkeys(SIZES, 1.0)
    after.load_state_dict(saved)
    assert after.multipliers.values == MULTIPLIERS
    train(after, second, range(3, STEPS))
    assert torch.equal(second, straight)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(after.state[second][key], through.state[straight][key])


def test_the_state_is_that_of_the_stock_optimizer() -> None:
    """DeepSpeed's tools for universal checkpoints read these keys and shapes."""
    flat, plain = flat_tensor(), flat_tensor()
    optimizer, stock = unit_adamw(flat), torch.optim.AdamW([plain], **OPTIONS)
    flat.grad, plain.grad = gradient(0), gradient(0)
    optimizer.step()
    stock.step()
    ours, theirs = optimizer.state_dict(), stock.state_dict()
    shape_of = {key: value.shape for key, value in theirs["state"][0].items()}
    assert {key: value.shape for key, value in ours["state"][0].items()} == shape_of
    assert set(ours["param_groups"][0]) - set(theirs["param_groups"][0]) == {MULTIPLIERS_KEY, NAMES_KEY}


def test_an_unbound_tensor_is_refused_and_not_moved() -> None:
    flat = flat_tensor()
    before = flat.detach().clone()
    optimizer = UnitAdamW([flat], **OPTIONS, **OPTIONS_OF_OURS)
    flat.grad = gradient(0)
    with pytest.raises(ValueError, match="never bound"):
        optimizer.step()
    assert torch.equal(flat.detach(), before)


def test_several_parameter_groups_are_refused() -> None:
    groups = [{"params": [torch.zeros(2, requires_grad=True)]}, {"params": [torch.zeros(2, requires_grad=True)]}]
    with pytest.raises(ValueError, match="one parameter group"):
        UnitAdamW(groups)


def test_touching_runs_are_stepped_together() -> None:
    assert _merge_neighbours([(0, 4), (4, 6), (6, 9), (11, 12)]) == [(0, 9), (11, 12)]


# --- units inside a parameter: rows and columns ----------------------------------------------------------------------

ROWS, COLUMNS = 6, 8
PLACEMENTS = {
    "rows": (Placement((ROWS, COLUMNS), 0, axis=0, span=1), 6),
    "blocks of rows": (Placement((ROWS, COLUMNS), 1, axis=0, span=3), 3),
    "columns": (Placement((ROWS, COLUMNS), 0, axis=1, span=1), 8),
    "blocks of columns": (Placement((ROWS, COLUMNS), 2, axis=1, span=4), 4),
}


def unit_of_element(placement: Placement) -> list[int]:
    """The definition, element by element."""
    assert placement.axis is not None
    index = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    return [placement.first + place[placement.axis] // placement.span for place in index]


@pytest.mark.parametrize("ratio", [1.0, 4.0])
@pytest.mark.parametrize("chunk", [1, 1 << 16])
@pytest.mark.parametrize("attached", [False, True], ids=["fused", "attached"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_rows_and_columns_move_as_under_adamw_with_their_own_learning_rate(
    name: str, attached: bool, chunk: int, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank holds elements 5 to 45 of a 6 x 8 parameter: both ends cut a row. One unit stands still.

    The parameter has a ratio of its own beside the multipliers of its units.
    """
    monkeypatch.setattr("adept_ds.units.adamw._CPU_CHUNK", chunk)
    placement, count = PLACEMENTS[name]
    first, last = 5, 45
    values = {str(unit): [1.7, 0.0, 0.4, 1.0][unit % 4] for unit in range(count)}
    flat = torch.randn(last - first, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    start = flat.detach().clone()
    if attached:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([flat], foreach=True, **OPTIONS)
        multipliers = attach_multipliers(optimizer)
    else:
        optimizer = UnitAdamW([flat], **OPTIONS, **OPTIONS_OF_OURS)
        multipliers = optimizer.multipliers
    multipliers.name_units(list(values))
    multipliers.bind(flat, [UnitSlice(0, last - first, placement, first, ratio)])
    multipliers.set(values)
    units = torch.tensor(unit_of_element(placement)[first:last])
    parts = {unit: start[units == int(unit)].clone().requires_grad_(True) for unit in values}
    groups = [{"params": [part], "lr": OPTIONS["lr"] * values[unit] * ratio} for unit, part in parts.items()]
    oracle = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(STEPS):
        whole = torch.randn(last - first, generator=torch.Generator().manual_seed(50 + step))
        flat.grad = whole.clone()
        for unit, part in parts.items():
            part.grad = whole[units == int(unit)]
        optimizer.step()
        oracle.step()
    for unit, part in parts.items():
        moved = flat.detach()[units == int(unit)]
        # 2e-6: `lerp` forms old + m * (new - old), with m up to 1.7, on weights of size 1, in each of six steps.
        torch.testing.assert_close(moved, part.detach(), rtol=0, atol=2e-6 * ratio)
        if values[unit] == 0.0:
            assert torch.equal(moved, start[units == int(unit)])
