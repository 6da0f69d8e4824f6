"""Packages of registries: fetched once, by their own clients, whole or not at all, and read without installing them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from demo.study import packages
from demo.study.packages import Package, check_clients, fetch, member, members

from adept_ds.base.errors import InputError

TEXTS = {"data/b.txt": b"second", "data/a.txt": b"first", "data/note.md": b"neither"}

NPM = Package("npm", "@scope/texts", "1.2.3")


def wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in TEXTS.items():
            archive.writestr(name, content)
    return path


def tar_bytes(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in TEXTS.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def tarball(path: Path) -> Path:
    path.write_bytes(tar_bytes("w:gz"))
    return path


def debian(path: Path) -> Path:
    """As `dpkg-deb` lays it out: three files, each behind 60 bytes about it and at an even position."""
    data = tar_bytes("w:xz")
    content = b"!<arch>\n"
    for name, part in {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part
        content += b"\n" * (len(part) % 2)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("make, name", [(wheel, "p.whl"), (tarball, "p.tgz"), (debian, "p.deb")])
def test_files_in_a_package_are_read_in_the_order_of_their_names(tmp_path: Path, make, name: str) -> None:  # type: ignore[no-untyped-def]
    archive = make(tmp_path / name)
    assert members(archive, "data/*.txt") == [("data/a.txt", b"first"), ("data/b.txt", b"second")]
    assert member(archive, "*/note.md") == b"neither"
    with pytest.raises(InputError, match=r"no file '\*\.json'"):
        members(archive, "*.json")


def fake_client(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `npm` that runs `script` is the only program on the PATH, beside what scripts consist of."""
    client = folder / "npm"
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def test_a_package_is_downloaded_once(tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    fake_client(bin_folder, f'echo "$@" >> {calls}; echo content > texts.tgz', monkeypatch)
    archive = fetch(NPM, tmp_path / "packages")
    assert archive.read_text() == "content\n"
    assert fetch(NPM, tmp_path / "packages") == archive
    assert calls.read_text().splitlines() == ["pack --loglevel=error @scope/texts@1.2.3"]


@pytest.mark.parametrize("script", ["echo half > texts.tgz; echo 'no network' >&2; exit 1", "echo 'no network' >&2"])
def test_a_failed_download_is_told_in_the_clients_words_and_leaves_nothing(
    tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_client(bin_folder, script, monkeypatch)
    with pytest.raises(InputError, match=r"npm: could not download '@scope/texts 1\.2\.3' \(no network\)"):
        fetch(NPM, tmp_path / "packages")
    assert not [path for path in (tmp_path / "packages").rglob("*") if path.is_file()]
    with pytest.raises(InputError):  # and is tried again
        fetch(NPM, tmp_path / "packages")


@pytest.mark.parametrize("registry", ["pip", "npm", "apt-get"])
def test_a_missing_client_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    package = Package(registry, "texts", "1.0")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"{registry}: not installed, and 'texts' comes .* install {registry}, or"):
        check_clients([package], tmp_path)
    (tmp_path / "texts" / "1.0").mkdir(parents=True)  # fetched before: no client is needed
    check_clients([package], tmp_path)
