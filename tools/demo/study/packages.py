"""Packages of public registries, fetched by the registries' own clients and read without being installed."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from adept_ds.base.errors import InputError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
"""Bytes before each file of a Debian package: its name, times, owner, mode, size and two that end it."""


class Package(NamedTuple):
    """One version of a package, so that everybody reads the same bytes."""

    registry: Literal["pip", "npm", "apt-get"]
    """By its client."""
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def command(self) -> list[str]:
        """What downloads it, and nothing that it depends on, into the directory where the command runs."""
        match self.registry:
            case "pip":
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
                return [*pip, "--no-deps", "--only-binary=:all:", f"{self.name}=={self.version}"]
            case "npm":
                return ["npm", "pack", "--loglevel=error", f"{self.name}@{self.version}"]
            case "apt-get":
                return ["apt-get", "download", "--quiet", f"{self.name}={self.version}"]

    @property
    def has_client(self) -> bool:
        return bool(importlib.util.find_spec("pip") if self.registry == "pip" else shutil.which(self.registry))


def check_clients(packages: Iterable[Package], folder: Path) -> None:
    """Raises `InputError`, before anything is downloaded, for a package not in `folder` whose client is missing."""
    for package in packages:
        if not (_place(package, folder).is_dir() or package.has_client):
            raise InputError(
                f"{package.registry}: not installed, and '{package.name}' comes from its registry; install "
                f"{package.registry}, or use --only to name files that need no package of it"
            )


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, downloaded unless it is there.

    Raises:
        InputError: the client could not download it; the message has the client's words.
    """
    place = _place(package, folder)
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".partial.") as name:
            partial = Path(name, "package")
            partial.mkdir()
            _download(package, partial)
            partial.replace(place)
    return next(iter(place.iterdir()))


def _place(package: Package, folder: Path) -> Path:
    """The directory with nothing but its archive in it."""
    return folder / package.name.replace("/", "+") / package.version


def _download(package: Package, folder: Path) -> None:
    result = subprocess.run(package.command, cwd=folder, capture_output=True, text=True)
    if result.returncode or not any(folder.iterdir()):
        words = " ".join((result.stderr.strip() or result.stdout).split()) or "it said nothing"
        hint = "run 'apt-get update' first, or " if package.registry == "apt-get" else "try again later, or "
        raise InputError(
            f"{package.registry}: could not download '{package}' ({words}); {hint}"
            "use --only to name files that need no package of this registry"
        )


def members(archive: Path, pattern: str) -> list[tuple[str, bytes]]:
    """(path, content) of the files in a .whl, .tgz or .deb whose paths match a shell pattern, in the paths' order.

    Raises:
        InputError: there is none, so the package is not what it was.
    """
    found = sorted(_files(archive, pattern))
    if not found:
        raise InputError(f"'{archive}' has no file '{pattern}'; delete it and run again")
    return found


def member(archive: Path, pattern: str) -> bytes:
    """The content of the first file that matches."""
    return members(archive, pattern)[0][1]


def _files(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if fnmatchcase(name, pattern))
        return
    content = archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(_debian_data(content) if archive.suffix == ".deb" else content)) as files:
        for entry in files:
            if fnmatchcase(entry.name, pattern) and (file := files.extractfile(entry)) is not None:
                yield entry.name, file.read()


def _debian_data(package: bytes) -> bytes:
    """The archive of what a Debian package installs: one of the files in an `ar` archive (deb(5))."""
    start = len(_AR_MAGIC)
    while header := package[start : start + _AR_HEADER]:
        name, size = header[:16].decode().strip(), int(header[48:58])
        start += _AR_HEADER
        if name.startswith("data.tar"):
            return package[start : start + size]
        start += size + size % 2  # files begin at even positions
    raise InputError("a Debian package without data.tar; delete it and run again")
