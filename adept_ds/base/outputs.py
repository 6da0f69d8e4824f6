"""Where a command may write a directory: nothing of the user's is ever replaced.

What a command wrote carries a mark that lists its files. A directory is replaced only if it is empty, or if it holds
what the same command wrote, untouched, and nothing else, and the user asks for that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from adept_ds.base.digests import Digest, sha256_of
from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.files import is_filled, lock_of, new_directory, sync_tree, temporary_name
from adept_ds.base.proofs import DigestOf, FileProof, InnerName, check_file
from adept_ds.base.records import Record

MARK_NAME = ".adept_output.json"


Command = Literal[
    "expand", "export", "delta apply", "delta pack", "delta strip", "to_universal.py", "make_synthetic_model.py"
]
"""What writes directories, as the user calls it: a command of adept's, or a script in tools/."""


_ANOTHER = "give the name of a new directory"


class OutputMark(Record):
    """Stands in every directory that a command wrote, and tells its files from what came later."""

    format: Literal[1] = 1
    command: Command
    files: dict[str, tuple[int, int]]
    """Path in the directory -> size in bytes, and time of modification in nanoseconds."""
    sha256: dict[InnerName, Digest] = Field(default_factory=dict)
    """Of the same files; older outputs have none."""

    @model_validator(mode="after")
    def _of_the_same_files(self) -> OutputMark:
        if self.sha256 and self.sha256.keys() != self.files.keys():
            raise ValueError("sizes and digests are of different files")
        return self

    @classmethod
    def remedy(cls) -> str:
        return _ANOTHER


def check_output(out: Path, command: Command, inputs: Mapping[str, Path], *, overwrite: bool = False) -> list[str]:
    """Make sure, before anything heavy, that `command` can write `out` and takes nothing away with it.

    Args:
        inputs: what it reads, by the names that the user knows.
        overwrite: an earlier output of the same command may be replaced.

    Returns:
        The files that would be replaced.

    Raises:
        InputError: `out` is no place for a new directory, overlaps with an input, or holds something else.
    """
    _check_names(inputs)
    with _refusing(out):
        _check_place(out)
        check_apart(out, inputs)
        if not is_filled(out):
            return []
        _check_ours(out, command)
        if not overwrite:
            raise InputError(f"'{out}' was written by `{_called(command)}` before; add --overwrite, or {_ANOTHER}")
        return sorted(_files_in(out))


def check_new_file(out: Path, key: str = "OUT") -> None:
    """Raises `InputError` unless a file can be written there that replaces nothing."""
    with _refusing(out, key):
        if os.path.lexists(out):
            raise InputError(f"'{out}' exists; give the name of a new file")
        _check_can_be_written(out)


def is_untouched(directory: Path, command: Command) -> bool:
    """Whether it holds what `command` wrote, just so, and nothing else."""
    try:
        _check_ours(directory, command)
    except InputError:
        return False
    return True


def check_as_written(directory: Path, digest_of: DigestOf = sha256_of, remedy: str = "") -> None:
    """Every file that a command wrote there has the bytes that it had; where nothing says which, it may be as it is.

    Args:
        digest_of: by default a file is read.

    Raises:
        DamagedError: naming the first that has not, and `remedy`.
    """
    if not (directory / MARK_NAME).is_file():
        return
    try:
        mark = OutputMark.load(directory / MARK_NAME)
        for name, digest in mark.sha256.items():
            check_file(directory, name, FileProof(size=mark.files[name][0], sha256=digest), digest_of)
    except DamagedError as error:
        raise DamagedError(error.reason, remedy) from None


@contextmanager
def new_output(out: Path, command: Command, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a directory that appears, marked as an output of `command`, only when the block ends without error.

    Raises:
        InputError: `out` holds something, at the start or at the end, that must not be replaced.
    """
    with new_directory(out, partial(_check_ours, command=command) if overwrite else None) as folder:
        yield folder
        sync_tree(folder)  # first: network file systems settle times only then
        stamps = {name: _stamp(folder / name) for name in _files_in(folder)}
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(stamps, pool.map(sha256_of, map(folder.joinpath, stamps)), strict=True))
        OutputMark(command=command, files=stamps, sha256=digests).save(folder / MARK_NAME)


def _check_names(inputs: Mapping[str, Path]) -> None:
    """Raises `InputError`, naming it, for an input whose name the system does not take."""
    for name, path in inputs.items():
        try:
            path.exists()
        except OSError as error:
            raise InputError(f"{name}: '{_shortened(path)}' cannot be read ({error.strerror}); give another") from None


def _check_place(out: Path) -> None:
    if out.name in ("", ".."):
        raise InputError(f"'{out}' is no name; {_ANOTHER}")
    if out.is_symlink():
        raise InputError(f"'{out}' is a link; {_ANOTHER}")
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file; {_ANOTHER}")
    if os.path.ismount(out):
        raise InputError(f"'{out}' is a mount point, which cannot be replaced; give a new directory inside it")
    for name, path in {"the directory that you are in": Path.cwd(), "your home directory": Path.home()}.items():
        if lies_in(path, out):
            raise InputError(f"'{out}' is or holds {name}; {_ANOTHER}")
    _check_can_be_written(out)


def _check_can_be_written(out: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        lock_of(temporary_name(out)).lstat()  # the longest name that will be used, perhaps too long
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"'{out}' cannot be written; choose another directory than '{parent}'")


@contextmanager
def _refusing(out: Path, key: str = "OUT") -> Iterator[None]:
    """Refusals name the key; what the system says becomes one."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{key}: '{_shortened(out)}' cannot be written ({reason}); give another name") from None


def check_apart(out: Path, inputs: Mapping[str, Path]) -> None:
    """Raises `InputError` if `out` is an input, lies in one or holds one."""
    for name, path in inputs.items():
        inside, around = lies_in(out, path), lies_in(path, out)
        if inside or around:
            where = "is" if inside and around else "lies in" if inside else "holds"
            raise InputError(f"'{out}' {where} {name} ('{path}'), which is read; {_ANOTHER}")


def lies_in(inner: Path, outer: Path) -> bool:
    """Also if equal. The disk is asked, not the spelling: links, `..` and the case of letters may differ."""
    place = inner.resolve()
    return outer.exists() and any(step.exists() and step.samefile(outer) for step in (place, *place.parents))


def _check_ours(directory: Path, command: Command) -> None:
    """Raises `InputError`, naming it, if there is something that `command` did not write just so."""
    names = sorted(_files_in(directory))
    if MARK_NAME not in names:
        example = f" ('{names[0]}')" if names else ""
        raise InputError(f"'{directory}' holds something that adept did not write{example}; {_ANOTHER}")
    mark = OutputMark.load(directory / MARK_NAME)
    if mark.command != command:
        raise InputError(
            f"'{directory}' was written by `{_called(mark.command)}`, not by `{_called(command)}`; {_ANOTHER}"
        )
    names.remove(MARK_NAME)
    for name in names:
        if name not in mark.files:
            raise InputError(f"'{directory}' holds '{name}', which adept did not write; move it away, or {_ANOTHER}")
        if mark.files[name] != _stamp(directory / name):
            raise InputError(f"'{directory / name}' was changed after adept wrote it; move it away, or {_ANOTHER}")


def _files_in(directory: Path) -> Iterator[str]:
    """Paths of all that is no directory, links to directories included."""

    def complain(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=complain):
        for path in map(Path(folder).joinpath, (*names, *folders)):
            if path.is_symlink() or not path.is_dir():
                yield path.relative_to(directory).as_posix()


def _called(command: Command) -> str:
    return f"python tools/{command}" if command.endswith(".py") else f"adept {command}"


def _stamp(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_size, status.st_mtime_ns


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) < 100 else f"{text[:80]}..."
