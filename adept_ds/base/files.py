"""Files and directories that are either whole or absent, whatever ends the process or the machine.

What is written goes to a temporary name beside its place, reaches the disk, and only then takes its name. Temporary
names are unique, so that two processes, on two hosts even, never write into the same one.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from adept_ds.base.errors import AdeptError, InputError, MachineError

_FAILURES = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "disk quota exceeded on",
    errno.EFBIG: "file size limit reached by",
    errno.EIO: "input/output error on",
    errno.EROFS: "read-only file system at",
    errno.ESTALE: "stale file handle of",
}
"""Of what lies below a file: nobody's input is wrong, and no line of the program."""

_IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Somebody else has put something there, or may alone."""

_BY_TEXT = tuple((os.strerror(number), number) for number in _FAILURES)
"""Libraries that are not Python's say it in words."""

_FULL_BELOW = 1 << 20
"""Bytes."""

_TEMPORARY = re.compile(r"(?<![^/])\.([^/]+)\.[0-9a-f]{32}\.tmp(?![^/])")
"""A name that `temporary_name` made, and the one that it stands for."""


@contextmanager
def writing(path: Path | None = None) -> Iterator[None]:
    """Whatever is written inside, by whichever library, belongs to `path`; None: to what an error itself names.

    Raises:
        InputError: something else stands in the way, or the user may not write there.
        MachineError: the disk is full, or fails otherwise; the message names `path`.
    """
    try:
        yield
    except AdeptError:
        raise
    except _IN_THE_WAY as error:
        named = error.filename2 or error.filename
        if path is None or not _is_about(named, path):
            raise  # something else: what was read meanwhile, or a line of the program
        where = _final_name(named or path)
        remedy = (
            "ask for the right to do so" if isinstance(error, PermissionError) else "move away what is in its place"
        )
        raise InputError(f"'{where}' cannot be written ({error.strerror}); {remedy}") from None
    except Exception as error:
        failure = disk_failure(error, path)
        if failure is None:
            raise
        raise MachineError(failure) from None


def disk_failure(error: Exception, path: Path | None = None) -> str | None:
    """What to say of an error that is a full or failing disk's, as in `writing`; None: it is something else."""
    named = path or getattr(error, "filename", None)
    if isinstance(error, OSError):
        number = error.errno
    else:
        number = next((number for words, number in _BY_TEXT if words in str(error)), None)
        if number is None and "inline_container" in str(error) and path:
            # All that torch.save says is that positions do not fit.
            number = errno.ENOSPC if _is_full(path) else errno.EIO
    if number not in _FAILURES:
        return None
    remedy = "make room there" if number in (errno.ENOSPC, errno.EDQUOT) else "look at its file system"
    where = f"'{_final_name(named)}'" if named else "the disk"
    return f"{_FAILURES[number]} {where}; {remedy}, and run the same command again"


def _is_about(named: str | None, path: Path) -> bool:
    """Whether a file that an error names is one on the way to `path`, beside it or below; none named: it is."""
    found = Path(named or path)
    return found in path.parents or path.parent in found.parents


def _final_name(path: object) -> str:
    return _TEMPORARY.sub(r"\1", str(path))


def _is_full(path: Path) -> bool:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free < _FULL_BELOW


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Readers, now or after a crash, see the old file or the new one, never half of it. Raises as `writing`."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty file that becomes `path`, on the disk, when the block ends without error. Raises as `writing`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _new_file(path) as temporary:
            yield temporary
            sync(temporary)
        sync(path.parent)


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends without error, and leaves nothing otherwise."""
    temporary, held = _locked_file(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def _locked_file(path: Path) -> tuple[Path, int]:
    """An empty temporary file beside `path`, and what holds its lock: nobody takes it for abandoned."""
    while True:
        temporary = temporary_name(path)
        held = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _try_lock(held)
        if os.fstat(held).st_nlink:
            return temporary, held
        os.close(held)  # somebody tidied up just then


def write_all(file: FileIO, content: bytes | memoryview) -> int:
    """Write to a file without a buffer, which may take less than it is given; the number of bytes."""
    left = memoryview(content).cast("B")
    size = len(left)
    while left:
        left = left[file.write(left) :]
    return size


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite, for which JSON has no word, is null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return records


Approval = Callable[[Path], object]
"""Looks at a directory that is about to be removed, and raises `InputError` where it must stay."""


class NewDirectory:
    """A directory that is filled under a temporary name beside its place (`temporary`), until `publish` or `discard`.

    What a killed process left there is removed. A locked file beside it says that somebody still fills it. What stands
    in its place is removed only with the caller's `approve`, which is asked at the end as well; an empty directory
    needs none.

    Raises:
        InputError: its place is taken.
        MachineError: as `writing`.
    """

    def __init__(self, path: Path, approve: Approval | None = None) -> None:
        self._path, self._approve = path, approve
        self._check_place()
        self.temporary = temporary_name(path)
        self._lock = lock_of(self.temporary)
        self._held: int | None = None
        try:
            with writing(path):
                self._begin()
        except BaseException:
            self.discard()
            raise

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._path.parent, self._path.name)
        self._held = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        _try_lock(self._held)
        self.temporary.mkdir()

    def publish(self) -> None:
        """Let it take its real name; what stood there before is replaced, if it may be."""
        with writing(self._path):
            sync_tree(self.temporary)
        self._check_place()
        if is_filled(self._path):
            old = temporary_name(self._path)
            self._path.rename(old)
            self.temporary.rename(self._path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.temporary.rename(self._path)  # an empty directory is replaced by this, a filled one is not
        self._let_go()
        sync(self._path.parent)

    def _check_place(self) -> None:
        path = self._path
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"'{path}' is there and is no directory; give the name of a new one")
        if is_filled(path):
            if self._approve is None:
                raise InputError(f"'{path}' is there and not empty; give the name of a new directory")
            self._approve(path)

    def discard(self) -> None:
        """Leave nothing of it; after `publish` this does nothing."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            self._lock.unlink(missing_ok=True)
            os.close(self._held)
            self._held = None


@contextmanager
def new_directory(path: Path, approve: Approval | None = None) -> Iterator[Path]:
    """Fill a `NewDirectory`; it takes its real name only when the block ends without error."""
    new = NewDirectory(path, approve)
    try:
        with writing(path):
            yield new.temporary
        new.publish()
    except BaseException:
        new.discard()
        raise


def link_file(source: Path, target: Path) -> None:
    """A second name for a file that is never written into again; a copy where the file system has none.

    What is there already stays: whoever began this was killed. Raises as `writing`.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            return
        try:
            os.link(source, target)
        except OSError:
            with _new_file(target) as temporary:
                shutil.copy2(source, temporary)


def link_tree(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """Second names in `target` for all files in a directory, but those called so (relative paths, with /)."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source).as_posix()
        if file.is_file() and name not in leave_out:
            link_file(file, target / name)


def aside(path: Path, why: str) -> Path:
    """A free name beside `path` for what has to make room there: 'export.kept1'."""
    names = (path.with_name(f"{path.name}.{why}{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def is_filled(path: Path) -> bool:
    """Whether it is a directory with something in it."""
    return path.is_dir() and any(path.iterdir())


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove temporary directories in `folder` that no process fills any more: those for `name`, or all."""
    pattern = "*" if name is None else glob.escape(name)
    beside = f".{pattern}.{'[0-9a-f]' * 32}"
    leftovers = {path.with_suffix(".tmp") for suffix in ("tmp", "lock") for path in folder.glob(f"{beside}.{suffix}")}
    for temporary in leftovers:
        if temporary.is_symlink() or temporary.is_file():
            continue
        lock = lock_of(temporary)
        with suppress(OSError):  # another user's, among temporary files of all
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if _try_lock(descriptor):
                    shutil.rmtree(temporary, ignore_errors=True)
                    lock.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def remove_abandoned_files(root: Path) -> None:
    """Remove the temporary files in a whole tree that no process writes any more."""
    for temporary in root.rglob(f".*.{'[0-9a-f]' * 32}.tmp"):
        if temporary.is_symlink() or not temporary.is_file():
            continue
        with suppress(OSError):
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                if _try_lock(descriptor):
                    temporary.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Bring a directory and all that is in it to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot, for directories.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Let a file be read by whoever may read its directory: safetensors writes files for their owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def temporary_name(path: Path) -> Path:
    """A new one beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def lock_of(temporary: Path) -> Path:
    """What is locked while a temporary directory is filled."""
    return temporary.with_suffix(".lock")


def _try_lock(descriptor: int) -> bool:
    """Whether nobody else holds it; not known, and so not, where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
