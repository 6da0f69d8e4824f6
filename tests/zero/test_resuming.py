"""A checkpoint comes back bit for bit in an engine of any shape, and training goes on from it as it would have.

Real ranks, two to four to one to three, so that each change of their number is seen both upwards and downwards. The
state before and after is put together by DeepSpeed's public functions, which know nothing of how it was read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import launch
from harness.marks import slow
from harness.models import save_tiny_model
from harness.resuming_worker import LR, SAVED_AFTER

Launches = list[tuple[int, list[str]]]
"""Numbers of ranks, in this order, and their cells (see `harness.resuming_worker`)."""

AT_EVERY_COMMIT: Launches = [
    (2, ["frozen/zero2", "frozen/strict", "whole/strict", "lora/strict", "bf16/strict", "fp16/zero2", "groups/zero1"]),
    (1, ["frozen/strict@2/offload", "lora/strict@2/zero1", "fp16/zero2@2/strict", "groups/zero1@2/strict"]),
    (3, ["frozen/zero2@2/offload_both", "whole/strict@2/zero2", "bf16/strict@2/zero2"]),
]
SLOW: Launches = [
    (4, ["frozen/zero2@2/many_groups", "groups/zero1@2/strict", "whole/zero1", "whole/many_groups"]),
    (1, ["whole/zero1@4/strict", "whole/many_groups@4/zero2", "bf16/zero2", "groups/many_groups"]),
    (
        3,
        [
            *("whole/many_groups@4/strict", "bf16/zero2@1/strict"),
            *("groups/many_groups@1/zero2", "whole/zero1@4/many_groups"),
        ],
    ),
]
"""Some go on from what those before have saved."""


def continued(launches: Launches) -> list[tuple[int, str]]:
    return [(size, cell) for size, cells in launches for cell in cells if "@" in cell]


class Outcomes(dict[tuple[int, str], Any]):
    """By number of ranks and cell, found when they are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._left = folder, iter((AT_EVERY_COMMIT, SLOW))

    def __missing__(self, key: tuple[int, str]) -> Any:
        for world_size, cells in next(self._left):
            result = launch(world_size, ["-m", "harness.resuming_worker", str(self._folder), *cells])
            assert result.returncode == 0, result.stderr
            found = torch.load(self._folder / f"outcomes_{world_size}.pt", weights_only=False)
            self.update({(world_size, cell): of for cell, of in found.items()})
        return self[key]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("resuming")
    save_tiny_model(folder / "model", num_hidden_layers=4, hidden_size=22)
    return Outcomes(folder)


@pytest.fixture
def both(outcomes: Outcomes, request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a cell, what the writer found, and the reader."""
    size, cell = request.param
    written, _, place = cell.partition("@")
    return outcomes[int(place[0]), written], outcomes[size, cell]


every_change = pytest.mark.parametrize(
    "both",
    [*continued(AT_EVERY_COMMIT), *(slow(case) for case in continued(SLOW))],
    indirect=True,
    ids=lambda case: "{1}-on-{0}".format(*case),
)


@every_change
def test_weights_moments_and_settings_are_what_was_saved_to_the_last_bit(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Of each parameter group its own; and what the forward pass sees, frozen weights too."""
    saved, found = (outcome["at"] for outcome in both)
    for what in ("vectors", "forward"):
        assert found[what].keys() == saved[what].keys()
        for name, value in saved[what].items():
            assert torch.equal(found[what][name], value), name
    assert found["groups"] == saved["groups"]
    assert (found["loss_scale"], found["counted"]) == (saved["loss_scale"], SAVED_AFTER)


@every_change
def test_every_partition_counts_its_steps_by_itself(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A counter that several share would run ahead."""
    for moment, steps in (("at", SAVED_AFTER), ("after", SAVED_AFTER + 1)):
        assert {step for of_rank in both[1][moment]["steps"] for step in of_rank} == {steps}


@every_change
def test_the_next_step_is_the_one_that_would_have_followed(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Losses of about 5.6 to 1e-5, weights to a thousandth of a step in fp32; gradients are summed in another order.

    In half precision gradients differ by their rounding, and where they nearly cancel by more: a hundredth of a step in
    the root mean square, half a step anywhere.
    """
    (saved, found), is_half = both, both[0]["at"]["forward"]["model.norm.weight"].dtype != torch.float32
    assert found["loss"] == pytest.approx(saved["loss"], abs=1e-2 if is_half else 1e-5)
    moved = 0.0
    for key, weight in saved["after"]["vectors"].items():
        if key[1] == "fp32":
            moved = max(moved, float((weight - saved["at"]["vectors"][key]).abs().max()))
            difference = (found["after"]["vectors"][key] - weight).abs()
            assert float(difference.max()) <= LR * (0.5 if is_half else 1e-3), key
            assert float(difference.square().mean().sqrt()) <= LR * (1e-2 if is_half else 1e-3), key
    assert moved > LR / 2, "otherwise this would prove little"


def has_masters(outcome: dict[str, Any]) -> bool:
    """Which are no rounded weights."""
    masters = [value for (_, key), value in outcome["at"]["vectors"].items() if key == "fp32"]
    return any(not torch.equal(master, master.bfloat16().float()) for master in masters)


def test_what_is_compared_is_not_the_same_everywhere(outcomes: Outcomes) -> None:
    """Otherwise the tables would prove little: masters are no rounded weights, groups and units are unlike."""
    assert has_masters(outcomes[2, "bf16/strict"])
    first, second = outcomes[2, "groups/zero1"]["at"]["groups"]
    assert (first["lr"], first["weight_decay"]) != (second["lr"], second["weight_decay"])
    assert len(set(first["unit_multipliers"])) == 5
    assert outcomes[2, "fp16/zero2"]["at"]["loss_scale"] == 2.0**9
    sizes = [value.numel() for (_, key), value in outcomes[2, "whole/strict"]["at"]["vectors"].items() if key == "fp32"]
    assert any(size % 3 for size in sizes) and any(size % 4 for size in sizes)


@pytest.mark.slow
def test_nor_is_it_in_the_rest_of_the_table(outcomes: Outcomes) -> None:
    assert has_masters(outcomes[1, "bf16/zero2"])
    assert len(outcomes[4, "whole/many_groups"]["at"]["steps"][0]) > 2
