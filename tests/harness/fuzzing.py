"""What must hold whatever a program is given, and the sandbox in which that is seen.

An input ends in success, or in an `InputError` of one line; within seconds and a bound of memory; without a file
written, changed or removed but where the call is to write; without the network, and without unpickling.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from harness.marks import slow
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adept_ds.base.errors import MOST_CHARACTERS, InputError

SECONDS = 10
"""Of work, as the processor counts them: that others compute too is not the fault of the input. Of waiting, six times
as many."""
_MANY, _FEWEST = 30, 10
"""Inputs: from so many on it is a search, in which every kind has some."""
MEMORY_BYTES = 1 << 30
"""Beyond what the process has had before."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: dict[str, dict[int, int | None]] = {
    "os.remove": {0: 1},
    "os.rmdir": {0: 1},
    "shutil.rmtree": {0: 1},
    "os.mkdir": {0: 2},
    "os.symlink": {1: 2},
    "os.rename": {0: 2, 1: 3},
    "os.link": {1: 3},
    "os.chmod": {0: 2},
    "os.chown": {0: 3},
    "os.utime": {0: 3},
    "os.truncate": {0: None},
}
"""Audit event -> which of its arguments are paths of something that changes, and which the directory they begin at."""

_NETWORK = dict.fromkeys(("socket.connect", "socket.sendto", "socket.sendmsg"), 1)
_NETWORK |= dict.fromkeys(("socket.getaddrinfo", "socket.gethostbyname"), 0)
"""Audit event -> which of its arguments is the address: of a socket within this host, a text."""


class FaultError(BaseException):
    """Of the program. No reader catches it."""


@dataclass
class _Watch:
    """What the interpreter reports of the calls that readers make, while an input is judged."""

    allowed: tuple[str, ...] | None = None
    """Where something may be written; None: nobody looks."""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING:
                self._check_place(path, event)
        elif event in _CHANGES:
            for position, of_folder in _CHANGES[event].items():
                folder = -1 if of_folder is None else arguments[of_folder]
                self._check_place(arguments[position], event, folder)
        elif event in _NETWORK:
            address = arguments[_NETWORK[event]]
            if event != "socket.connect" or not isinstance(address, str | bytes):
                self._fail(f"the network: {event} {address!r}")
        elif event == "pickle.find_class":
            self._fail(f"unpickled {arguments[0]}.{arguments[1]}")
        elif event in ("os.system", "os.exec", "os.posix_spawn"):
            self._fail(f"started {arguments}")

    def _check_place(self, path: Any, event: str, folder: int | None = -1) -> None:
        if isinstance(path, int) or path is None or self.allowed is None:
            return
        above, name = os.path.split(os.fsdecode(path))
        start = Path.cwd() if folder in (None, -1) else Path(f"/proc/self/fd/{folder}")
        place = f"{os.path.realpath(start / above)}/{name}"  # of a link, the link
        if event == "os.mkdir" and os.path.lexists(place):  # which fails
            return
        if place != os.devnull and not place.startswith(self.allowed):
            self._fail(f"{event} {place!r} outside of {self.allowed}")

    def _fail(self, what: str) -> None:
        self.allowed = None  # or describing it would fail as well
        raise FaultError(what)


_WATCH = _Watch()
sys.addaudithook(lambda event, arguments: _WATCH(event, arguments))


@dataclass(frozen=True)
class Sandbox:
    """A directory with what is read (`inputs`), something that is nobody's business (`canary`), and two places to
    write to: `out`, and `temporary`, which must be empty afterwards."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Sandbox:
        sandbox = cls(root)
        for folder in (sandbox.inputs, sandbox.canary, sandbox.out, sandbox.temporary):
            folder.mkdir(parents=True)
        (sandbox.canary / "secret").write_text("not to be read, changed or removed\n")
        (sandbox.canary / "secret.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        return sandbox

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def canary(self) -> Path:
        return self.root / "canary"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def seen(self, spared: tuple[str, ...] = ()) -> dict[str, tuple[int, int, int]]:
        """Everything but what may be written: size, time and inode by name."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            if Path(folder) == self.root:
                folders[:] = [name for name in folders if name not in ("out", "tmp")]
            for path in (f"{folder}/{name}" for name in (*folders, *names)):
                status = os.lstat(path)
                size, time = (0, 0) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
                found[path] = (size, time, status.st_ino)
        return {path: of for path, of in found.items() if not path.startswith(spared or ("\0",))}

    def clean(self) -> None:
        for child in self.out.iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    @contextmanager
    def holding(self, file: Path, content: bytes) -> Iterator[None]:
        """`file` has another content for a while, and is a newer file."""
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            file.write_bytes(before)


@contextmanager
def unchanged(sandbox: Sandbox, may_write: Sequence[Path] = ()) -> Iterator[None]:
    """Raises `FaultError`: something is another than before, or left among temporary files."""
    spared = tuple(map(str, may_write))
    before = sandbox.seen(spared)
    yield
    left = [*sandbox.temporary.iterdir()]
    if left:
        shutil.rmtree(sandbox.temporary)
        sandbox.temporary.mkdir()
        raise FaultError(f"left behind: {left}")
    after = sandbox.seen(spared)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise FaultError(f"changed: {changed}")


@contextmanager
def limits(sandbox: Sandbox, may_write: Sequence[Path] = ()) -> Iterator[None]:
    """Time, memory, files and network of one input in this process. Raises `FaultError`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with unchanged(sandbox, may_write), ExitStack() as stack:
        stack.enter_context(mock.patch.object(tempfile, "tempdir", str(sandbox.temporary)))
        stack.enter_context(mock.patch.object(sys, "dont_write_bytecode", True))
        stack.enter_context(_address_space(4 * MEMORY_BYTES))
        stack.enter_context(_alarm())
        places = (sandbox.out, sandbox.temporary, *may_write)
        stack.enter_context(mock.patch.object(_WATCH, "allowed", tuple(map(os.path.realpath, places))))
        yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    if grown > MEMORY_BYTES:
        raise FaultError(f"{grown >> 20} MiB of memory")


@contextmanager
def _alarm() -> Iterator[None]:
    """A last one ends the process where Python itself does not come to its turn."""
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, 6 * SECONDS)}
    previous = {number: signal.signal(number, _too_slow) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    faulthandler.dump_traceback_later(9 * SECONDS, exit=True)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()


def _too_slow(number: int, frame: FrameType | None) -> None:
    _WATCH.allowed = None
    raise FaultError("not done in time")


@contextmanager
def _address_space(more: int) -> Iterator[None]:
    """A bomb fails with a MemoryError, and the machine goes on."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_message(message: str, names: Sequence[str]) -> None:
    """One line that a terminal shows as it is, and that names what is wrong. Raises `FaultError`."""
    if not message.isprintable():
        raise FaultError(f"not one printable line: {message!r}")
    if len(message) > MOST_CHARACTERS:
        raise FaultError(f"{len(message)} characters: {message!r}")
    if not any(name in message for name in names):
        raise FaultError(f"names none of {list(names)}: {message!r}")
    if re.search(r"\bTraceback\b(?!.{0,4}most recent call last\):.*')", message):
        raise FaultError(f"a traceback: {message!r}")


def check_line(stderr: str) -> None:
    """What a command that refuses says, and nothing else. Raises `FaultError`."""
    if not stderr.startswith("adept: ") or not stderr.endswith("\n") or len(stderr.splitlines()) != 1:
        raise FaultError(f"not one line: {stderr[-3000:]!r}")
    check_message(stderr.removeprefix("adept: ").removesuffix("\n"), ("",))


@dataclass
class Tally:
    """What became of the inputs of a kind."""

    kind: str
    accepted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """By message, without what is particular to an input."""

    @property
    def refused(self) -> int:
        return self.refusals.total()

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused

    def add(self, refusal: str | None) -> None:
        if refusal is None:
            self.accepted += 1
        else:
            self.refusals[re.sub(r"'[^']*'|\"[^\"]*\"|[\d.e+-]*\d", "_", refusal)[:100]] += 1

    def as_row(self) -> list[Any]:
        return [self.kind, self.inputs, self.accepted, self.refused, len(self.refusals)]


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind, and what reads them."""

    name: str
    mutations: Callable[[Path], st.SearchStrategy[Any]]
    """From the directory of valid inputs."""
    read: Callable[[Sandbox, Any], object]
    """Puts an input in its place, and reads it. Raises `InputError` for what is no such input."""
    names: tuple[str, ...]
    """Of which a message has at least one: the file, or the key."""
    weight: float = 1.0
    """Share of the examples that it gets: less of what takes long."""
    writes: tuple[str, ...] = ()
    """In `inputs`, where it may write, besides `out`."""
    always_refused: bool = False
    never_refused: bool = False
    messages: int = 3
    """Distinct refusals that a full run must meet, at least."""


def name_of(kind: Kind) -> str:
    return kind.name


def mostly_quick(kinds: Sequence[Kind], *slow_ones: str) -> list[Any]:
    """As parameters of a test: all but those of these names, of which an input takes a second, at every commit."""
    assert {kind.name for kind in kinds} >= set(slow_ones)
    return [slow(kind) if kind.name in slow_ones else kind for kind in kinds]


def file_kind(
    file: str, change: Callable[[bytes], st.SearchStrategy[bytes]], read: Callable[[Sandbox], object], **more: Any
) -> Kind:
    """Of one file among valid ones."""

    def mutations(inputs: Path) -> st.SearchStrategy[bytes]:
        return change((inputs / file).read_bytes())

    def read_changed(sandbox: Sandbox, content: bytes) -> None:
        with sandbox.holding(sandbox.inputs / file, content):
            judged(sandbox, lambda: read(sandbox), [sandbox.inputs / place for place in more.get("writes", ())])

    name = more.pop("name", file)
    names = (*more.pop("names", ()), Path(file).name)
    return Kind(name, mutations, read_changed, names, **more)


def judged(sandbox: Sandbox, read: Callable[[], object], may_write: Sequence[Path] = ()) -> None:
    """Within limits; what any reader raises but `InputError` is a fault."""
    refusal: InputError | None = None
    with limits(sandbox, may_write):
        try:
            read()
        except InputError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def refusal_of(kind: Kind, sandbox: Sandbox, given_input: Any) -> str | None:
    """The message with which an input is refused. Raises `AssertionError`: it shows a fault."""
    try:
        try:
            kind.read(sandbox, given_input)
        except InputError as refusal:
            check_message(str(refusal), kind.names)
            return str(refusal)
    except FaultError as fault:
        raise AssertionError(str(fault)) from None
    except BaseException as error:  # those of Rust's libraries are no `Exception`
        raise AssertionError(f"{type(error).__name__}: {error}"[:2000]) from error
    finally:
        sandbox.clean()
    return None


def fuzz(kind: Kind, sandbox: Sandbox, examples: int) -> Tally:
    """Judge many inputs of a kind. Raises on the first fault, with the smallest input that shows it."""
    tally = Tally(kind.name)

    @settings(
        max_examples=max(_FEWEST if examples >= _MANY else 2, round(examples * kind.weight)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
        report_multiple_bugs=False,
    )
    @given(kind.mutations(sandbox.inputs))
    def judge(given_input: Any) -> None:
        tally.add(refusal_of(kind, sandbox, given_input))

    judge()
    return tally


def check_depth(kind: Kind, tally: Tally) -> None:
    """That many inputs have reached all of the reader. Raises `AssertionError`: they show nothing."""
    if tally.inputs < _MANY:
        return
    assert kind.always_refused or tally.accepted, "nothing is accepted: the mutations show nothing"
    if not kind.never_refused:
        assert len(tally.refusals) >= kind.messages, f"only {list(tally.refusals)}: mutations do not reach deep"


Fuzzing = Callable[[Kind, Sandbox], None]
"""Judges as many inputs as it is told, and notes what became of them."""
