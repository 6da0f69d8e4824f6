"""Long work that is kept as it goes: a job that is stopped, or killed, and started again goes on where it was.

Work is a number of steps, and a state, the tensors in which each rank gathers what it finds. Between steps the state of
every rank is written, not more often than pays, and read back bit for bit:

    DIRECTORY/made_of.json               digest of all that decides the numbers, how they are computed included
    DIRECTORY/WORK/12/rank_0.safetensors
    DIRECTORY/WORK/steps.json            {"steps": 12, "seconds": ...}, written when the files of all ranks are there

What was made of anything else, or cannot be read, is done again.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, NonNegativeInt

from adept_ds.base.digests import Digest
from adept_ds.base.errors import InputError, StopRequestedError
from adept_ds.base.files import sync, temporary_name
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.records import Record
from adept_ds.ranks.collectives import Ranks

if TYPE_CHECKING:
    import torch

State = dict[str, Any]
"""Tensors by name, of one rank; they are changed in place, or replaced."""

EVERY = 30.0
"""Seconds of work that may be lost."""

_PAYS = 20.0
"""More than that, if it took less than so many times as long as writing does."""

_WORTH = 5.0
"""Work that is over, and took fewer seconds, is done again."""


class _MadeOf(Record):
    made_of: Digest


class _Steps(Record):
    steps: NonNegativeInt
    seconds: NonNegativeFloat


class Work:
    """Steps whose state nobody keeps."""

    def __init__(self) -> None:
        self.state: State = {}
        """What was found so far: empty at the beginning."""
        self.seconds = 0.0
        """That the steps took, with those before an interruption; known when the last one is over."""

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the state, on the CPU: zeros (float64) at the beginning."""
        import torch

        if name not in self.state:
            self.state[name] = torch.zeros(*shape, dtype=dtype or torch.float64)
        found: torch.Tensor = self.state[name]
        return found

    def steps(self, count: int, begin: Callable[[int, int], None] | None = None) -> Iterator[int]:
        """The numbers of those that are left; every rank takes all of them.

        Args:
            begin: called before each with its number and `count`; it may communicate, and end the work.
        """
        started = time.perf_counter()
        for number in range(count):
            if begin:
                begin(number, count)
            yield number
        self.seconds += time.perf_counter() - started


LongWork = Callable[[str], AbstractContextManager[tuple[ProgressCallback, Work]]]
"""A context for work that has this title: a progress callback, by which all ranks end when they are asked to, and where
the work is kept."""


class Unfinished:
    """Where the works of one stage are kept until its result is there; every rank makes one.

    Args:
        directory: None: nothing is kept.
        made_of: digest of all that decides what is found.
        say: what is gone on with.
    """

    def __init__(
        self,
        directory: Path | None = None,
        made_of: str = "",
        ranks: Ranks = Ranks(),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._directory, self._ranks, self._say = directory, ranks, say
        if directory is not None:
            ranks.on_main(lambda: _begin(directory, made_of))

    def work(self, name: str) -> Work:
        """A piece of it, as far as it was done; every rank asks for it.

        Args:
            name: for people too.
        """
        if self._directory is None:
            return Work()
        return _KeptWork(self._directory / re.sub(r"[^\w.,=-]+", "_", name), name, self._ranks, self._say)

    def file(self, name: str) -> Path | None:
        """Of what is kept in another way, by rank 0 alone; None: nothing is."""
        return self._directory / name if self._directory else None

    def remove(self) -> None:
        """When the result is there."""
        directory = self._directory
        if directory is not None:
            self._ranks.on_main(lambda: shutil.rmtree(directory, ignore_errors=True))


def _begin(directory: Path, made_of: str) -> None:
    file = directory / "made_of.json"
    with suppress(InputError):
        if _MadeOf.load(file).made_of == made_of:
            return
    shutil.rmtree(directory, ignore_errors=True)
    _MadeOf(made_of=made_of).save(file)


class _KeptWork(Work):
    """Steps whose state is kept. All ranks write after the same ones: when, is agreed on, not read off each clock."""

    def __init__(self, directory: Path, name: str, ranks: Ranks, say: Callable[[str], None]) -> None:
        super().__init__()
        self._directory, self._name, self._ranks, self._say = directory, name, ranks, say
        self._kept = self._read()
        self._due, self._marked, self._writing = 0, time.perf_counter(), 0.0

    def steps(self, count: int, begin: Callable[[int, int], None] | None = None) -> Iterator[int]:
        first = self._kept
        if 0 < first < count:
            self._say(f"{self._name}: going on after step {first} of {count}")
        self._marked = time.perf_counter()
        for number in range(first, count):
            if self._is_due(number):
                self._keep(number)
            if begin:
                try:
                    begin(number, count)
                except StopRequestedError:  # on all ranks
                    if number > self._kept:
                        self._keep(number)
                    raise
            yield number
        if count > self._kept and self._ranks.max(time.perf_counter() - self._marked)[0] > _WORTH:
            self._keep(count)
        self._count_seconds()

    def _is_due(self, number: int) -> bool:
        """Before this step. Asked again after 1, 2, 4, ... steps, since some take longer than others."""
        done = number - self._kept
        if done and done & (done - 1) == 0:
            pace, writing = self._ranks.max((time.perf_counter() - self._marked) / done, self._writing)
            self._due = self._kept + max(1, int(max(EVERY, _PAYS * writing) / max(pace, 1e-9)))
        return done > 0 and number >= self._due

    def _keep(self, steps: int) -> None:
        self._count_seconds()
        folder, seconds = self._directory / str(steps), self.seconds
        self._ranks.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        remedy = f"make room where '{self._directory}' is, and run the same command again"
        self._ranks.on_each(lambda: _write(folder / self._file, self.state), remedy)

        def settle() -> None:
            _Steps(steps=steps, seconds=seconds).save(self._record)
            for other in self._directory.iterdir():
                if other.is_dir() and other != folder:
                    shutil.rmtree(other, ignore_errors=True)

        self._ranks.on_main(settle)
        self._kept, self._writing = steps, time.perf_counter() - self._marked
        self._marked = time.perf_counter()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._marked = self.seconds + now - self._marked, now

    def _read(self) -> int:
        """After how many steps the work goes on."""
        found = self._ranks.on_main(self._found)
        if found is None:
            return 0
        state = _read(self._directory / str(found.steps) / self._file)
        if not all(self._ranks.gather(state is not None)):
            self._say(f"{self._name}: what was done before cannot be read, and is done again")
            return 0
        assert state is not None
        self.state, self.seconds = state, found.seconds
        return found.steps

    def _found(self) -> _Steps | None:
        try:
            return _Steps.load(self._record)
        except InputError:
            return None

    @property
    def _record(self) -> Path:
        return self._directory / "steps.json"

    @property
    def _file(self) -> str:
        return f"rank_{self._ranks.rank}.safetensors"


def _write(path: Path, state: State) -> None:
    from safetensors.torch import save_file

    temporary = temporary_name(path)
    try:
        save_file(state, temporary)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> State | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file goes at the next write
    except (OSError, SafetensorError):
        return None
