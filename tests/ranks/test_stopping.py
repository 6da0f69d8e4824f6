"""A run that is asked to stop (Slurm's USR1) loses nothing, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.launching import adept, start
from harness.workspace import Workspace, write_corpus

from adept_ds.base.errors import StopRequestedError
from adept_ds.ranks.stopping import StopRequest

PATIENCE = 100.0
"""Seconds until something that takes a few must have happened."""


def _stop_when(
    ready: Callable[[], bool], world_size: int, *arguments: str, asked: slice = slice(None)
) -> list[int | None]:
    """Start `adept ARGUMENTS`, send USR1 to every rank (or those that are `asked`) when `ready`; the exit codes."""
    processes = start(world_size, ["-m", "adept_ds", *arguments])
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < deadline, "it never was ready to be stopped"
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            time.sleep(0.2)
        for process in processes[asked]:
            process.send_signal(signal.SIGUSR1)
        for process in processes:
            process.communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes]


def test_training_stops_with_a_checkpoint_and_resumes_from_it(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(
        tmp_path / "run", expand={"k": None, "layers": [1]}, train={"steps": 4000, "checkpoint_every": 4000}
    )
    assert adept(1, "train", config).returncode == 2, "there is no expanded model yet"
    assert adept(1, "expand", config).returncode == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    codes = _stop_when(lambda: metrics.is_file() and '"step": 2' in metrics.read_text(), 1, "train", str(config))
    assert codes == [3]
    assert not [*(tmp_path / "run").glob("lock*")], "it has ended"
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"resume after step {step}" in adept(1, "show", config).stdout


def test_probing_stops_on_every_rank_and_leaves_nothing_half_written(workspace: Workspace, tmp_path: Path) -> None:
    """Two ranks, in the middle of a sweep over more blocks than the test waits for."""
    corpus = write_corpus(tmp_path / "general.jsonl", 0, documents=20_000)
    config = workspace.config(tmp_path / "run", probe={"corpus": [str(corpus)], "sequences": 40_000})
    packed: list[float] = []

    def probing() -> bool:
        """Some seconds after packing. Were it earlier or later than the sweep itself, the promise is the same."""
        if not packed and any((tmp_path / "run" / "cache" / "tokens").glob("[!.]*")):
            packed.append(time.monotonic())
        return bool(packed) and time.monotonic() - packed[0] > 6

    assert _stop_when(probing, 2, "probe", str(config)) == [3, 3]
    assert not (tmp_path / "run" / "layer_importance.json").exists()
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    (kept,) = (tmp_path / "run" / "cache" / "unfinished" / "probe").glob("*/steps.json")
    assert json.loads(kept.read_text())["steps"] > 0, "where the same command goes on"


def test_one_rank_that_is_asked_stops_all_of_them_after_the_same_step(workspace: Workspace, tmp_path: Path) -> None:
    """As with a launcher that passes no signal on."""
    run_dir = tmp_path / "run"
    config = workspace.config(
        run_dir, expand={"k": None, "layers": [1]}, train={"steps": 4000, "checkpoint_every": 4000}
    )
    assert adept(1, "expand", config).returncode == 0
    metrics = run_dir / "metrics.jsonl"
    asked = slice(1, None)
    codes = _stop_when(
        lambda: metrics.is_file() and '"step": 2' in metrics.read_text(), 2, "train", str(config), asked=asked
    )
    assert codes == [3, 3]
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    assert f"resume after {checkpoint.name.replace('_', ' ')} " in adept(1, "show", config).stdout


# --- the request itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_ends_work_at_its_next_step_of_progress(number: signal.Signals) -> None:
    seen: list[tuple[float, str]] = []
    with StopRequest().listening() as stop:
        report = stop.checked("packing", lambda share, text: seen.append((share, text)), None)
        report(0.25, "a.jsonl")
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(StopRequestedError, match="stopped while packing"):
            report(0.5, "a.jsonl")
    assert seen == [(0.25, "a.jsonl")]


def test_a_second_interrupt_ends_at_once_and_no_other_signal_does() -> None:
    with StopRequest().listening():
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:  # would end the tests
            pytest.fail("a signal that no user repeats")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_mean_afterwards_what_they_meant_before() -> None:
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), StopRequest().listening() as stop:
        assert [signal.getsignal(number) for number in numbers] == [stop._on_signal] * 3
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before
