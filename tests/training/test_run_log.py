"""What training writes about itself: steps, refreshes, evaluations, and the movement of units."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import MachineError
from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory
from adept_ds.training.run_log import RunLog
from adept_ds.units.registry import Unit

UNITS = [Unit("layers.1.a", "matrix", 1, "a", 16), Unit("layers.1.b", "norm", 1, "b", 4)]


def write_log(run_dir: Path, first_step: int, steps: range, *, active: bool = True) -> None:
    log = RunLog(RunDirectory(run_dir), first_step, "model: m", active=active)
    if first_step == 0:
        log.refresh(0, UNITS, [1.0, 2.0], [2.0, 0.0], 0.0)
        log.evaluation(0, {"domain": {"loss": 3.0, "tokens": 5}})
    for step in steps:
        log.step({"step": step, "loss": float(step), "run": first_step})
        if step % 2 == 0:
            log.refresh(step, UNITS, [1.0, 2.0], [2.0, 0.0], 0.5)
            log.evaluation(step, {"domain": {"loss": 3.0, "tokens": 5}})
    log.close()


def test_records_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 8))  # crashed after step 7; the last checkpoint was step 4
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # in the middle of a line
    write_log(tmp_path, 4, range(5, 11))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    steps = [(record["step"], record["run"]) for record in records if "loss" in record]
    assert steps == [(step, 0) for step in range(1, 5)] + [(step, 4) for step in range(5, 11)]
    assert [record["step"] for record in records if "eval" in record] == [0, 2, 4, 6, 8, 10]
    refreshes = read_json_lines(tmp_path / "unit_importance.jsonl")
    assert [record["step"] for record in refreshes] == [0, 2, 4, 6, 8, 10]


def test_a_run_from_the_start_keeps_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 8))
    write_log(tmp_path, 0, range(1, 3))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert [record["step"] for record in records if "eval" in record] == [0, 2]
    assert [record["step"] for record in read_json_lines(tmp_path / "unit_importance.jsonl")] == [0, 2]


def test_a_refresh_is_written_as_the_design_says(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 2))
    (line,) = read_json_lines(tmp_path / "unit_importance.jsonl")
    assert len(line.pop("crc32")) == 8
    assert line == {
        "step": 0,
        "units": [
            {"unit": "layers.1.a", "kind": "matrix", "importance": 1.0, "multiplier": 2.0},
            {"unit": "layers.1.b", "kind": "norm", "importance": 2.0, "multiplier": 0.0},
        ],
    }


def test_a_refresh_on_both_sides_is_written_with_both_importances(tmp_path: Path) -> None:
    log = RunLog(RunDirectory(tmp_path), 0, "model: m")
    log.refresh(0, UNITS, [1.0, 2.0], [2.0, 0.0], 0.0, [3.0, 4.0])
    log.close()
    (line,) = read_json_lines(tmp_path / "unit_importance.jsonl")
    assert [(unit["importance"], unit["domain_importance"]) for unit in line["units"]] == [(1.0, 3.0), (2.0, 4.0)]


@pytest.mark.parametrize("error", [KeyError, None])
def test_the_files_of_tensorboard_are_closed_whatever_ends_training(
    tmp_path: Path, error: type[Exception] | None
) -> None:
    """And of a full disk nothing is said behind another error."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(error or MachineError),
        RunLog(RunDirectory(tmp_path), 0, "model: m") as log,
    ):
        log.step({"step": 1, "loss": 1.0})
        patched.setattr(log._board._writer, "close", raising(full))
        if error:
            raise error
    before = set(threading.enumerate())
    with suppress(KeyError), RunLog(RunDirectory(tmp_path / "other"), 0, "model: m") as log:
        log.step({"step": 1, "loss": 1.0})
        raise KeyError
    assert set(threading.enumerate()) <= before


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_tensorboard_has_the_same_numbers_and_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_log(tmp_path, 0, range(1, 5))
    board: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(s, float(s)) for s in range(1, 5)]
    assert [event.step for event in board.Scalars("eval/domain_loss")] == [0, 2, 4]
    assert [event.value for event in board.Scalars("multiplier/layers.1.a")] == [2.0, 2.0, 2.0]
    assert "model: m" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_neurons_of_a_layer_are_one_curve_and_a_histogram_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    neurons = [Unit(f"layers.2.mlp.neuron.{number}", "neuron", 2, "mlp.neuron", 3) for number in range(40)]
    log = RunLog(RunDirectory(tmp_path), 0, "model: m")
    log.refresh(0, [*UNITS, *neurons], [1.0] * 42, [2.0, 0.5, *(0.1 * n for n in range(40))], 0.0)
    log.close()
    board: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    curves = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"] if tag.startswith("multiplier/")}
    assert curves == pytest.approx(
        {"multiplier/layers.1.a": 2.0, "multiplier/layers.1.b": 0.5, "multiplier/layers.2.mlp.neuron": 1.95}
    )
    assert board.Tags()["histograms"] == ["multiplier/layers.2.mlp.neuron"]
    assert len(read_json_lines(tmp_path / "unit_importance.jsonl")[0]["units"]) == 42


# --- movement -------------------------------------------------------------------------------------------------------


def write_movement(run_dir: Path, first_step: int, steps: range, *, active: bool = True) -> None:
    log = RunLog(RunDirectory(run_dir), first_step, "model: m", active=active)
    for step in steps:
        log.movement(step, step - 2, UNITS, [2.0, 0.0], [1.0 + first_step, 0.0], [float(step), 6.0])
    log.close()


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board: Any = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("movement/")]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def test_a_line_of_movement_has_every_unit_with_its_multiplier_and_both_distances(tmp_path: Path) -> None:
    write_movement(tmp_path, 0, range(2, 4, 2))
    (line,) = read_json_lines(tmp_path / "unit_movement.jsonl")
    del line["crc32"]
    assert line == {
        "step": 2,
        "since": 0,
        "units": [
            {"unit": "layers.1.a", "kind": "matrix", "numel": 16, "multiplier": 2.0, "moved": 1.0}
            | {"moved_since_start": 2.0},
            {"unit": "layers.1.b", "kind": "norm", "numel": 4, "multiplier": 0.0, "moved": 0.0}
            | {"moved_since_start": 6.0},
        ],
    }


def test_movement_after_the_resumed_step_is_dropped(tmp_path: Path) -> None:
    write_movement(tmp_path, 0, range(2, 10, 2))  # crashed after step 8; the last checkpoint was step 4
    with (tmp_path / "unit_movement.jsonl").open("a") as file:
        file.write('{"step": 10, "sin')  # in the middle of a line
    write_movement(tmp_path, 4, range(6, 12, 2))
    records = read_json_lines(tmp_path / "unit_movement.jsonl")
    assert [(record["step"], record["units"][0]["moved"]) for record in records] == [
        (2, 1.0), (4, 1.0), (6, 5.0), (8, 5.0), (10, 5.0)
    ]  # fmt: skip


def test_a_run_from_the_start_keeps_no_movement_of_an_earlier_one(tmp_path: Path) -> None:
    write_movement(tmp_path, 0, range(2, 10, 2))
    write_movement(tmp_path, 0, range(2, 4, 2))
    assert [record["step"] for record in read_json_lines(tmp_path / "unit_movement.jsonl")] == [2]


def test_tensorboard_shows_movement_by_element(tmp_path: Path) -> None:
    write_movement(tmp_path, 0, range(2, 6, 2))
    # L2 norms over the root of 16 and of 4 elements; exact in fp32
    expected = {"movement/layers.1.a": [(2, 0.5), (4, 1.0)], "movement/layers.1.b": [(2, 3.0), (4, 3.0)]}
    assert scalars(tmp_path) == expected


def test_movements_of_a_layers_neurons_are_one_curve_and_a_histogram(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    neurons = [Unit(f"layers.2.mlp.neuron.{number}", "neuron", 2, "mlp.neuron", 4) for number in range(5)]
    log = RunLog(RunDirectory(tmp_path), 0, "model: m")
    log.movement(3, 0, [*UNITS, *neurons], [1.0] * 7, [1.0] * 7, [4.0, 2.0, 0.0, 2.0, 4.0, 6.0, 8.0])
    log.close()
    board: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert scalars(tmp_path)["movement/layers.2.mlp.neuron"] == [(3, 2.0)]
    assert len(scalars(tmp_path)) == 3
    assert board.Tags()["histograms"] == ["movement/layers.2.mlp.neuron"]
    assert len(read_json_lines(tmp_path / "unit_movement.jsonl")[0]["units"]) == 7


def test_only_rank_0_writes(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 4), active=False)
    write_movement(tmp_path, 0, range(2, 6, 2), active=False)
    assert not list(tmp_path.iterdir())


def test_lines_that_are_lost_are_named_by_log_and_steps(tmp_path: Path) -> None:
    """Of steps by their numbers, of units by the refreshes that metrics tell of."""
    run, said = RunDirectory(tmp_path), list[str]()
    steps = [{"step": step, "loss": 2.0} for step in (1, 2, 5)]
    refreshes = [{"step": step, "refresh_seconds": 0.1} for step in (0, 2, 4)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in [*refreshes, *steps]))
    run.unit_importance.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 4)))
    RunLog(run, 5, "", say=said.append).close()
    assert said == [
        f"'{run.metrics}' has lost lines of steps 3 to 4: the report goes without them",
        f"'{run.unit_importance}' has lost lines of step 2: the report goes without them",
        f"'{run.unit_movement}' has lost lines of steps 2 to 4: the report goes without them",
    ]


def test_of_a_log_that_has_all_lines_nothing_is_said(tmp_path: Path) -> None:
    run, said = RunDirectory(tmp_path), list[str]()
    run.metrics.write_text("".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in (1, 2)))
    RunLog(run, 2, "", say=said.append).close()
    assert said == []


@pytest.mark.parametrize("what", ["evaluation", "refresh", "guard", "movement", "catch_up", "step", "close"])
def test_a_step_is_written_before_whatever_follows_it(tmp_path: Path, what: str) -> None:
    """It waits for the device to be busy again, and for no longer than anything else that may be found on the disk."""
    log = RunLog(RunDirectory(tmp_path), 0, "model: m")
    log.step({"step": 1, "loss": 2.0})
    assert not (tmp_path / "metrics.jsonl").exists()
    arguments: dict[str, list[Any]] = {
        "evaluation": [1, {"domain": {"loss": 3.0, "tokens": 5}}],
        "refresh": [1, UNITS, [1.0, 2.0], [2.0, 0.0], 0.5],
        "guard": [1, {"general": {}}],
        "movement": [1, 0, UNITS, [1.0, 1.0], [0.1, 0.2], [0.1, 0.2]],
        "step": [{"step": 2, "loss": 3.0}],
    }
    getattr(log, what)(*arguments.get(what, []))
    first = read_json_lines(tmp_path / "metrics.jsonl")[0]
    assert (first["step"], first["loss"]) == (1, 2.0)
    log.close()
