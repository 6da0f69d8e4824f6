"""What estimates of importances beside training on two real ranks must not change in it (see harness/lab_worker.py)."""

from __future__ import annotations

from typing import Any

import pytest
from harness.marks import slow
from harness.trainings import Trainings, assert_bit_equal, frozen_hashes, hash_before_training
from harness.workspace import Workspace


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(workspace, tmp_path_factory.mktemp("lab"), "beside")


@pytest.mark.parametrize("kind", ["", slow("recomputed_")])
def test_a_refresh_leaves_no_trace_in_training(outcomes: dict[str, Any], kind: str) -> None:
    """Three estimates between steps, multipliers unchanged: losses and weights are the same to the last bit."""
    quiet, probed = outcomes[kind.rstrip("_") or "plain"], outcomes[f"{kind}probed"]
    assert len(probed["importances"]) == 3
    assert probed["importances"][0] != probed["importances"][1], "the estimate must see that training went on"
    assert_bit_equal(quiet, probed)


@pytest.mark.parametrize("kind", [slow("zero1"), slow("zero2"), "zero3", slow("zero3_offload"), slow("recomputed")])
def test_a_refresh_between_micro_batches_leaves_no_trace_in_training(outcomes: dict[str, Any], kind: str) -> None:
    """Twice within each of three steps of three micro-batches, with what was accumulated set aside."""
    quiet, probed = outcomes[kind], outcomes[f"{kind} within" if kind != "recomputed" else "recomputed_within"]
    assert len(probed["importances"]) == len(quiet["importances"]) + 6
    within = [values for values in probed["importances"] if values not in quiet["importances"]]
    assert all(map(sum, within[2:])), "after the first step, copies have importances"
    assert_bit_equal(quiet, probed)


@pytest.mark.parametrize("name", ["zero2", slow("zero3")])
def test_in_bf16_online_importance_and_a_refresh_between_micro_batches_leave_no_trace(
    outcomes: dict[str, Any], name: str
) -> None:
    """There, stage 2 accumulates in another buffer than in fp32. A third of each batch is replayed."""
    quiet, probed = outcomes[f"bf16 online {name}"], outcomes[f"bf16 online {name} within"]
    assert len(quiet["importances"]) == 2
    assert len(probed["importances"]) == 6
    assert [values for values in probed["importances"] if values in quiet["importances"]] == quiet["importances"]
    assert_bit_equal(quiet, probed)


def test_in_bf16_online_importances_are_the_same_at_stages_2_and_3(outcomes: dict[str, Any]) -> None:
    """2%: training steps round weights to 8 bits."""
    first, second = (outcomes[f"bf16 online {name}"]["importances"] for name in ("zero2", "zero3"))
    for mine, other in zip(first, second, strict=True):
        assert mine == pytest.approx(other, rel=0.02)


def test_activation_checkpointing_changes_no_number(outcomes: dict[str, Any]) -> None:
    assert_bit_equal(outcomes["plain"], outcomes["recomputed"])


@pytest.mark.parametrize(("kind", "cached"), [("cached", 3), slow("cached_in_part", 2)])
def test_replaying_the_frozen_layers_below_changes_no_number(outcomes: dict[str, Any], kind: str, cached: int) -> None:
    """Seven probe blocks in global batches of five and two, in twos on two ranks: three micro-batches a rank.

    The second and the third of three estimates leave out the frozen layers for those that are kept.
    """
    assert outcomes[kind]["importances"] == outcomes["probed"]["importances"]
    assert outcomes[kind]["lowest_runs"] == outcomes["probed"]["lowest_runs"] - 2 * cached
    assert_bit_equal(outcomes["plain"], outcomes[kind])


@pytest.mark.parametrize("name", ["zero2", slow("zero3")])
def test_loss_scaling_does_not_show_in_importances(outcomes: dict[str, Any], name: str) -> None:
    """Neither one that is right nor one at which gradients overflow; 2% for half precision, next to fp32."""
    right, overflowing = outcomes[f"overflow {name}"]["importances"]
    assert right == pytest.approx(outcomes["source importance"], rel=0.02)
    assert overflowing == pytest.approx(right, rel=0.02)


@pytest.mark.parametrize("name", ["zero2", slow("zero3")])
def test_training_keeps_its_loss_scale_and_skips_a_step_that_overflows(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes[f"overflow {name}"]["scale_after"] == 2.0**40
    assert not outcomes[f"overflow {name}"]["moved"]


@pytest.mark.parametrize("of", ["plain", slow("zero3_offload")])
def test_frozen_weights_keep_their_hash(outcomes: dict[str, Any], of: str) -> None:
    """Of all that were trained together with this."""
    assert outcomes[of]["frozen_hash"] == hash_before_training(outcomes)
    assert frozen_hashes(outcomes) == {hash_before_training(outcomes)}
