"""The AdamW pass of accelerators: element by element, in PyTorch's operations and as a Triton kernel.

The kernel runs in Triton's interpreter, where Triton is installed, and is compiled for GPUs; it cannot run on a CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness.unit_map import unit_of_each_element
from launches import launches
from torch._subclasses.fake_tensor import FakeTensorMode

from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.one_pass import Pass, agrees, by_kernel, by_operations, corrections
from adept_ds.units.placement import Placement
from adept_ds.units.segments import BLOCK, Segments, UnitSlice

GROUP: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
PLACEMENTS = [
    Placement((7,), 0),
    Placement((6, 8), 1, axis=0),
    Placement((6, 8), 0, axis=0, span=3),
    Placement((6, 8), 2, axis=1),
    Placement((6, 8), 1, axis=1, span=4),
    Placement((8, 3), 2, axis=0, span=2, period=2),
    Placement((3, 12), 1, axis=1, span=2, period=3),
    Placement((40, 41), 1, axis=1),  # more than a block
]
MULTIPLIERS = torch.tensor([1.7, 0.0, 0.4, 1.0, 2.0, 0.37, 1.3, 0.9, 0.1, 0.0, 1.1] + [0.8] * 40)

UNITS = torch.arange(1.0, 51.0)
"""A number of its own for each unit."""


@pytest.fixture(params=["operations", "kernel"])
def take_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pass]:
    if request.param == "operations":
        monkeypatch.setattr("adept_ds.units.one_pass.CHUNK", 100)
        yield by_operations
        return
    pytest.importorskip("triton")
    spec = importlib.util.find_spec("adept_ds.units.one_pass_kernel")
    assert spec is not None and spec.loader is not None
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):  # read where the kernel is made: one of its own here
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.by_triton


def slices_with_gaps() -> tuple[list[UnitSlice], int]:
    """A slice of each, none of them whole, gaps before, between and behind them; and how many elements that is."""
    slices, end = [], 3
    for number, placement in enumerate(PLACEMENTS):
        first, last = 1 + number % 3, placement.numel - 1 - number % 2
        slices.append(UnitSlice(end, end + last - first, placement, first, 1.0 + number % 2))
        end += last - first + (0 if number == 2 else 2)
    return slices, end + 5


def test_every_element_steps_by_its_units_multiplier(take_pass: Pass) -> None:
    """Three steps against AdamW's formula in float64; weights of size 1 to 4 to 1e-6, a few roundings of float32."""
    slices, numel = slices_with_gaps()
    factors = torch.full((numel,), -1.0, dtype=torch.float64)
    for one in slices:
        units = unit_of_each_element(one.placement).flatten()[one.offset : one.offset + one.stop - one.start]
        factors[one.start : one.stop] = MULTIPLIERS.double()[units] * one.lr_ratio
    bound = factors >= 0
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(numel, generator=draw)
    flat = [weight.clone(), weight, torch.zeros(numel), torch.zeros(numel)]
    expected, first, second = weight.double(), torch.zeros(numel).double(), torch.zeros(numel).double()
    segments = Segments.of(slices, numel, torch.device("cpu"))
    for step in range(1, 4):
        flat[1] = torch.randn(numel, generator=draw)
        take_pass(flat, segments, MULTIPLIERS, corrections(torch.tensor(float(step)), GROUP["betas"]), GROUP)
        grad, (beta1, beta2) = flat[1].double(), GROUP["betas"]
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + GROUP["eps"])
        moved = expected - GROUP["lr"] * factors * (GROUP["weight_decay"] * expected + update)
        expected = torch.where(bound, moved, expected)
    torch.testing.assert_close(flat[0].double(), expected, rtol=0, atol=1e-6)
    for moment, truth in ((flat[2], first), (flat[3], second)):
        torch.testing.assert_close(moment.double()[bound], truth[bound], rtol=1e-6, atol=1e-7)
        assert not moment[~bound].any(), "padding takes part in nothing"
    still = factors <= 0
    assert torch.equal(flat[0][still], weight[still])
    assert int((bound & still).sum()) > 20


def test_a_kernel_is_used_only_where_it_does_the_same(take_pass: Pass) -> None:
    host = torch.device("cpu")
    assert agrees(take_pass, host)
    assert not agrees(lambda *_: None, host)
    assert by_kernel(host) is None, "a CPU has its own way"
    assert by_kernel(torch.device("meta")) is None, "where nothing can be compared, or it cannot run"


@pytest.mark.parametrize(
    ("target", "table", "made"), [(("cuda", 90, 32), "*i32", "cubin"), (("hip", "gfx942", 64), "*i64", "hsaco")]
)
def test_the_kernel_compiles_for_devices_that_are_not_here(
    target: tuple[Any, ...], table: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    backends, compiler = (importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "compiler"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = importlib.import_module("adept_ds.units.one_pass_kernel").adamw_kernel
    types = {name: "*fp32" if name.endswith("_ptr") else "fp32" for name in kernel.arg_names}
    types |= {"blocks_ptr": "*i32", "block_table_ptr": "*i64", "table_ptr": table, "number": "i32", "size": "constexpr"}
    source = compiler.ASTSource(kernel, types, {"size": BLOCK})
    assert triton.compile(source, target=backends.GPUTarget(*target)).asm[made]


def test_segments_say_the_unit_of_every_element_wherever_a_partition_cuts() -> None:
    """Every slice of small parameters, in a flat tensor of any place, against the definition element by element."""
    for placement in PLACEMENTS[:-1]:
        truth = unit_of_each_element(placement).flatten()
        for first in range(placement.numel):
            for last in range(first + 1, placement.numel + 1):
                piece = UnitSlice(2, 2 + last - first, placement, first)
                segments = Segments.of([piece], 4 + last - first, torch.device("cpu"))
                factors, segment = segments.factors(UNITS, 1, 3 + last - first)
                assert factors.tolist() == [0.0, *UNITS[truth[first:last]].tolist(), 0.0]
                assert segments.bound is not None
                assert segments.bound[segment].tolist() == [False, *[True] * (last - first), False]


def stepped_with(units: int, parameters: int) -> UnitAdamW:
    """A flat tensor of 4800 elements in so many parameters, each of which has so many neurons as columns."""
    flat = torch.ones(4800, requires_grad=True)
    flat.grad = torch.ones(4800)
    optimizer = UnitAdamW([flat], one_pass=True)
    optimizer.multipliers.name_units([str(unit) for unit in range(units * parameters)])
    size = 4800 // parameters
    optimizer.multipliers.bind(
        flat,
        [
            UnitSlice(n * size, (n + 1) * size, Placement((size // units, units), n * units, axis=1))
            for n in range(parameters)
        ],
    )
    optimizer.multipliers.vector = [1.0 / (1 + unit) for unit in range(units * parameters)]
    optimizer.step()
    return optimizer


def test_what_a_step_launches_depends_neither_on_the_units_nor_on_the_parameters() -> None:
    """Nor does it take anything from the device to the host, or the other way round."""
    found = []
    for units, parameters in ((1, 1), (4, 3), (60, 10), (4800, 1), (1, 4800)):
        optimizer = stepped_with(units, parameters)
        with launches() as counted:
            optimizer.step()
        found.append(counted.total)
        assert not counted.copies
    assert len(set(found)) == 1
    assert found[0] < 45


def test_a_step_elsewhere_than_on_the_host_mixes_nothing_with_what_lies_there() -> None:
    """On tensors without content, of which the host can ask nothing, on a device that is not the host's."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        flat = torch.zeros(100, device="meta", requires_grad=True)
        flat.grad = torch.zeros(100, device="meta")
        optimizer = UnitAdamW([flat])
        optimizer.multipliers.name_units([str(unit) for unit in range(16)])
        slices = [UnitSlice(1, 60, PLACEMENTS[3]), UnitSlice(60, 90, Placement((6, 5), 10, axis=0))]
        optimizer.multipliers.bind(flat, slices)
        for _ in range(2):
            optimizer.step()
        assert {value.device.type for value in optimizer.state[flat].values()} == {"meta"}
