"""Long work goes on where it was, bit for bit, whatever ended it; what cannot be used is done again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adept_ds.base.errors import InputError, StopRequestedError
from adept_ds.ranks import unfinished
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Unfinished

COUNT = 12


class Killed(BaseException):
    pass


class Summing:
    """Sums of numbers whose order shows in the last bits, step by step."""

    def __init__(self, directory: Path, made_of: str = "a" * 64) -> None:
        self.said = list[str]()
        self.unfinished = Unfinished(directory, made_of, Ranks(), self.said.append)
        self.done = list[int]()

    def run(self, end: Callable[[int], None] = lambda number: None, name: str = "summing") -> torch.Tensor:
        """Args:
        end: called before each step.
        """
        work = self.unfinished.work(name)
        total, rows = work.tensor("total", 3), work.tensor("rows", COUNT, dtype=torch.int32)
        for number in work.steps(COUNT, lambda number, count: end(number)):
            self.done.append(number)
            total += torch.tensor([0.1, 1e9, 1e-9]) * (number + 1) ** 0.5
            rows[number] = number
        self.seconds = work.seconds
        assert rows.tolist() == [*range(COUNT)]
        return total


def stop_at(number: int, error: type[BaseException] = Killed) -> Callable[[int], None]:
    def end(step: int) -> None:
        if step == number:
            raise error

    return end


@pytest.fixture
def whole(tmp_path: Path) -> torch.Tensor:
    """Never interrupted."""
    return Summing(tmp_path / "whole").run()


@pytest.mark.parametrize("step", [1, 2, 7, COUNT - 1])
def test_killed_work_goes_on_after_the_last_step_that_was_written(
    step: int, whole: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "_PAYS", 0.0)
    with pytest.raises(Killed):
        Summing(tmp_path / "kept").run(stop_at(step))
    again = Summing(tmp_path / "kept")
    assert torch.equal(again.run(), whole)
    assert again.done == [*range(step, COUNT)]
    assert again.said == [f"summing: going on after step {step} of {COUNT}"]


def test_what_is_killed_again_and_again_ends(
    whole: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a limit of time that is shorter than the work."""
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    monkeypatch.setattr(unfinished, "_PAYS", 0.0)
    for step in range(3, COUNT, 3):
        with pytest.raises(Killed):
            Summing(tmp_path / "kept").run(stop_at(step))
    assert torch.equal(Summing(tmp_path / "kept").run(), whole)


def test_work_that_is_asked_to_stop_writes_first(whole: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(StopRequestedError):
        Summing(tmp_path / "kept").run(stop_at(5, StopRequestedError))
    again = Summing(tmp_path / "kept")
    assert torch.equal(again.run(), whole)
    assert again.done == [*range(5, COUNT)]


def test_seconds_are_those_of_all_parts_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(unfinished.time, "perf_counter", lambda: float(next(clock)))
    first = Summing(tmp_path / "whole")
    first.run()
    with pytest.raises(StopRequestedError):
        Summing(tmp_path / "kept").run(stop_at(6, StopRequestedError))
    again = Summing(tmp_path / "kept")
    again.run()
    assert 0.5 * first.seconds < again.seconds < 2 * first.seconds


def test_little_work_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    summing = Summing(tmp_path / "kept")
    summing.run()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["made_of.json"]
    summing.unfinished.remove()
    assert not (tmp_path / "kept").exists()


def test_work_that_is_over_is_not_done_again_while_its_stage_goes_on(
    whole: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_WORTH", 0.0)
    first = Summing(tmp_path / "kept")
    first.run(name="one"), first.run(name="two")
    again = Summing(tmp_path / "kept")
    assert torch.equal(again.run(name="one"), whole)
    assert torch.equal(again.run(name="two"), whole)
    assert not again.done


def test_what_was_made_of_something_else_is_not_used(whole: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(StopRequestedError):
        Summing(tmp_path / "kept").run(stop_at(5, StopRequestedError))
    other = Summing(tmp_path / "kept", "b" * 64)
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
    assert torch.equal(other.run(), whole)
    assert other.done == [*range(COUNT)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda work: (work / "5" / "rank_0.safetensors").unlink(),
        lambda work: os.truncate(work / "5" / "rank_0.safetensors", 40),
        lambda work: (work / "5" / "rank_0.safetensors").write_bytes(b""),
        lambda work: (work / "steps.json").write_text('{"steps": -1, "seconds": 0}'),
        lambda work: (work / "steps.json").unlink(),
        lambda work: (work.parent / "made_of.json").write_text("{"),
    ],
    ids=["no-state", "short", "empty", "no-number", "no-record", "made-of-what"],
)
def test_what_is_damaged_is_done_again(damage: Callable[[Path], None], whole: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(StopRequestedError):
        Summing(tmp_path / "kept").run(stop_at(5, StopRequestedError))
    damage(tmp_path / "kept" / "summing")
    again = Summing(tmp_path / "kept")
    assert torch.equal(again.run(), whole)
    assert again.done == [*range(COUNT)]


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(unfinished, "sync", full)
    with pytest.raises(InputError, match=r"No space left on device.*make room where '.*kept"):
        Summing(tmp_path / "kept").run(stop_at(5, StopRequestedError))
    assert not [path for path in (tmp_path / "kept").rglob("*") if ".tmp" in path.name]
