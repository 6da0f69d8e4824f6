"""The process that tells trackers how training goes: it reads what the run has written, and nothing waits for it.

    python -m adept_ds.training.follower     started by `tracking`; a `Job` and then, at last, a `How` on its stdin

It follows metrics.jsonl, with a thread for each tracker: one that does not answer holds up neither training nor another
tracker. How far each has been told stands in tracking.json, so that a run that goes on goes on there too, under the
same name, and tells nothing twice; what a tracker did not take it is given again. A line on stdout is for the user,
what libraries print goes to the run's log.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from adept_ds.base.digests import Digest
from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import RunSummary, whole_line
from adept_ds.training.trackers import TRACKERS, How, Tracker

_LOOKS, _SAVES = 2.0, 5.0
"""Seconds between two looks into the log; between two notes of how far it was told."""

_LONGEST_WAIT = 120.0
"""Seconds until a tracker that failed is tried again; 4 at first."""

_RECORDS, _BYTES = 50, 1 << 20
"""In one call of a tracker; in one look."""

_KINDS = ("refresh_seconds", "eval", "guard")
"""Lines of one step stand in this order, behind that of the step itself."""


class Job(Record):
    """What the process is started for."""

    run_dir: str
    title: str
    """Of the run, for people."""
    config: dict[str, Any]
    config_digest: Digest
    """Of what makes it another training, if it begins anew."""
    first_step: int
    lr: float
    steps: int
    targets: dict[str, str]
    """By key of the section `logging`."""
    patience: float
    """Seconds that trackers have for the last records when training has ended."""


class Known(Record):
    """What is known of a run that a tracker was told of."""

    target: str
    name: str
    """By which it knows the run."""
    config_digest: Digest
    lr: float
    step: int = 0
    kind: int = -1
    """Of the last line that it took."""
    ended: How | None = None
    """It was told everything, and that training is over."""


class Memory(Record):
    """tracking.json"""

    trackers: dict[str, Known] = Field(default_factory=dict)

    @classmethod
    def remedy(cls) -> str:
        return "trackers are told from the start, under another name"


class _Notes:
    """It, for several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._memory = Memory()
        with suppress(InputError):
            self._memory = Memory.load(path)

    def of(self, name: str) -> Known | None:
        return self._memory.trackers.get(name)

    def save(self, name: str, known: Known) -> None:
        with self._lock:
            self._memory = Memory(trackers=self._memory.trackers | {name: known})
            self._memory.save(self._path)


def begun(job: Job, tracker: Tracker, found: Known | None) -> Known:
    """Under which name, and behind which line, a tracker is told of this training.

    A run that starts from the beginning as it did before is the same one; what it did not compute in the same way, at a
    lower rate after it broke down, is told once more.
    """
    again = found is not None and found.target == tracker.target
    if found is None or not again or (job.first_step == 0 and found.config_digest != job.config_digest):
        return Known(target=tracker.target, name=tracker.new_name(), config_digest=job.config_digest, lr=job.lr)
    if found.lr != job.lr:
        found = found.model_copy(update={"lr": job.lr, "step": job.first_step, "kind": len(_KINDS)})
    return found.model_copy(update={"ended": None})


class Tail:
    """The lines of a log that is being written, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Those that were completed since; one that is not as it was written is passed over."""
        while True:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._at)
                    text = file.read(_BYTES)
            except OSError:
                return
            end = text.rfind(b"\n") + 1 or (len(text) if len(text) == _BYTES else 0)  # no line is that long
            if not end:
                return
            for line in text[:end].splitlines(keepends=True):
                self._at += len(line)  # by each: whoever takes them may fail between two
                if (record := whole_line(line.rstrip(b"\n"))) is not None:
                    yield record


class Telling:
    """One tracker, in a thread of its own."""

    def __init__(self, tracker: Tracker, job: Job, notes: _Notes, say: Callable[[str], None]) -> None:
        self._tracker, self._notes, self._say = tracker, notes, say
        self._tail = Tail(RunDirectory(Path(job.run_dir)).metrics)
        self._known = begun(job, tracker, notes.of(tracker.name))
        self._open = self._told = False
        self._waiting: list[dict[str, Any]] = []
        self._since_saved = 0.0
        self.title = f"logging.{tracker.name}"
        self.is_done = False

    def run(self, ended: threading.Event, how: Callable[[], How]) -> None:
        """Until training has ended and everything was told, or failed for the last time."""
        wait, complained = _LOOKS, False
        while True:
            last = ended.is_set()
            try:
                self._tell(last)
                if last:
                    self._end(how())
                    return
                if complained:
                    self._say(f"{self.title}: goes on")
                wait, complained = _LOOKS, False
            except Exception as error:  # of any library, for any reason
                if not complained:
                    self._say(f"{self.title}: {_words(error)}; training goes on, and it is tried again")
                wait, complained = min(2 * wait, _LONGEST_WAIT), True
                if last:
                    return
            ended.wait(wait)

    def _tell(self, last: bool) -> None:
        tracker = self._tracker
        if not self._open:
            if self._known.name and tracker.remembers:
                self._notes.save(tracker.name, self._known)
            name = tracker.begin(self._known.name)
            self._known, self._open = self._known.model_copy(update={"name": name}), True
            self._since_saved = _SAVES
        for record in self._tail.new():
            if not tracker.remembers or _position(record) > (self._known.step, self._known.kind):
                self._waiting.append(record)
            if len(self._waiting) >= _RECORDS:
                self._send()
        if self._waiting:
            self._send()
        self._since_saved += _LOOKS
        if tracker.remembers and (last or self._since_saved >= _SAVES):
            self._notes.save(tracker.name, self._known)
            self._since_saved = 0.0

    def _end(self, how: How) -> None:
        self._tracker.end(how)
        self._known = self._known.model_copy(update={"ended": how})
        if self._tracker.remembers:
            self._notes.save(self._tracker.name, self._known)
        self.is_done = True

    def _send(self) -> None:
        self._tracker.send(self._waiting)
        step, kind = _position(self._waiting[-1])
        self._known, self._waiting = self._known.model_copy(update={"step": step, "kind": kind}), []


def _position(record: dict[str, Any]) -> tuple[int, int]:
    kind = next((number for number, key in enumerate(_KINDS, start=1) if key in record), 0)
    return record["step"], kind


def _words(error: Exception) -> str:
    """On one line, and not longer than one."""
    lines = str(error).strip().splitlines()
    return str(AdeptError(f"{type(error).__name__}: {lines[0] if lines else ''}"))[:300]


def _facts(job: Job) -> dict[str, Any]:
    try:
        summary = RunSummary.load(RunDirectory(Path(job.run_dir)).summary).model_dump(mode="json", exclude_unset=True)
    except InputError:
        summary = {}
    return job.config | {"run": summary}


def main() -> None:
    """Until stdin ends."""
    os.nice(5)  # it shares the cores of rank 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # of a launcher that tells all: the run answers, and then stdin ends
    words = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)

    def say(line: str) -> None:
        with suppress(OSError, ValueError):
            words.write(f"{line}\n")

    job = Job.model_validate_json(sys.stdin.buffer.readline())
    notes, ended, how = _Notes(RunDirectory(Path(job.run_dir)).tracking), threading.Event(), list[How]()
    tellings, threads = list[Telling](), list[threading.Thread]()
    for kind in TRACKERS:
        if kind.name in job.targets:
            tracker = kind(job.targets[kind.name], job.title, Path(job.run_dir), _facts(job), job.steps)
            tellings.append(Telling(tracker, job, notes, say))
            threads.append(
                threading.Thread(target=tellings[-1].run, args=(ended, lambda: (how or ["killed"])[-1]), daemon=True)
            )
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        how.append(line.strip())  # type: ignore[arg-type]
    ended.set()
    over = threading.Timer(job.patience, lambda: _give_up(tellings, say))
    over.daemon = True
    over.start()
    for thread in threads:
        thread.join()
    over.cancel()
    if not all(telling.is_done for telling in tellings):
        _give_up(tellings, say)


def _give_up(tellings: list[Telling], say: Callable[[str], None]) -> None:
    """Whatever a library, or a process of its own, still waits for."""
    for telling in tellings:
        if not telling.is_done:
            say(f"{telling.title}: has not taken everything yet; the same command tells it the rest")
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
