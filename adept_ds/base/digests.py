"""What files are, by content: SHA-256, read once and remembered for as long as a file looks untouched.

A file is recognised by path, size, times and inode. One that was changed within the last seconds is read again the next
time: on file systems with coarse times a second change would look like the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from adept_ds.base.errors import InputError, MachineError
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.base.records import Record

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_CHUNK = 4 << 20
_SETTLED_NS = 2 * 10**9
"""A file is remembered if its last change is longer ago than this."""

_NOT_OF_A_TREE = (".", "cache-")
"""Beginnings of names that libraries write beside a data set while it is read."""


def json_digest(value: Any) -> str:
    """Of what a JSON value says, however its keys are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class FileStamp(Record):
    """By which a file is known to be untouched."""

    path: str
    """Absolute, without links."""
    size: NonNegativeInt
    mtime_ns: int
    ctime_ns: int
    inode: NonNegativeInt

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Raises `InputError`: there is no such file, or it is a pipe or a device."""
        try:
            found = path.stat()
            name = str(path.resolve())
        except (OSError, RuntimeError) as error:  # links in a circle
            raise _unreadable(path, error) from None
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"'{path}' is no regular file; give the name of one")
        return cls(
            path=name.encode("utf-8", "backslashreplace").decode(),
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            inode=found.st_ino,
        )

    @property
    def is_settled(self) -> bool:
        """Whether another change would show; not for times in the future."""
        return max(self.mtime_ns, self.ctime_ns) + _SETTLED_NS < time.time_ns()


class _Remembered(Record):
    """What was found out about files."""

    what: str
    files: tuple[FileStamp, ...]
    digest: Digest

    @property
    def key(self) -> tuple[str, ...]:
        return (self.what, *(file.path for file in self.files))


class _Cache(Record):
    """The file in which all of it stands."""

    format: Literal[1]
    entries: tuple[_Remembered, ...]
    check: Digest
    """Of the entries: one flipped bit in a digest would make a file another one."""

    @classmethod
    def of(cls, entries: Iterable[_Remembered]) -> _Cache:
        listed = tuple(entries)
        return cls(format=1, entries=listed, check=cls._digest(listed))

    @model_validator(mode="after")
    def _as_it_was_written(self) -> _Cache:
        if self.check != self._digest(self.entries):
            raise ValueError("entries were changed")
        return self

    @staticmethod
    def _digest(entries: tuple[_Remembered, ...]) -> str:
        return json_digest([entry.to_json() for entry in entries])


class FileDigests:
    """SHA-256 of files by content.

    Each file is read once. Its digest is kept in the JSON file `cache`, made anew where damaged, together with the
    file's resolved path, size, times and inode; when one of them has changed the file is read again.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._news: dict[tuple[str, ...], _Remembered] = {}

    def file(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        """Digest of the bytes of a file.

        Args:
            on_bytes: called with the number of bytes of each chunk that is read.
        """
        return self.remembered("sha256", [path], lambda: sha256_of(path, on_bytes))

    def files(self, paths: Sequence[Path], progress: ProgressCallback | None = None) -> list[str]:
        """Digests of many files, in the given order."""
        sizes = [FileStamp.of(path).size for path in paths]
        meter = Meter(sum(sizes), progress)
        try:
            return [self._file_of_many(path, size, meter) for path, size in zip(paths, sizes, strict=True)]
        finally:
            self._save()

    def tree(self, directory: Path, progress: ProgressCallback | None = None) -> str:
        """Digest of the names and contents of all files below a directory, such as a data set's."""
        files = tree_files(directory)
        names = [file.relative_to(directory).as_posix() for file in files]
        return json_digest(list(zip(names, self.files(files, progress), strict=True)))

    def remembered(self, what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """Anything with 64 digits that is computed from the bytes of `files` alone, computed once.

        Args:
            what: tells it from other things that are computed from the same files.
        """
        try:
            return self._find(what, files, compute)
        finally:
            self._save()

    def _file_of_many(self, path: Path, size: int, meter: Meter) -> str:
        read = 0

        def advance(num_bytes: int) -> None:
            nonlocal read
            read += num_bytes
            meter.advance(num_bytes, path.name)

        digest = self._find("sha256", [path], lambda: sha256_of(path, advance))
        meter.advance(max(0, size - read), path.name)  # what was remembered
        return digest

    def _find(self, what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        stamps = tuple(FileStamp.of(file) for file in files)
        known = self._known.get((what, *(stamp.path for stamp in stamps)))
        if known is not None and known.files == stamps:
            return known.digest
        digest = compute()
        if all(stamp.is_settled for stamp in stamps) and stamps == tuple(map(FileStamp.of, files)):
            found = _Remembered(what=what, files=stamps, digest=digest)
            self._known[found.key] = self._news[found.key] = found
        return digest

    @cached_property
    def _known(self) -> dict[tuple[str, ...], _Remembered]:
        try:
            entries = _Cache.load(self._cache).entries
        except InputError:  # not there yet, or damaged: all of it can be found out again
            entries = ()
        return {entry.key: entry for entry in entries}

    def _save(self) -> None:
        """Beside what others have found out meanwhile."""
        if not self._news:
            return
        self.__dict__.pop("_known", None)
        self._known.update(self._news)
        self._news = {}
        with suppress(OSError, InputError, MachineError):  # where nothing can be written, files are read again
            _Cache.of(self._known.values()).save(self._cache)


def tree_files(directory: Path) -> list[Path]:
    """All files below a directory that are part of what it holds, sorted by their names in it."""
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(_NOT_OF_A_TREE)]
    return sorted(found, key=lambda file: file.relative_to(directory).as_posix())


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Of the bytes of a file, read now.

    Args:
        on_bytes: called with the number of bytes of each chunk.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
    except OSError as error:
        raise _unreadable(path, error) from None
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else "links lead in a circle"
    return InputError(f"'{path}' cannot be read ({reason}); give a file that can")
