"""Ranks that are killed, stopped, asked to stop, or that hang, and losses that are no numbers, anywhere in a run.

Two ranks run every stage. At an event of one of them, drawn once for all, the fault comes; then the same command is
given again, and what comes out is, bit for bit, that of a run which nobody disturbed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.fault_worker import EVENTS, Planted
from harness.faults import (
    CHECKPOINT_EVERY,
    Ended,
    Fault,
    Run,
    Undisturbed,
    disturbed,
    go_on,
    leftovers,
    mostly_slow,
    point,
    shares,
)
from harness.small_disk import small_disk
from harness.workspace import Workspace

COUNTS = {"kill": 6, "kill all": 3, "term": 4, "usr1": 2, "stop": 1, "hang": 1, "full": 6}
"""By what happens: of each event, and of each rank where that matters."""

ROOM = 64 << 20

PLACE = r"rank {rank}( \(process \d+ on .+\))?"  # rank 0 takes the place where ranks met with it
AGAIN = "run the same command again: it goes on from the last checkpoint"


@dataclass(frozen=True)
class Case:
    what: str
    event: str
    rank: int
    share: float
    """Of the events that the rank sees in a run, how many it sees before."""

    def __str__(self) -> str:
        return f"{self.what} rank {self.rank} at {self.share:.3f} of {self.event}"


def cases(*whats: str) -> list[Case]:
    found = []
    for what in whats:
        for event in EVENTS if what not in ("stop", "hang", "full") else ("files",) if what == "full" else ("words",):
            for rank in (0, 1) if what in ("kill", "stop", "hang") else (0,):
                name = f"{what} {event} {rank}"
                every = shares(name, COUNTS[what])
                found += [Case(what, event, rank, share) for share in every]
    return found


def planted(case: Case, of: Undisturbed, **more: str) -> Planted:
    return Planted(
        case.what.partition(" ")[0], case.rank, case.event, point(of, case.rank, case.event, case.share), **more
    )


@pytest.fixture
def run(workspace: Workspace, tmp_path: Path) -> Run:
    return Run(workspace, tmp_path / "run", 2)


@pytest.mark.parametrize("case", mostly_slow(cases("kill", "kill all"), 1), ids=str)
def test_who_is_killed_is_named_and_the_run_goes_on(
    case: Case, run: Run, tmp_path: Path, on_two_ranks: Undisturbed, fault: Fault
) -> None:
    ended = disturbed(run, planted(case, on_two_ranks), tmp_path, with_all=case.what == "kill all")
    assert ended.codes[case.rank] == -9
    fault.injected(f"{case.what}, {_WHILE[case.event]}")
    if case.what == "kill":
        assert_told(ended, case.rank, 4, f"{PLACE} died while .+: killed, or out of memory; {AGAIN}")
    recovered(fault, run, on_two_ranks)


@pytest.mark.parametrize("case", mostly_slow(cases("stop", "hang"), 0), ids=str)
def test_who_hangs_is_named_and_the_run_goes_on(
    case: Case, run: Run, tmp_path: Path, on_two_ranks: Undisturbed, fault: Fault
) -> None:
    minutes = 0.5
    ended = disturbed(run, planted(case, on_two_ranks), tmp_path, dist_timeout_minutes=minutes)
    fault.injected("a rank is stopped" if case.what == "stop" else "a rank hangs")
    waited = rf"{minutes:g} minutes \(dist_timeout_minutes\)"
    words = {
        "stop": f"{PLACE} did not answer for {waited} while .+: stopped, or out of reach; {AGAIN}",
        "hang": rf"{PLACE} hangs while .+ \(.+\): the others have waited {waited}; the stacks .+; {AGAIN}",
    }
    assert_told(ended, case.rank, 4, words[case.what])
    recovered(fault, run, on_two_ranks, dist_timeout_minutes=minutes)


@pytest.mark.parametrize("case", mostly_slow(cases("term", "usr1"), 0), ids=str)
def test_who_is_asked_to_stop_says_so_and_the_run_goes_on(
    case: Case, run: Run, tmp_path: Path, on_two_ranks: Undisturbed, fault: Fault
) -> None:
    """The signal may come when there is nothing left to stop."""
    ended = disturbed(run, planted(case, on_two_ranks), tmp_path)
    fault.injected("SIGTERM" if case.what == "term" else "SIGUSR1")
    if ended.codes != [0, 0]:
        assert ended.codes == [3, 3], ended.said
        (line,) = ended.lines
        assert line.endswith("; run the same command again to go on")
    recovered(fault, run, on_two_ranks)


@pytest.mark.parametrize("case", mostly_slow(cases("full"), 0), ids=str)
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    case: Case, workspace: Workspace, tmp_path: Path, on_two_ranks: Undisturbed, fault: Fault
) -> None:
    with small_disk(tmp_path / "disk", ROOM) as disk:
        run, ballast = Run(workspace, disk.folder / "run", 2), disk.folder / "ballast"
        ended = disturbed(run, planted(case, on_two_ranks, ballast=str(ballast)), tmp_path)
        assert ballast.is_file(), ended.said
        fault.injected("the disk is full")
        if ended.codes != [0, 0]:  # else all was written, or not needed
            assert ended.codes == [4, 4], ended.said
            (line,) = ended.lines
            assert re.fullmatch(
                "adept: no space left on '.+'; make room there, and run the same command again", line
            ), line
        assert leftovers(run.root) == []
        ballast.unlink()
        recovered(fault, run, on_two_ranks)


@pytest.mark.parametrize("case", mostly_slow([("nan", 0, 1), ("nan", 1, 4), ("inf", 0, 5), ("inf", 1, 2)], 0), ids=str)
def test_a_loss_that_is_no_number_is_skipped_by_all(
    case: tuple[str, int, int], run: Run, tmp_path: Path, fault: Fault
) -> None:
    what, rank, step = case
    ended = disturbed(run, Planted(what, rank, at=step), tmp_path)
    fault.injected("a loss is NaN or infinite on one rank")
    assert (ended.codes, ended.lines) == ([0, 0], [])
    skipped = {of[0] for of in run.results()["steps"] if of[1] is None}
    assert skipped == {step}
    fault.recovered(1)


_WHILE = {"words": "while ranks speak", "layers": "in a forward pass", "files": "among writes"}


def assert_told(ended: Ended, lost: int, code: int, words: str) -> None:
    """In one line of all ranks (one that hangs can still say so); or who is left had no need of the other any more."""
    left = 1 - lost
    if ended.codes[left] == 0:
        assert ended.said[left] == ""
        return
    assert ended.codes[left] == code, ended.said
    (line,) = ended.lines
    assert re.fullmatch("adept: " + words.format(rank=lost), line), line


def recovered(fault: Fault, run: Run, reference: Undisturbed, **sections: float) -> None:
    lost = go_on(run, reference.results, **sections)
    assert lost <= CHECKPOINT_EVERY
    fault.recovered(lost)
