"""Where parameters lie in DeepSpeed's partitions: on three real ranks (see harness/lab_worker.py); what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.marks import slow
from harness.trainings import Trainings
from harness.workspace import Workspace

from adept_ds.base.errors import LayoutError
from adept_ds.zero.assumptions import WRITTEN_AGAINST
from adept_ds.zero.layout import Fragment, partition_layout, trained_weights_are_finite


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(workspace, tmp_path_factory.mktemp("lab"), "layout", world_size=3)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("zero2", "bf16"), slow("zero2", "fp16"), slow("zero3", "bf16"), ("zero3", "fp16")),
        *(slow(name, precision) for name in ("zero1", "zero3_offload") for precision in ("bf16", "fp16")),
    ],
)
def test_every_master_weight_takes_its_units_share_of_the_step(
    outcomes: dict[str, Any], name: str, precision: str
) -> None:
    """Heads and neurons with multipliers from 0 to 2. Weights are of order 1 and the step is 3e-3, so that float32
    rounding of both weights is up to 1e-4 of it."""
    assert outcomes[f"{precision} {name}"] < 2e-4


@pytest.mark.parametrize("name", [slow("zero1"), "zero2", "zero3", slow("zero3_offload")])
def test_partition_boundaries_cut_parameters_inside_rows(outcomes: dict[str, Any], name: str) -> None:
    """Otherwise the tests above would prove little. With two ranks, stages 1 and 2 would cut between the two copies."""
    cut = outcomes[f"cut rows {name}"]
    assert cut[0] == 0
    assert all(cut[1:])


# --- what is refused ------------------------------------------------------------------------------------------------


def engine(stage: int, optimizer: Any, parameters: dict[str, Any]) -> Any:
    module = SimpleNamespace(named_parameters=parameters.items)
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: stage)


def stage_2(mappings: dict[str, Any]) -> Any:
    """A partition of ten elements, with parameters as `mappings` has them in it."""
    parameters = {name: SimpleNamespace(_hp_mapping=mapping) for name, mapping in mappings.items()}
    optimizer = SimpleNamespace(
        bit16_groups=[list(parameters.values())], single_partition_of_fp32_groups=[torch.zeros(10)]
    )
    return engine(2, optimizer, parameters)


def stage_3(positions: dict[str, tuple[int, int]], numel: int = 5) -> Any:
    """A sub-group of ten elements on rank 1 of two, with (offset, padded number) of each parameter in it."""
    parameters = {name: SimpleNamespace(name=name, ds_numel=numel, ds_process_group=None) for name in positions}
    optimizer = SimpleNamespace(
        fp16_groups=[list(parameters.values())],
        fp32_partitioned_groups_flat=[torch.zeros(10)],
        grad_position={name: (0, *position) for name, position in positions.items()},
        get_param_id=lambda parameter: parameter.name,
    )
    return engine(3, optimizer, parameters)


def at(flat_start: int, param_start: int, numel: int) -> Any:
    """DeepSpeed's word for a fragment at stages 1 and 2."""
    flat, part = SimpleNamespace(start=flat_start), SimpleNamespace(start=param_start, numel=numel)
    return SimpleNamespace(hp_fragment_address=flat, lp_fragment_address=part)


@pytest.fixture
def on_rank_1(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.comm as dist

    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)


def test_fragments_come_in_the_order_of_the_partition_without_padding_and_without_other_ranks_parameters(
    on_rank_1: None,
) -> None:
    (second,) = partition_layout(stage_2({"a": at(4, 0, 3), "b": None, "c": at(0, 7, 4)}))
    assert second.fragments == (Fragment("c", 0, 7, 4), Fragment("a", 4, 0, 3))
    # Five elements of a parameter in halves of three: two and one of padding. Of the other one, all lie on rank 0.
    (third,) = partition_layout(stage_3({"a": (0, 3), "b": (3, 7)}))
    assert third.fragments == (Fragment("a", 0, 3, 2),)


def test_whether_weights_are_numbers_is_asked_of_weights_and_not_of_padding(on_rank_1: None) -> None:
    """Stage 3 leaves what the memory held behind the last rank's part of a parameter, which may be a NaN."""
    made = stage_3({"a": (0, 3), "b": (3, 7)})
    (flat,) = made.optimizer.fp32_partitioned_groups_flat
    flat[2:] = torch.nan
    assert trained_weights_are_finite(made)
    flat[1] = torch.inf
    assert not trained_weights_are_finite(made)
    assert trained_weights_are_finite(stage_3({"b": (0, 10)})), "a rank whose elements are padding alone"


@pytest.mark.parametrize(
    ("made", "detail"),
    [
        pytest.param(stage_2({"a": at(0, 0, 6), "b": at(5, 0, 2)}), "'b' overlaps", id="overlapping"),
        pytest.param(stage_2({"a": at(0, 0, 6), "b": at(6, 0, 5)}), "'b' overlaps", id="past the end"),
        pytest.param(stage_2({"a": SimpleNamespace()}), "AttributeError: .*hp_fragment_address", id="other names"),
        pytest.param(stage_3({"a": (0, 3), "b": (3, 6)}), "sub-group 0 has 10 elements, its parameters 9", id="sizes"),
        pytest.param(stage_3({"a": (8, 5), "b": (0, 5)}, 10), "'a' overlaps", id="past the end at stage 3"),
        pytest.param(engine(3, SimpleNamespace(), {}), "AttributeError: .*fp16_groups", id="other names at stage 3"),
    ],
)
def test_another_layout_than_was_written_for_is_refused_rather_than_a_wrong_element_multiplied(
    on_rank_1: None, made: Any, detail: str
) -> None:
    with pytest.raises(LayoutError, match=detail) as caught:
        partition_layout(made)
    assert str(caught.value).endswith(f"install deepspeed=={WRITTEN_AGAINST}")
    assert "\n" not in str(caught.value)
