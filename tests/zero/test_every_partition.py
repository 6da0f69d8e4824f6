"""Multipliers mean the same at every ZeRO stage, number of ranks and granularity: the table of what is supported.

Every cell is a training of five steps with two refreshes on real ranks; its final weights and importances must be those
of AdamW's formula written down element by element in one process. Run with `-s` to see the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.cells_worker import REFRESH_AFTER
from harness.lab import STEPS
from harness.launching import ROOT, launch
from harness.marks import slow
from harness.packing import pack, rows, rows_of_step
from harness.workspace import Workspace

from adept_ds.config.loading import parse_config
from adept_ds.data.order import block_order

STAGES = ["zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_params", "zeropp"]
GRANULARITIES = ["matrix", "module", "fine"]
CELLS = {
    1: ["zero1/fine", "zero3/fine", "zero3/matrix/online"],
    2: [f"{stage}/{granularity}" for stage in STAGES for granularity in GRANULARITIES]
    + ["zero3/fine/recomputed", "zero2/fine/attached", "zero3_offload/fine/attached"]
    + ["zero2/fine/one_pass", "zero3/fine/one_pass"]
    + [f"{stage}/matrix/online" for stage in STAGES]
    + ["zero3/fine/above_threshold", "zero3/fine/around_threshold", "zero3/fine/many_groups"]
    + ["zero2/fine/overlapping", "zero2/fine/trainer", "zero3/fine/trainer"]
    + ["zero3/fine/params_offloaded", "zero3/fine/params_offloaded+one_pass", "zero3/fine/params_offloaded+recomputed"]
    + ["zero3/fine/params_alone", "zero3/matrix/params_offloaded+online"]
    + ["zero3/fine/hpz", "zero3/fine/hpz_offloaded", "zero3/matrix/hpz+online", "zero3/fine/hpz+recomputed"],
    3: [
        *(f"{stage}/fine" for stage in STAGES),
        *("zero2/matrix", "zero3/matrix", "zero2/matrix/online"),
        *("zero3/fine/above_threshold", "zero3/fine/one_pass", "zero3/fine/params_offloaded"),
    ],
    4: [
        *("zero2/fine", "zero3/fine", "zero3/fine/hpz", "zero3/fine/hpz_offloaded"),
        *("zero3/fine/hpz+recomputed", "zero3/fine/hpz+one_pass"),
    ],
}
"""ds_configs file / granularity / variant, by number of ranks.

All parameters of the tiny model are below ZeRO-3's default persistence threshold.
"""


AT_EVERY_COMMIT = {
    1: CELLS[1],
    2: [
        *("zero1/matrix/online", "zero2/matrix", "zero2/fine/attached", "zero2/fine/overlapping", "zero2/fine/trainer"),
        *("zero3/module", "zero3/fine/one_pass"),
        *("zero3/fine/params_alone", "zero3/fine/params_offloaded+recomputed", "zero3_offload/fine"),
        *("zero3/fine/hpz+recomputed", "zero3/fine/hpz_offloaded", "zero3_offload_params/fine", "zeropp/fine"),
    ],
}
"""Of them, each stage and each kind of variant once; `hpz_offloaded` has many groups around a threshold."""


def is_slow(world_size: int, cell: str) -> bool:
    return cell not in AT_EVERY_COMMIT.get(world_size, [])


EVERY = [
    slow(size, cell) if is_slow(size, cell) else pytest.param(size, cell)
    for size, cells in CELLS.items()
    for cell in cells
]


class Outcomes(dict[tuple[int, bool], dict[str, Any]]):
    """By number of ranks and whether they are slow, trained when they are asked for."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        super().__init__()
        self._workspace, self._folder = workspace, folder

    def __missing__(self, key: tuple[int, bool]) -> dict[str, Any]:
        world_size, are_slow = key
        output = self._folder / f"on_{world_size}{'_slow' * are_slow}" / "outcomes.pt"
        output.parent.mkdir()
        cells = [cell for cell in CELLS[world_size] if is_slow(world_size, cell) == are_slow]
        arguments = [str(self._workspace.root), str(output), *cells]
        result = launch(world_size, ["-m", "harness.cells_worker", *arguments], timeout=600)
        assert result.returncode == 0, result.stderr
        return self.setdefault(key, dict(torch.load(output)))


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(workspace, tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def plain(
    workspace: Workspace, outcomes: Outcomes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, oracle.Training]:
    """The oracle's training at each granularity, and with importances taken from what a batch replays."""
    config = parse_config(workspace.tree(tmp_path_factory.mktemp("plain") / "run"))
    cache, train = config.run_dir / "blocks", config.train
    texts = [workspace.root / "general.jsonl"]
    domain = pack([workspace.root / "domain.jsonl"], workspace.model, cache, seq_len=32)
    replay = pack(texts, workspace.model, cache, seq_len=32)
    general = pack(texts, workspace.model, cache, seq_len=24, keep_tail=True)
    sample = block_order(len(general), 0)[:7]
    probe = [rows(general, sample[:5]), rows(general, sample[5:])]

    def training(granularity: str, replayed: int) -> oracle.Training:
        domain_rows = train.global_batch_size - replayed
        parts = [
            (rows_of_step(replay, step, replayed, 0), rows_of_step(domain, step, domain_rows, 0))
            for step in range(STEPS)
        ]
        return oracle.train_by_unit(
            oracle.load(Path(outcomes[1, False]["expanded"])),
            outcomes[1, False]["layers"],
            [(torch.cat([r[0], d[0]]), torch.cat([r[1], d[1]])) for r, d in parts],
            3e-3,
            granularity,
            probe,
            REFRESH_AFTER,
            train.model_dump(include={"betas", "weight_decay", "eps", "clip_grad_norm"}),
            replayed,
        )

    expected = {granularity: training(granularity, 0) for granularity in GRANULARITIES}
    return expected | {"online": training("matrix", train.global_batch_size // 2)}


@pytest.mark.parametrize(("world_size", "cell"), EVERY)
def test_final_weights_are_those_of_the_formula_element_by_element(
    outcomes: Outcomes, plain: dict[str, oracle.Training], world_size: int, cell: str
) -> None:
    """1e-5 in fp32 on weights of order 1; importances to 2e-3, after what steps have made of rounding."""
    outcome = outcomes[world_size, is_slow(world_size, cell)]["cells"][cell]
    expected = plain["online" if "online" in cell else cell.split("/")[1]]
    assert outcome["trained"].keys() == expected.weights.keys()
    difference = max(float((outcome["trained"][n] - w).abs().max()) for n, w in expected.weights.items())
    print(f"{world_size} ranks  {cell:<28} largest difference of a weight {difference:.1e}")
    for mine, wanted in zip(outcome["importances"], expected.importances, strict=True):
        assert mine == pytest.approx(wanted, rel=2e-3, abs=1e-12)
    assert difference <= 1e-5


@pytest.mark.parametrize("granularity", ["matrix", "fine"])
@pytest.mark.parametrize("world_size", [2, slow(3)])
def test_importances_do_not_depend_on_the_number_of_ranks(
    outcomes: Outcomes, world_size: int, granularity: str
) -> None:
    """1e-6 relative, the rounding of gradients that were summed in another order; of a fresh run, on the source."""
    mine, alone = (outcomes[size, size > 2]["source"][granularity] for size in (world_size, 1))
    assert min(alone.values()) > 0
    assert mine == pytest.approx(alone, rel=1e-6)


def test_every_shipped_configuration_is_in_the_table_as_it_is() -> None:
    unchanged = {cell.partition("/")[0] for cell in CELLS[2] if cell.count("/") == 1}
    assert unchanged == {path.stem for path in (ROOT / "ds_configs").glob("*.json")}


def test_partitions_of_three_ranks_end_in_padding(plain: dict[str, oracle.Training]) -> None:
    """Otherwise the table would prove little."""
    assert any(weight.numel() % 3 for weight in plain["fine"].weights.values())


@pytest.mark.parametrize("are_slow", [False, slow(True)])
def test_under_hpz_and_nowhere_else_weights_lie_in_a_second_partition(outcomes: Outcomes, are_slow: bool) -> None:
    """Otherwise its rows would prove little."""
    for cell, outcome in outcomes[2, are_slow]["cells"].items():
        assert (outcome["twice_partitioned"] > 0) == ("hpz" in cell or cell.startswith("zeropp")), cell


def test_a_refresh_changed_what_units_may_do(plain: dict[str, oracle.Training]) -> None:
    """Otherwise the table would prove little."""
    for training in plain.values():
        values = list(training.multipliers[-1].values())
        assert max(values) - min(values) > 1.5
        assert len(training.multipliers) == len(REFRESH_AFTER)


@pytest.mark.slow
def test_deepspeeds_own_optimizer_for_offload_takes_the_same_steps(
    workspace: Workspace, plain: dict[str, oracle.Training], tmp_path: Path
) -> None:
    """Slow, because DeepSpeedCPUAdam is compiled at first use: minutes on two cores. Run it with `pytest -m slow`."""
    cell, output = "zero3_offload/fine/cpu_adam", tmp_path / "outcomes.pt"
    result = launch(2, ["-m", "harness.cells_worker", str(workspace.root), str(output), cell], timeout=900)
    assert result.returncode == 0, result.stderr
    trained = torch.load(output)["cells"][cell]["trained"]
    for name, weight in plain["fine"].weights.items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-5)
