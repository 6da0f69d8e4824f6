"""What a training engine on two real ranks under ZeRO must and must not do (see harness/lab_worker.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import launch
from harness.workspace import Workspace
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("lab") / "outcomes.pt"
    result = launch(2, ["-m", "harness.lab_worker", str(workspace.root), str(output)], timeout=600)
    assert result.returncode == 0, result.stderr
    return dict(torch.load(output))


def _assert_bit_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["losses"] == second["losses"]
    for name, tensor in first["trained"].items():
        assert torch.equal(tensor, second["trained"][name]), name


@pytest.mark.parametrize("kind", ["", "recomputed_"])
def test_a_refresh_leaves_no_trace_in_training(outcomes: dict[str, Any], kind: str) -> None:
    """Three estimates between steps, multipliers unchanged: losses and weights are the same to the last bit."""
    quiet, probed = outcomes[kind.rstrip("_") or "plain"], outcomes[f"{kind}probed"]
    assert len(probed["importances"]) == 3
    assert probed["importances"][0] != probed["importances"][1], "the estimate must see that training went on"
    _assert_bit_equal(quiet, probed)


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "zero3_offload", "recomputed"])
def test_a_refresh_between_micro_batches_leaves_no_trace_in_training(outcomes: dict[str, Any], kind: str) -> None:
    """Twice within each of three steps of three micro-batches, with what was accumulated set aside."""
    quiet, probed = outcomes[kind], outcomes[f"{kind} within" if kind != "recomputed" else "recomputed_within"]
    assert len(probed["importances"]) == len(quiet["importances"]) + 6
    within = [values for values in probed["importances"] if values not in quiet["importances"]]
    assert all(map(sum, within[2:])), "after the first step, copies have importances"
    _assert_bit_equal(quiet, probed)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_in_bf16_online_importance_and_a_refresh_between_micro_batches_leave_no_trace(
    outcomes: dict[str, Any], name: str
) -> None:
    """There, stage 2 accumulates in another buffer than in fp32. A third of each batch is replayed."""
    quiet, probed = outcomes[f"bf16 online {name}"], outcomes[f"bf16 online {name} within"]
    assert len(quiet["importances"]) == 2
    assert len(probed["importances"]) == 6
    assert [values for values in probed["importances"] if values in quiet["importances"]] == quiet["importances"]
    _assert_bit_equal(quiet, probed)


def test_in_bf16_online_importances_are_the_same_at_stages_2_and_3(outcomes: dict[str, Any]) -> None:
    """2%: training steps round weights to 8 bits."""
    first, second = (outcomes[f"bf16 online {name}"]["importances"] for name in ("zero2", "zero3"))
    for mine, other in zip(first, second, strict=True):
        assert mine == pytest.approx(other, rel=0.02)


def test_activation_checkpointing_changes_no_number(outcomes: dict[str, Any]) -> None:
    _assert_bit_equal(outcomes["plain"], outcomes["recomputed"])


@pytest.mark.parametrize("kind", ["kept", "kept_in_part"])
def test_frozen_weights_that_stay_gathered_change_no_number(outcomes: dict[str, Any], kind: str) -> None:
    """Kept after the first of five steps, with three refreshes later; none is gathered a second time."""
    kept, frozen = outcomes[kind]["kept"]
    assert kept == frozen if kind == "kept" else 0 < kept <= 40_000 < frozen
    assert outcomes[kind]["gathered_again"] == 0
    assert outcomes[kind]["importances"] == outcomes["probed"]["importances"]
    _assert_bit_equal(outcomes["plain"], outcomes[kind])


@pytest.mark.parametrize(("kind", "cached"), [("cached", 3), ("cached_in_part", 2)])
def test_replaying_the_frozen_layers_below_changes_no_number(outcomes: dict[str, Any], kind: str, cached: int) -> None:
    """Seven probe blocks in global batches of five and two, in twos on two ranks: three micro-batches a rank.

    The second and the third of three estimates leave out the frozen layers for those that are kept.
    """
    assert outcomes[kind]["importances"] == outcomes["probed"]["importances"]
    assert outcomes[kind]["lowest_runs"] == outcomes["probed"]["lowest_runs"] - 2 * cached
    _assert_bit_equal(outcomes["plain"], outcomes[kind])


def test_a_unit_with_multiplier_zero_does_not_move_by_one_bit(outcomes: dict[str, Any]) -> None:
    """Weight decay is on (0.1); every other unit moves."""
    before = load_file(Path(outcomes["expanded"]) / "model.safetensors")
    silent = tuple(f"model.{unit}." for unit in outcomes["silent_units"])
    for name, tensor in outcomes["silent"]["trained"].items():
        assert torch.equal(tensor, before[name]) == name.startswith(silent), name


def test_frozen_weights_keep_their_hash(outcomes: dict[str, Any]) -> None:
    hashes = {
        outcome["frozen_hash"]
        for name, outcome in outcomes.items()
        if isinstance(outcome, dict) and "frozen_hash" in outcome and not name.startswith("bf16")
    }
    before = load_file(Path(outcomes["expanded"]) / "model.safetensors")
    assert len(hashes) == 1
    import hashlib

    digest = hashlib.sha256()
    for name in _parameter_order(Path(outcomes["expanded"])):
        if not name.startswith(("model.layers.2.", "model.layers.5.")):
            digest.update(before[name].numpy().tobytes())
    assert hashes == {digest.hexdigest()}


def _parameter_order(model_dir: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    return [name for name, _ in AutoModelForCausalLM.from_pretrained(model_dir).named_parameters()]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_every_master_weight_takes_its_units_share_of_the_step(
    outcomes: dict[str, Any], name: str, precision: str
) -> None:
    """Heads and neurons with multipliers from 0 to 2. Weights are of order 1 and the step is 3e-3, so that float32
    rounding of both weights is up to 1e-4 of it."""
    assert outcomes[f"{precision} {name}"] < 2e-4


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_loss_scaling_does_not_show_in_importances(outcomes: dict[str, Any], name: str) -> None:
    """Neither one that is right nor one at which gradients overflow; 2% for half precision, next to fp32."""
    right, overflowing = outcomes[f"overflow {name}"]["importances"]
    assert right == pytest.approx(outcomes["source importance"], rel=0.02)
    assert overflowing == pytest.approx(right, rel=0.02)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_training_keeps_its_loss_scale_and_skips_a_step_that_overflows(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes[f"overflow {name}"]["scale_after"] == 2.0**40
    assert not outcomes[f"overflow {name}"]["moved"]


def test_partition_boundaries_cut_parameters_inside_rows(outcomes: dict[str, Any]) -> None:
    """Otherwise the tests above would prove little. The second rank's slices begin in the middle."""
    assert outcomes["second_rank_cut_rows"] > 0


def test_a_multiplier_that_differs_between_ranks_stops_the_run_and_names_the_unit(outcomes: dict[str, Any]) -> None:
    assert "unit 'layers.2.mlp.gate_proj' has multiplier 0.5 on rank 1 but 1.0 on rank 0" in outcomes["disagreement"]
