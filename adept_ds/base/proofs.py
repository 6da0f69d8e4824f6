"""What files are to the last bit, written down by whoever wrote them, and checked by whoever reads them again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, NonNegativeInt, model_validator

from adept_ds.base.digests import Digest, json_digest, sha256_of
from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.records import Record

if TYPE_CHECKING:
    from typing import Self

DigestOf = Callable[[Path], str]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name[:100]!r} is no name of a file in this directory")
    return name


InnerName = Annotated[str, AfterValidator(_inside)]
"""Path of a file in a directory, with /: it stays in there, whatever a record says that came from anywhere."""


class FileProof(Record):
    """A file without its content."""

    size: NonNegativeInt
    """Bytes."""
    sha256: Digest

    @classmethod
    def of(cls, path: Path) -> FileProof:
        """Reads it."""
        return cls(size=path.stat().st_size, sha256=sha256_of(path))


class Sealed(Record):
    """A record that shows whether it was changed after it was written; older ones of its kind do not."""

    check: Digest | None = None
    """Of all the rest."""

    def sealed(self) -> Self:
        """As it is to be written."""
        return self.model_copy(update={"check": self._digest()})

    def _digest(self) -> str:
        return json_digest(self.model_copy(update={"check": None}).to_json())

    @model_validator(mode="after")
    def _as_it_was_written(self) -> Self:
        if self.check not in (None, self._digest()):
            raise ValueError("it was changed after it was written")
        return self


def check_file(directory: Path, name: str, proof: FileProof, digest_of: DigestOf = sha256_of) -> None:
    """The file is there, is no link to another one, and has these very bytes.

    Args:
        digest_of: by default it is read.

    Raises:
        DamagedError: it is not; the message names it, without a remedy.
    """
    path = directory / name
    check_size(directory, name, proof.size)
    try:
        digest = digest_of(path)
    except InputError as error:
        raise DamagedError(str(error)) from None
    if digest != proof.sha256:
        raise DamagedError(f"'{path}' is not as it was written (its SHA-256 is another)")


def check_size(directory: Path, name: str, size: int) -> None:
    """The same without reading it. Raises as `check_file`."""
    path = directory / name
    try:
        found = path.lstat()
        is_own = stat.S_ISREG(found.st_mode) and os.path.realpath(path) == f"{os.path.realpath(directory)}/{name}"
    except OSError as error:
        raise DamagedError(f"'{path}' cannot be read ({error.strerror})") from None
    if not is_own:
        raise DamagedError(f"'{path}' is a link, or no file")
    if found.st_size != size:
        raise DamagedError(f"'{path}' has {found.st_size} bytes of {size}")
