"""A rank that dies or hangs is named by those that are left, in one line, with an exit code of the table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.launching import start
from harness.marks import slow
from harness.rank_processes import RankProcess

from adept_ds.ranks.watch import Answer, Roll, describe

PROGRAM = """
import os, signal, sys, time
import adept_ds.cli.app as command
from adept_ds.base.errors import InputError, MachineError
from adept_ds.base.terminal import capture_output
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.ranks.watch import watched
from pathlib import Path

how, faulty, logs, minutes = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])

def fail():
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hangs":
        time.sleep(1000)
    raise {"bug": KeyError("boom"), "input": InputError("a: b; c"), "disk": MachineError("no space left on 'd'")}[how]

def work(*arguments, **options):
    launched = rank_from_environment(os.environ)
    with capture_output(logs / f"rank_{launched.rank}.log", is_main=launched.is_main) as terminal:
        ranks = join(launched)
        with watched(launched, minutes, terminal.complain, logs):
            ranks.barrier()
            with terminal.progress("training", together=True) as bar:
                for step in range(10):
                    if step == 3 and ranks.rank == faulty:
                        fail()
                    ranks.sum([1.0])
                    bar(step / 10, f"step {step}/10  loss 2.5")

command.app = work
command.main()
"""

CASES = {
    "a rank is killed": ("killed", 1, 3),
    "rank 0 is killed": ("killed", 0, 2),
    "a rank hangs": ("hangs", 1, 3),
    "rank 0 hangs": ("hangs", 0, 2),
    "a rank is stopped": ("stopped", 1, 2),
    "rank 0 is stopped": ("stopped", 0, 2),
    "a rank has a bug": ("bug", 1, 2),
    "a rank has bad input": ("input", 1, 2),
    "a rank's disk is full": ("disk", 1, 2),
    "the disk of rank 0 is full": ("disk", 0, 3),
}
"""What happens -> how, to which rank, of how many."""

MINUTES = "0.15"

PLACE = r"\(process \d+ on .+\)"
AT = r"while training \(last at step 2/10\)"
AGAIN = "run the same command again: it goes on from the last checkpoint"
WAITED = r"0.15 minutes \(dist_timeout_minutes\)"


@dataclass(frozen=True)
class Ended:
    codes: list[int | None]
    """By rank; of a stopped one None."""
    said: list[str]
    """On stderr."""
    logs: list[str]


AT_EVERY_COMMIT = [
    "a rank is killed",
    "a rank hangs",
    "a rank is stopped",
    "a rank has a bug",
    "the disk of rank 0 is full",
]


class Ends(dict[str, Ended]):
    """Found when they are asked for, several at once: most of the time they wait."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, asked: str) -> Ended:
        cases = [case for case in CASES if (case in AT_EVERY_COMMIT) == (asked in AT_EVERY_COMMIT)]
        waiting = [case for case in cases if CASES[case][0] in ("hangs", "stopped")]
        others = [case for case in cases if case not in waiting]
        self.update(ends_of(others, self._folder, "30") | ends_of(waiting, self._folder, MINUTES))
        return self[asked]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends(tmp_path_factory.mktemp("watch"))


def ends_of(cases: list[str], folder: Path, minutes: str) -> dict[str, Ended]:
    running = dict[str, list[RankProcess]]()
    try:
        for case in cases:
            how, faulty, ranks = CASES[case]
            running[case] = start(ranks, ["-c", PROGRAM, how, str(faulty), str(folder / case), minutes])
        return {case: end_of(case, running[case], folder / case) for case in cases}
    finally:
        for processes in running.values():
            for process in processes:
                process.kill()


def end_of(case: str, processes: list[RankProcess], folder: Path) -> Ended:
    how, faulty, _ = CASES[case]
    outcomes = [
        (None, "") if how == "stopped" and rank == faulty else (process.wait(240), process.communicate()[1])
        for rank, process in enumerate(processes)
    ]
    logs = [(folder / f"rank_{rank}.log").read_text() for rank in range(len(processes))]
    return Ended([code for code, _ in outcomes], [said for _, said in outcomes], logs)


def only_line(of: Ended) -> str:
    """Of all ranks of the host."""
    (line,) = "".join(of.said).splitlines()
    return line


@pytest.mark.parametrize(
    ("case", "codes", "line"),
    [
        ("a rank is killed", [4, -9, 4], f"rank 1 {PLACE} died {AT}: killed, or out of memory; {AGAIN}"),
        slow("rank 0 is killed", [-9, 4], f"rank 0 died {AT}: killed, or out of memory; {AGAIN}"),
        (
            "a rank hangs",
            [4, 4, 4],
            rf"rank 1 {PLACE} hangs {AT} \(.+:\d+\): the others have waited {WAITED}; the stacks .+ '.+'; {AGAIN}",
        ),
        slow("rank 0 hangs", [4, 4], f"rank 0 {PLACE} hangs {AT} .+"),
        (
            "a rank is stopped",
            [4, None],
            f"rank 1 {PLACE} did not answer for {WAITED} {AT}: stopped, or out of reach; .+",
        ),
        slow("rank 0 is stopped", [None, 4], f"rank 0 did not answer for {WAITED} {AT}: stopped, or out of reach; .+"),
        slow("a rank has bad input", [2, 2], "a: b; c"),
        slow("a rank's disk is full", [4, 4], "no space left on 'd'"),
        ("the disk of rank 0 is full", [4, 4, 4], "no space left on 'd'"),
    ],
)
def test_the_survivors_name_it_in_one_line_and_end_with_a_code_of_the_table(
    ended: dict[str, Ended], case: str, codes: list[int | None], line: str
) -> None:
    assert ended[case].codes == codes
    assert re.fullmatch(f"adept: {line}", only_line(ended[case])), only_line(ended[case])


def test_a_bug_of_one_rank_is_shown_once_and_the_others_keep_silent(ended: dict[str, Ended]) -> None:
    found = ended["a rank has a bug"]
    assert (found.codes, found.said[0]) == ([1, 1], "")
    assert found.said[1].startswith("adept[rank 1]: unexpected KeyError\nTraceback")


@pytest.mark.parametrize(("case", "faulty"), [("a rank hangs", 1), slow("rank 0 hangs", 0)])
def test_the_stacks_of_a_rank_that_hangs_are_in_its_log(ended: dict[str, Ended], case: str, faulty: int) -> None:
    log = ended[case].logs[faulty]
    assert f"rank {faulty}: the ranks hang; what its threads are at:" in log
    assert re.search(r"in fail\n", log) and re.search(r"Thread 0x", log)


def test_what_carried_the_messages_has_its_say_in_the_log(ended: dict[str, Ended]) -> None:
    assert "gloo" in ended["a rank is killed"].logs[0]
    assert "gloo" not in "".join(ended["a rank is killed"].said)


# --- what is said ---------------------------------------------------------------------------------------------------


def answer(*, waits: bool, host: str = "n1", at: str = "sum in collectives.py:50") -> Answer:
    return Answer(host, "training (last at step 2/10)", at, waits)


def described(answers: dict[int, Answer], lost: list[int], *, hangs: bool = True) -> str:
    code, line = describe(Roll(answers, {3: ("n2", 77)}, {}, hangs), lost, 30, Path("logs"))
    assert code == 4 and line is not None
    return line


def test_of_ranks_that_all_wait_none_is_blamed() -> None:
    """Nor of such as all look busy, as on accelerators, where waiting does not show on the host."""
    for waits in (True, False):
        line = described({rank: answer(waits=waits) for rank in range(4)}, [])
        assert "all ranks have waited for each other for 30 minutes (dist_timeout_minutes)" in line
        assert "look at the network between the hosts" in line


def test_many_lost_ranks_make_one_line() -> None:
    line = described({0: answer(waits=True)}, [3, 4, 5], hangs=False)
    assert line.startswith("rank 3 (process 77 on n2) and 2 more died while training")
