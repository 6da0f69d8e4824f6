"""Ranks that are lost: which one died or hangs, in one line, instead of whatever ends the others' waiting.

Every rank has a thread that looks up once a second. When its own rank is in trouble, because what carries messages
failed, or because work that all ranks do together has not gone on for `dist_timeout_minutes`, it calls the roll; so it
does when another rank has called. Each process whose thread runs answers with what its main thread is at. Who does not
answer is dead or stopped; of those who answer, whoever is not waiting for others is what they wait for.

The roll is kept where the ranks met, by a client of each thread's own: nothing listens for it. That place goes with
rank 0 (or with torchrun), which is then the lost one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from adept_ds.base.errors import EXIT_MACHINE, LostRankError, exit_code
from adept_ds.base.progress import what_is_done
from adept_ds.ranks.launchers import LaunchedRank
from adept_ds.ranks.meeting import of_this_start

_BEAT = 1.0
"""Seconds between two looks."""

_PATIENCE = {True: 20.0, False: 5.0}
"""Seconds that a rank has to answer: where something hangs, and where a connection broke, since a launcher that sees a
rank end soon ends the others."""

_DEAF, _GONE, _LEAVING = 20.0, 60.0, 30.0
"""Seconds that the place where the ranks met has to answer; that it may be gone before they are lost for it; that a
process has to leave by itself."""

_CALL = "adept_ds/call"
_CARRIERS = ("torch/distributed/", "deepspeed/comm/")
_LIBRARIES = ("/torch/", "/deepspeed/")
_PROGRAM = str(Path(__file__).parent.parent)
_AGAIN = "run the same command again: it goes on from the last checkpoint"


@dataclass(frozen=True)
class Answer:
    """Of a rank, when the roll is called."""

    host: str
    doing: str
    """In words, such as 'training (last at step 5/7)'."""
    at: str
    """Where in the program its main thread is."""
    waits: bool
    """For other ranks."""


@dataclass(frozen=True)
class Roll:
    """What is known when all have answered that can."""

    answers: Mapping[int, Answer]
    places: Mapping[int, tuple[str, int]]
    """Host and process of every rank that said so at its start."""
    ended: Mapping[int, tuple[int, str]]
    """Ranks that ended by themselves: their exit codes, and what they have not told the user."""
    hangs: bool
    """The roll was called because work did not go on, and not because a connection broke."""


@contextmanager
def watched(
    launched: LaunchedRank,
    minutes: float,
    say: Callable[[str], None],
    logs: Path,
    leaving: Callable[[int, str], None] = lambda code, line: None,
) -> Iterator[None]:
    """What ranks do together, until they leave.

    Args:
        say: one line to the user, from any thread of any rank.
        logs: where each rank's log is, for that line.
        leaving: is told before this process is ended from the thread of the watch: its exit code, and the line.

    Raises:
        LostRankError: another rank is lost; the process has half a minute to end, and is ended then. Where the main
            thread cannot raise it, since it waits, the process ends at once, with its code.
    """
    if launched.world_size == 1:
        yield
        return
    watch = _Watch(launched, minutes, say, logs, leaving)
    try:
        yield
    except BaseException as error:
        lost = watch.called_by(error) if _is_of_a_carrier(error) else None
        if lost is None:
            watch.leave(error)
            raise
        traceback.print_exc()  # into the log
        raise lost from None
    watch.leave()


class _Watch:
    def __init__(
        self,
        launched: LaunchedRank,
        minutes: float,
        say: Callable[[str], None],
        logs: Path,
        leaving: Callable[[int, str], None],
    ) -> None:
        import datetime

        from torch.distributed import TCPStore

        self._launched, self._minutes, self._say, self._logs = launched, minutes, say, logs
        self._leaving = leaving
        client = TCPStore(
            launched.master_addr,
            launched.master_port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=_DEAF),
        )
        self._store = of_this_start(client)
        self._host = socket.gethostname()
        self._put(f"place/{launched.rank}", [self._host, os.getpid()])
        self._left, self._main_ends, self._roll_lock = threading.Event(), threading.Event(), threading.Lock()
        self._outcome: LostRankError | None = None
        self._unheard_since: float | None = None
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def called_by(self, error: BaseException) -> LostRankError:
        """The main thread got an error that another rank is to blame for."""
        self._main_ends.set()
        return self._roll(hangs="imed out" in str(error))

    def leave(self, error: BaseException | None = None) -> None:
        """This rank ends; with an error, that is told to those who may wait for it."""
        self._left.set()
        if error is None:
            return
        with suppress(Exception):
            self._ask(lambda: self._put(f"end/{self._launched.rank}", self._last_words(error)))
            if self._launched.rank == 0:
                self._ask(lambda: self._store.compare_set(_CALL, "", "broke"))
                self._wait_for_readers(range(self._launched.world_size))

    def _last_words(self, error: BaseException) -> tuple[int, str]:
        """Exit code, and what the main thread will not say because another rank of its host usually does."""
        code = exit_code(error)
        is_told = code == 1 or self._launched.local_rank == 0
        return code, "" if is_told else str(error)

    def _look(self) -> None:
        """Of the thread."""
        while not self._left.wait(_BEAT):
            hangs = self._is_stuck()
            if hangs or self._is_called():
                break
        else:
            return
        outcome = self._roll(hangs)
        if not self._main_ends.wait(2 * _BEAT):
            if outcome.line:
                self._say(outcome.line)
        else:
            time.sleep(_LEAVING)
        if not self._left.is_set():
            self._leaving(outcome.code, outcome.line or "")
            os._exit(outcome.code)

    def _is_stuck(self) -> bool:
        now = what_is_done()
        return now.together and time.monotonic() - now.since > 60 * self._minutes

    def _is_called(self) -> bool:
        try:
            called = bool(self._ask(lambda: self._store.check([_CALL])))
        except Exception:
            self._unheard_since = self._unheard_since or time.monotonic()
            return time.monotonic() - self._unheard_since > _GONE
        self._unheard_since = None
        return called

    def _roll(self, hangs: bool) -> LostRankError:
        with self._roll_lock:
            if self._outcome is None:
                self._outcome = self._called_roll(hangs)
            return self._outcome

    def _called_roll(self, hangs: bool) -> LostRankError:
        rank, ranks = self._launched.rank, range(self._launched.world_size)
        mine = self._answer()
        try:
            hangs = self._ask(lambda: self._store.compare_set(_CALL, "", "hangs" if hangs else "broke")) == b"hangs"
            if hangs:
                self._dump_stacks()
            self._ask(lambda: self._put(f"answer/{rank}", asdict(mine)))
            places = {r: tuple(place) for r, place in self._found("place", ranks).items()}
            answers, ended = self._answers(places, time.monotonic() + _PATIENCE[hangs])
            if rank:
                self._ask(lambda: self._put(f"read/{rank}", True))
            else:
                self._wait_for_readers(answers)
        except Exception:  # the place is gone where they met, or does not answer
            roll = Roll({rank: mine}, {}, {}, hangs or self._is_stuck())
            first = 1 if rank == self._launched.local_rank else 0  # of this host, without rank 0
            speaks, lost = self._launched.local_rank == first, [0]
        else:
            roll = Roll(answers, places, ended, hangs)
            speaks = rank == min(r for r, answer in answers.items() if answer.host == self._host)
            lost = [r for r in ranks if r not in answers]
        code, line = describe(roll, lost, self._minutes, self._logs)
        return LostRankError(line if speaks else None, code)

    def _answers(self, places: Mapping[int, Any], until: float) -> tuple[dict[int, Answer], dict[int, tuple[int, str]]]:
        """As soon as all others have answered or are known to have ended; but no longer than `until`."""
        ranks = range(self._launched.world_size)
        while True:
            answers = {rank: Answer(**found) for rank, found in self._found("answer", ranks).items()}
            silent = [rank for rank in ranks if rank not in answers]
            ended = {rank: (code, words) for rank, (code, words) in self._found("end", silent).items()}
            open_ones = [r for r in silent if r not in ended and not self._is_dead(*places.get(r, ("", 0)))]
            if not open_ones or time.monotonic() > until:
                return answers, ended
            time.sleep(0.1)

    def _wait_for_readers(self, ranks: Collection[int]) -> None:
        """Of rank 0, with whose process the place may go where the others read."""
        until = time.monotonic() + _PATIENCE[False]
        while time.monotonic() < until:
            if set(ranks) <= {0, *self._found("read", ranks), *self._found("end", ranks)}:
                return
            time.sleep(0.1)

    def _is_dead(self, host: str, process: int) -> bool:
        if host != self._host:
            return False
        try:
            return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def _answer(self) -> Answer:
        at, waits = _place_of(sys._current_frames().get(threading.main_thread().ident or 0))
        return Answer(self._host, what_is_done().words, at, waits or self._main_ends.is_set())

    def _dump_stacks(self) -> None:
        sys.stderr.flush()
        os.write(2, f"adept: rank {self._launched.rank}: the ranks hang; what its threads are at:\n".encode())
        faulthandler.dump_traceback(file=2)

    def _put(self, key: str, value: Any) -> None:
        self._store.set(f"adept_ds/{key}", json.dumps(value))

    def _found(self, kind: str, ranks: Any) -> dict[int, Any]:
        def find() -> dict[int, Any]:
            keys = {rank: f"adept_ds/{kind}/{rank}" for rank in ranks}
            return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

        found: dict[int, Any] = self._ask(find)
        return found

    def _ask(self, question: Callable[[], Any]) -> Any:
        """A question to the place where the ranks met, which may be stopped, and never answer.

        Raises:
            Exception: it is gone, or does not answer.
        """
        answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put((question(), None))
            except Exception as error:
                answer.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        found, error = answer.get(timeout=_DEAF)
        if error is not None:
            raise error
        return found


def describe(roll: Roll, lost: list[int], minutes: float, logs: Path) -> tuple[int, str | None]:
    """Exit code, and the line for the user; None: whoever ended said why.

    Args:
        lost: ranks that have not answered.
    """
    doing = next(iter(roll.answers.values())).doing
    for rank in lost:
        if rank in roll.ended:
            code, words = roll.ended[rank]
            return code, words or None
    if lost and roll.hangs:
        names = _names(lost, roll)
        return EXIT_MACHINE, (
            f"{names} did not answer for {minutes:g} minutes (dist_timeout_minutes) while {doing}: stopped, or out of "
            f"reach; {_AGAIN}"
        )
    if lost:
        return EXIT_MACHINE, f"{_names(lost, roll)} died while {doing}: killed, or out of memory; {_AGAIN}"
    busy = [rank for rank, answer in roll.answers.items() if not answer.waits]
    if not busy or len(busy) == len(roll.answers):
        return EXIT_MACHINE, (
            f"all ranks have waited for each other for {minutes:g} minutes (dist_timeout_minutes) while {doing}; what "
            f"each is at is in its log in '{logs}'; look at the network between the hosts, and {_AGAIN}"
        )
    answer = roll.answers[busy[0]]
    return EXIT_MACHINE, (
        f"{_names(busy, roll)} hangs while {answer.doing} ({answer.at}): the others have waited {minutes:g} minutes "
        f"(dist_timeout_minutes); the stacks of its threads are in its log in '{logs}'; {_AGAIN}"
    )


def _names(ranks: list[int], roll: Roll) -> str:
    first, more = ranks[0], len(ranks) - 1
    host, process = roll.places.get(first, ("", 0))
    place = f" (process {process} on {host})" if host else ""
    return f"rank {first}{place}" + (f" and {more} more" if more else "")


def _is_of_a_carrier(error: BaseException) -> bool:
    """Whether it is raised by what carries messages between ranks: gloo, NCCL, or what holds them together."""
    from torch.distributed import DistError

    words = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in words or "NCCL" in words))


def _place_of(innermost: Any) -> tuple[str, bool]:
    """Of a stack: where in this program it is, and whether it waits for other ranks."""
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    own = next((n for n, frame in enumerate(frames) if frame.f_code.co_filename.startswith(_PROGRAM)), 0)
    waits = any(_is_wait(frame.f_code) for frame in frames[: min(own, 4)])
    if not frames:
        return "nowhere", waits
    code = frames[own].f_code
    return f"{code.co_name} in {Path(code.co_filename).name}:{frames[own].f_lineno}", waits


def _is_wait(code: Any) -> bool:
    file = code.co_filename
    return any(part in file for part in _CARRIERS) or (code.co_name == "wait" and any(p in file for p in _LIBRARIES))
