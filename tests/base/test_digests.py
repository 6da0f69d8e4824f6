"""A file is known by its bytes: read once while it looks untouched, and again as soon as it does not."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adept_ds.base.digests import FileDigests, tree_files
from adept_ds.base.errors import InputError


def settle(path: Path) -> Path:
    """As if it had not been touched for a minute, its change time (which no program can set) excepted."""
    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    return path


@pytest.fixture(autouse=True)
def _change_times_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute later, so that tests need not wait."""
    now = time.time_ns
    monkeypatch.setattr("adept_ds.base.digests.time.time_ns", lambda: now() + 60 * 10**9)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"some text\n" * 1000)
    return settle(path)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def bytes_read(cache: Path, path: Path) -> int:
    """How much a new process reads of a file until it knows its digest, which has to be right."""
    read: list[int] = []
    assert FileDigests(cache).file(path, read.append) == sha256(path.read_bytes())
    return sum(read)


def test_the_digest_is_that_of_the_bytes_and_they_are_read_once(cache: Path, corpus: Path) -> None:
    assert [bytes_read(cache, corpus) for _ in range(3)] == [10_000, 0, 0]


def test_a_copy_elsewhere_at_another_time_has_the_same_digest(cache: Path, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(corpus.read_bytes())
    digests = FileDigests(cache)
    assert digests.file(copy) == digests.file(corpus)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"some", b"SOME"))


def rewrite_and_restore_its_time(path: Path) -> None:
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_with_one_of_the_same_size_and_time(path: Path) -> None:
    before = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "change", [rewrite, rewrite_and_restore_its_time, replace_with_one_of_the_same_size_and_time, append]
)
def test_a_file_that_was_touched_is_read_again(cache: Path, corpus: Path, change: Callable[[Path], None]) -> None:
    bytes_read(cache, corpus)
    change(corpus)
    assert bytes_read(cache, corpus) == corpus.stat().st_size


def test_another_path_to_the_same_file_is_not_read_again(cache: Path, corpus: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(corpus)
    assert [bytes_read(cache, path) for path in (corpus, link)] == [10_000, 0]


def test_what_was_written_a_moment_ago_is_not_remembered(
    cache: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rewrite(corpus)
    assert [bytes_read(cache, corpus) for _ in range(2)] == [10_000, 10_000]


def test_what_changes_while_it_is_read_is_not_remembered(cache: Path, corpus: Path) -> None:
    FileDigests(cache).file(corpus, lambda _: append(corpus) if corpus.stat().st_size < 10_100 else None)
    assert bytes_read(cache, corpus) == corpus.stat().st_size


@pytest.mark.parametrize("content", ["", "{}", "[" * 10_000, '{"format": 1, "entries": [{"what": "sha256"}]}', "\xff"])
def test_a_damaged_cache_is_made_anew(cache: Path, corpus: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content, encoding="latin-1")
    assert [bytes_read(cache, corpus) for _ in range(2)] == [10_000, 0]
    json.loads(cache.read_text())


def test_a_digest_that_was_changed_in_the_cache_is_not_believed(cache: Path, corpus: Path) -> None:
    """One digit of it: still a digest by its form, and the corpus would be another one."""
    assert bytes_read(cache, corpus) == 10_000
    digest, text = sha256(corpus.read_bytes()), cache.read_text()
    assert digest in text
    cache.write_text(text.replace(digest, ("0" if digest[0] != "0" else "1") + digest[1:]))
    assert [bytes_read(cache, corpus) for _ in range(2)] == [10_000, 0]


def test_without_a_place_for_the_cache_files_are_read_each_time(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "cache").write_text("no directory")
    assert [bytes_read(tmp_path / "cache" / "digests.json", corpus) for _ in range(2)] == [10_000, 10_000]


def test_many_files_are_told_in_order_with_progress_by_bytes(cache: Path, tmp_path: Path, corpus: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * 30_000)
    bytes_read(cache, corpus)
    shares: list[tuple[float, str]] = []
    found = FileDigests(cache).files([other, corpus, other], lambda share, text: shares.append((share, text)))
    assert found == [sha256(path.read_bytes()) for path in (other, corpus, other)]
    known = [share for share in shares if share[1] == "corpus.txt"]
    assert shares[0] == (pytest.approx(3 / 7), "other")
    assert known == [(pytest.approx(4 / 7), "corpus.txt")]
    assert shares[-1] == (1.0, "other")


def make_tree(root: Path) -> Path:
    """As an on-disk data set has it."""
    for name in ("dataset_dict.json", "train/state.json", "train/data-00000-of-00001.arrow"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content of {name}")
    return root


def test_a_moved_tree_is_the_same_and_what_libraries_leave_in_it_does_not_count(cache: Path, tmp_path: Path) -> None:
    one, other = make_tree(tmp_path / "one"), make_tree(tmp_path / "deep" / "other")
    (other / "train" / "cache-0123.arrow").write_text("of a map")
    (other / ".lock").touch()
    (other / ".huggingface").mkdir()
    (other / ".huggingface" / "meta").write_text("x")
    assert FileDigests(cache).tree(one) == FileDigests(cache).tree(other)
    assert [file.name for file in tree_files(other)] == [
        "dataset_dict.json",
        "data-00000-of-00001.arrow",
        "state.json",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train" / "state.json").write_text("other"),
        lambda root: (root / "train").rename(root / "test"),
        lambda root: (root / "train" / "state.json").unlink(),
        lambda root: (root / "more").write_text(""),
    ],
    ids=["content", "name", "fewer", "more"],
)
def test_a_tree_is_its_names_and_contents(cache: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    root = make_tree(tmp_path / "tree")
    before = FileDigests(cache).tree(root)
    change(root)
    assert FileDigests(cache).tree(root) != before


def test_other_things_are_remembered_by_the_same_files(cache: Path, corpus: Path) -> None:
    computed: list[str] = []

    def compute(what: str) -> str:
        computed.append(what)
        return what * 64

    for _ in range(2):
        assert FileDigests(cache).remembered("a", [corpus], lambda: compute("a")) == "a" * 64
        assert FileDigests(cache).remembered("b", [corpus], lambda: compute("b")) == "b" * 64
    assert computed == ["a", "b"]
    rewrite(corpus)
    FileDigests(cache).remembered("a", [corpus], lambda: compute("a"))
    assert computed == ["a", "b", "a"]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [fifo, circle, Path.mkdir, lambda path: None], ids=["pipe", "circle", "dir", "none"])
def test_what_is_no_file_is_refused_in_one_line(cache: Path, tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "odd"
    make(path)
    with pytest.raises(InputError, match=r"^'.*odd' (cannot be read \(|is no regular file)[^\n]*$"):
        FileDigests(cache).file(path)


def test_a_name_that_is_no_text_is_a_name(cache: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    path.write_bytes(b"x")
    settle(path)
    assert [bytes_read(cache, path) for _ in range(2)] == [1, 0]
