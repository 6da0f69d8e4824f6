"""Which files a corpus consists of: the same ones in the same order everywhere, or one clear line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from harness.launching import ROOT

from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import corpus_sources
from adept_ds.config.corpus_files import find_files
from adept_ds.config.loading import parse_config

TREE = ["b/2.jsonl", "b/10.jsonl", "a.jsonl", "c.txt", "b/deep/x"]
LEFT_OUT = [".hidden", "b/_SUCCESS", ".git/config", "b/.part.crc", "_metadata"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory of files, dataset included."""
    root = tmp_path / "corpus"
    for name in [*TREE, *LEFT_OUT]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    return root


def dataset_at(path: Path) -> Path:
    """What tells the directory of an on-disk dataset from others."""
    path.mkdir(parents=True)
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (path / name).write_text("{}")
    return path


def found(root: Path, *entries: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files("data.domain", [root / name for name in entries])]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["c.txt", "a.jsonl"], ["c.txt", "a.jsonl"]),
        (["."], ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/deep/x", "c.txt"]),
        (["b", "a.jsonl"], ["b/10.jsonl", "b/2.jsonl", "b/deep/x", "a.jsonl"]),
        (["*.jsonl"], ["a.jsonl"]),
        (["**/*.jsonl"], ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]),
        (["b/[0-9].jsonl", "?.txt"], ["b/2.jsonl", "c.txt"]),
        (["**"], ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/deep/x", "c.txt"]),
        (["*"], ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/deep/x", "c.txt"]),
        ([".hidden"], [".hidden"]),
        ([".git/*"], [".git/config"]),
    ],
    ids=[
        "as named",
        "directory",
        "both",
        "pattern",
        "any depth",
        "characters",
        "all",
        "directories too",
        "hidden",
        "in",
    ],
)
def test_an_entry_stands_for_its_files_in_a_fixed_order(corpus: Path, entries: list[str], expected: list[str]) -> None:
    assert found(corpus, *entries) == expected


def test_names_are_relative_to_the_working_directory_and_the_home(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus)
    monkeypatch.setenv("HOME", str(corpus))
    assert find_files("k", [Path("b/*.jsonl")]) == (Path("b/10.jsonl"), Path("b/2.jsonl"))
    assert find_files("k", [Path("~/b/*.jsonl")]) == (corpus / "b/10.jsonl", corpus / "b/2.jsonl")


@pytest.mark.parametrize("entry", ["wiki", ".", "*", "**", "wiki*"])
def test_the_directory_of_a_dataset_is_one_entry(tmp_path: Path, entry: str) -> None:
    dataset = dataset_at(tmp_path / "wiki")
    assert find_files("k", [tmp_path / entry]) == (dataset,)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    for name in ("[a].txt", "a.txt"):
        (tmp_path / name).write_text("text")
    assert found(tmp_path, "[a].txt") == ["[a].txt"]


def test_links_are_followed_but_not_in_circles(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b" / "up").symlink_to(corpus)
    (tmp_path / "link").symlink_to(corpus / "b")
    assert found(tmp_path, "link/*.jsonl") == ["link/10.jsonl", "link/2.jsonl"]
    assert found(tmp_path, "link/deep", "corpus/**/2.jsonl") == ["link/deep/x", "corpus/b/2.jsonl"]


def test_what_is_no_text_file_is_refused_in_one_line(corpus: Path) -> None:
    (corpus / "empty.txt").touch()
    (corpus / "nothing").mkdir()
    (corpus / "broken").symlink_to(corpus / "gone")
    (corpus / "circle").symlink_to(corpus / "circle")
    os.mkfifo(corpus / "pipe")
    (corpus / "same").symlink_to(corpus / "a.jsonl")
    refused = {
        "missing.txt": "'.*missing.txt' does not exist; give",
        "empty.txt": "'.*empty.txt' is empty; leave it out",
        "nothing": "'.*nothing' stands for no file; give",
        "b/*.txt": r"'.*b/\*\.txt' stands for no file; give",
        "part**": r"'.*part\*\*'",
        "broken": "'.*broken' does not exist",
        "circle": "'.*circle' cannot be read",
        "pipe": "'.*pipe' is no regular file",
        "a.jsonl/inside": "'.*inside' cannot be read",
        "no\tname": "correct the path",
    }
    for entry, words in refused.items():
        with pytest.raises(InputError, match=f"^data.domain: .*{words}") as refusal:
            find_files("data.domain", [corpus / "c.txt", corpus / entry])
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="'/dev/zero' is no regular file"):
        find_files("data.domain", [Path("/dev/zero")])


@pytest.mark.parametrize("second", ["a.jsonl", "same", "../corpus/a.jsonl", "*.jsonl", "."])
def test_a_file_is_named_once(corpus: Path, second: str) -> None:
    """By whatever name, for its text would count twice."""
    if second == "same":
        (corpus / "same").symlink_to(corpus / "a.jsonl")
    with pytest.raises(InputError, match=re.escape(f"'{corpus / 'a.jsonl'}'; name each file once")):
        find_files("data.domain", [corpus / "a.jsonl", corpus / second])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_file_is_refused(corpus: Path) -> None:
    (corpus / "a.jsonl").chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        find_files("data.domain", [corpus / "a.jsonl"])


def test_the_documented_forms_of_a_corpus_are_all_taken() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])
    config = parse_config({"model": "m", "run_dir": "r"} | section)
    plain, code, forum = corpus_sources(config.data.domain)
    assert len(plain.files) == 4
    assert (code.format, code.name, code.weight) == ("text", "code", 0.5)
    assert (forum.title, forum.text_key, forum.weight) == ("forum", "body", 2)
