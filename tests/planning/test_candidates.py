"""Which way to take a step is recommended, on outlines of made-up sizes, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from harness.launching import ROOT

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import read_deepspeed_config
from adept_ds.models.flops import StepFlops
from adept_ds.planning.candidates import Task, candidate
from adept_ds.planning.cluster import HOP_BETWEEN_NODES, HOP_IN_NODE, Cluster, Collective
from adept_ds.planning.outline import Call, Event, Outline, Saved, Weight
from adept_ds.planning.report import keys, make_plan, to_json, why
from adept_ds.planning.zero_settings import SHIPPED, ZeroSettings

LAYERS = 8
BIG = 500_000_000
"""Elements of a layer."""


def outline(saved_per_row: float = 1e9) -> Outline:
    """Eight layers of one matrix, the last of which trains; 4 billion parameters in bf16 and no head to speak of."""
    top = LAYERS - 1
    weights = (*(Weight(f"layers.{i}", BIG, i == top) for i in range(LAYERS)), Weight("head", 1000, False))
    calls = [Call((i,), i, False, i == top, False) for i in range(LAYERS)]
    calls.append(Call((LAYERS,), None, False, True, True))
    events = [Event(i, begins) for i in range(LAYERS + 1) for begins in (True, False)]
    kept = tuple(Saved(0.0, saved_per_row if i == LAYERS - 1 else 0.0) for i in range(LAYERS))
    return Outline(
        weights, tuple(calls), tuple(events), 2, top, kept, (Saved(),) * LAYERS, Saved(), 1e6,
        ((Saved(),),) * LAYERS, 1024, 1000, 8, 8, StepFlops(8e9, 1e9, 1e9), 1e9,
    )  # fmt: skip


def task(batch: int = 64, **changes: object) -> Task:
    made = Task(outline(), batch, None, "bf16", SHIPPED)
    return replace(made, **changes)  # type: ignore[arg-type]


def cluster(memory: float, gpus: int = 8, **more: float) -> Cluster:
    return Cluster(gpus, memory, flops=1e15, bandwidth=1e11, reserve=0.0, **more)  # type: ignore[arg-type]


def test_shipped_files_say_what_a_plan_supposes_of_them() -> None:
    for stage, settings in SHIPPED.items():
        assert ZeroSettings.read(read_deepspeed_config(ROOT / settings.file), settings.file) == settings, stage


def test_frozen_weights_that_fit_are_not_sent_again_and_again() -> None:
    """8 GB of weights beside 80 GB: stage 2 sends gradients and trained weights alone."""
    plan = make_plan(task(), cluster(80e9))
    assert plan.chosen.stage == 2
    assert plan.chosen.sent < plan.by_stage[3].sent or plan.by_stage[3].found.kept > 0
    assert "the frozen weights fit whole (7.0 GB of 80.0 GB)" in why(plan)
    assert keys(plan)["deepspeed"] == "ds_configs/zero2.json"


def test_weights_that_do_not_fit_are_split() -> None:
    plan = make_plan(task(), cluster(9e9))
    assert plan.chosen.stage == 3
    assert "every GPU would hold all 7.0 GB of frozen weights" in why(plan)
    assert plan.chosen.found.memory.peak <= 9e9


def test_a_micro_batch_is_as_large_as_fits_and_divides_the_share_of_a_gpu() -> None:
    """A sequence keeps 1 GB; 40 GB hold some thirty of a share of 24: the largest divisor below that is 24."""
    plan = make_plan(task(batch=24 * 8), cluster(80e9))
    assert (plan.chosen.step.rows, plan.chosen.step.micro_batches) == (24, 1)
    less = make_plan(task(batch=24 * 8), cluster(24e9))
    assert 24 % less.chosen.step.rows == 0
    assert less.chosen.step.rows < 24
    assert less.chosen.found.memory.peak <= 24e9


def test_what_does_not_fit_is_one_line_with_what_would_help() -> None:
    with pytest.raises(InputError, match=r"--gpu-memory: 2\.0 GB") as refusal:
        make_plan(task(), cluster(2e9))
    line = str(refusal.value)
    assert "\n" not in line
    assert "too few for any stage" in line
    assert "zero3_offload.json" in line
    assert "GPUs" in line


def test_more_gpus_are_advised_only_where_they_fit() -> None:
    """The number that the line names fits, and half of it does not."""
    small = cluster(10e9, gpus=2)
    with pytest.raises(InputError) as refusal:
        make_plan(task(), small)
    gpus = int(str(refusal.value).split("take ")[1].split(" GPUs")[0])
    for count, fits in ((gpus, True), (gpus // 2, False)):
        one = candidate(task(batch=count), replace(small, gpus=count), 3, 1, recompute=True)
        assert one.fits(small) == fits


@pytest.mark.parametrize(
    ("batch", "takes", "said"),
    [
        (64, lambda stage, rows, batch, ranks: batch == 64, "; take 4 GPUs of this size, or"),
        (64, lambda stage, rows, batch, ranks: rows % 2 == 0, "; take 8 GPUs of this size, or"),
        (6, lambda *_: True, "; take 4 GPUs of this size with train.global_batch_size 8, or"),
        (64, lambda stage, rows, batch, ranks: ranks <= 2, "; use ds_configs/zero3_offload.json"),
    ],
    ids=["its own batch", "two sequences at once", "no multiple", "no more GPUs"],
)
def test_more_gpus_are_advised_only_as_a_run_takes_them(batch: int, takes: Callable[..., bool], said: str) -> None:
    """Of 10 GB, four GPUs hold one sequence and eight hold two; the batch is the configuration's if they divide it."""
    with pytest.raises(InputError) as refusal:
        make_plan(task(batch, run_takes=takes), cluster(10e9, gpus=2))
    assert said in str(refusal.value)


def test_without_rates_no_time_is_said_and_that_is_chosen_which_sends_least() -> None:
    plan = make_plan(task(), Cluster(8, 80e9))
    assert to_json(plan)["stages"]["2"]["seconds"] is None
    fitting = [each for each in plan.by_stage.values() if each.fits(plan.cluster) and each.stage > 1]
    assert plan.chosen.sent == min(each.sent for each in fitting)


def test_a_ring_takes_as_long_as_its_slowest_part_and_its_hops() -> None:
    """64 GPUs in 8 nodes; 64 GB: each sends 63 of 64 parts, all of which cross the network of its node once."""
    gathered = Collective("all-gather", "", 64e9, 2)
    reduced = Collective("all-reduce", "", 64e9, 2)
    machines = Cluster(64, 80e9, 8, 1e15, bandwidth=100e9, link=450e9)
    hops = 8 * HOP_BETWEEN_NODES + 55 * HOP_IN_NODE
    assert gathered.sent(64) == 63e9
    assert machines.seconds(gathered) == pytest.approx(0.63 + 2 * hops)
    assert machines.seconds(reduced) == pytest.approx(2 * machines.seconds(gathered))
    assert replace(machines, link=50e9).seconds(gathered) == pytest.approx(1.26 + 2 * hops)
    assert Cluster(1, 80e9).seconds(gathered) == 0.0
