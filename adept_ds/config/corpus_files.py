"""Which files a corpus consists of: files, directories of them, patterns.

Looked up by name, size and kind alone, in a fixed order; what is in them is the business of `data/formats.py`. Imports
neither torch nor DeepSpeed.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.paths import expanded

DATASET_STATE = "state.json"
"""In the directory of a dataset that `Dataset.save_to_disk` wrote, beside `dataset_info.json`."""

DATASET_SPLITS = "dataset_dict.json"
"""The same for a `DatasetDict`, one directory per split beside it."""

_NOT_TEXTS = {"_SUCCESS", "_metadata", "_common_metadata"}
"""What Spark and others leave among the files that they write."""


def find_files(key: str, entries: Sequence[Path]) -> tuple[Path, ...]:
    """What the entries of `key` stand for, in their order; what a directory or a pattern stands for, sorted by name.

    Of directories, all files at any depth, without hidden ones and those of `_NOT_TEXTS`. The directory of an on-disk
    dataset (`datasets`) is one entry itself. A pattern is one only where no file has that name.

    Raises:
        InputError: an entry stands for nothing, or for something that is no file, is empty or cannot be read; or a
            file is named twice.
    """
    found: dict[tuple[int, int], Path] = {}
    for entry in entries:
        for path in _expanded_entry(key, entry):
            identity = _checked(key, path)
            if identity in found:
                raise InputError(f"{key}: '{path}' is the same file as '{found[identity]}'; name each file once")
            found[identity] = path
    return tuple(found.values())


def is_dataset(directory: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote it."""
    return (directory / DATASET_SPLITS).is_file() or (
        (directory / DATASET_STATE).is_file() and (directory / "dataset_info.json").is_file()
    )


def _expanded_entry(key: str, entry: Path) -> Iterator[Path]:
    try:
        path = Path(expanded(str(entry)))
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        found: Iterator[Path] = _files_of(key, path, ())
    else:
        found = _matching(key, path)
    first = next(found, None)
    if first is None:
        raise InputError(f"{key}: '{path}' stands for no file; give a file, a directory with files, or a pattern")
    yield first
    yield from found


def _matching(key: str, pattern: Path) -> Iterator[Path]:
    """Each file once, though '**' matches it and the directories above it; no links are followed for '**'."""
    root = Path(pattern.anchor or ".")
    try:
        matches = sorted(root.glob(str(pattern.relative_to(pattern.anchor))), key=lambda path: path.parts)
    except ValueError as error:  # such as 'part**'
        raise InputError(f"{key}: '{pattern}' is no pattern ({error}); correct it") from None
    seen, datasets = set[Path](), set[Path]()
    for match in matches:
        if _is_hidden(match, pattern) or not datasets.isdisjoint(match.parents):
            continue
        if match.is_dir() and is_dataset(match):
            datasets.add(match)
        for path in _files_of(key, match, ()):
            if path not in seen:
                seen.add(path)
                yield path


def _is_hidden(match: Path, pattern: Path) -> bool:
    """Unless the pattern says so, as in '.cache/*'."""
    hidden = (part for part in match.parts if part.startswith(".") and part != "..")
    return match.name in _NOT_TEXTS or any(part not in pattern.parts for part in hidden)


def _files_of(key: str, path: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Args: above: the directories on the way here, without links, to end where these lead in a circle."""
    if not path.is_dir() or is_dataset(path):
        yield path
        return
    real = path.resolve()
    if real in above:
        return
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{key}: '{path}' cannot be read ({error.strerror}); give a directory that can") from None
    for child in inside:
        if not child.name.startswith(".") and child.name not in _NOT_TEXTS:
            yield from _files_of(key, child, (*above, real))


def _checked(key: str, path: Path) -> tuple[int, int]:
    """What identifies a file, or the directory of a dataset."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise InputError(f"{key}: '{path}' does not exist; give a file, a directory or a pattern") from None
    except OSError as error:
        raise InputError(f"{key}: '{path}' cannot be read ({error.strerror}); give a file that can") from None
    if not stat.S_ISDIR(found.st_mode):
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{key}: '{path}' is no regular file; give the name of one")
        if found.st_size == 0:
            raise InputError(f"{key}: '{path}' is empty; leave it out, or give a file with at least one text")
    if not os.access(path, os.R_OK):
        raise InputError(f"{key}: '{path}' cannot be read (Permission denied); give a file that can")
    return found.st_dev, found.st_ino
