"""Where a run may write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.config.run_directory import check_run_dir


def _check(workspace: Workspace, run_dir: Path, **sections: Any) -> None:
    config = parse_config(workspace.tree(run_dir, **sections))
    check_run_dir(config, workspace.model)


PLACES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "a file": (lambda model, cwd: model / "config.json", "is a file"),
    "below a file": (lambda model, cwd: model / "config.json" / "a" / "b", "is a file; give"),
    "the root": (lambda model, cwd: Path("/"), "is or holds the directory that you are in"),
    "where the user is": (lambda model, cwd: Path(), "is or holds the directory that you are in"),
    "above where the user is": (lambda model, cwd: Path(".."), "is or holds the directory that you are in"),
    "the home": (lambda model, cwd: Path.home(), "is or holds your home directory"),
    "the model": (lambda model, cwd: model, "is model"),
    "inside the model": (lambda model, cwd: model / "runs" / "first", "lies in model"),
    "above the model": (lambda model, cwd: model.parent, "holds model"),
    "a circle of links": (lambda model, cwd: cwd / "circle" / "run", "cannot be written"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user works in cwd; both it and the home lie in a directory of the test's."""
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    (tmp_path / "cwd" / "circle").symlink_to(tmp_path / "cwd" / "circle")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


@pytest.mark.parametrize("place", PLACES)
def test_a_run_directory_that_is_somebody_elses_place_is_refused(place: str, workspace: Workspace, home: Path) -> None:
    where, words = PLACES[place]
    with pytest.raises(InputError, match=r"^run_dir: ") as refusal:
        _check(workspace, where(workspace.model, Path.cwd()))
    assert words in str(refusal.value)
    assert "give" in str(refusal.value)


CORPORA = ("data.domain", "data.replay", "data.general_eval", "data.domain_eval", "probe.corpus")


@pytest.mark.parametrize("key", [*CORPORA, "probe.stability.corpus", "anchor.corpus", "eval.tasks"])
@pytest.mark.parametrize("inside", ["", "runs/first"])
def test_a_run_in_a_directory_of_texts_is_refused_for_every_corpus(
    key: str, inside: str, workspace: Workspace, home: Path
) -> None:
    texts = home / "texts"
    texts.mkdir()
    section, *rest = key.split(".")
    entry: list[Any] = [str(texts)] if section == "eval" else [{"files": [str(texts)]}]
    values: dict[str, Any] = {"stability": {"corpus": entry}} if "stability" in rest else {rest[0]: entry}
    values |= {"kind": "kl"} if section == "anchor" else {}
    with pytest.raises(InputError, match=rf"^run_dir: '.*' lies in '.*texts', which {key} reads; give"):
        _check(workspace, texts / inside, **{section: values})
    _check(workspace, home / "texts_too", **{section: values})


@pytest.mark.parametrize(
    ("pattern", "run_dir"),
    [
        ("texts/**/*.jsonl", "texts/run"),
        ("texts/**/*.jsonl", "texts"),
        ("texts/*", "texts/runs/first"),
        ("texts/r*/second/*.jsonl", "texts/run"),
        ("texts/**/r?n/*.jsonl", "texts/deep/run/first"),
        ("**/*.jsonl", "run"),
        ("../cwd/texts/[rs]*", "texts/run"),
    ],
)
def test_a_run_whose_files_a_pattern_may_match_is_refused(
    pattern: str, run_dir: str, workspace: Workspace, home: Path
) -> None:
    """When it goes on it would read, among the texts, what it wrote itself."""
    Path("texts").mkdir()
    with pytest.raises(
        InputError, match=r"^run_dir: .* which data\.domain reads; give a directory of its own"
    ) as caught:
        _check(workspace, Path(run_dir), data={"domain": [pattern]})
    assert f"'{pattern}'" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "run_dir"),
    [
        ("*.jsonl", "runs/first"),
        ("texts/*.jsonl", "texts/run"),
        ("texts/**/*.jsonl", "texts_too/run"),
        ("texts/*/part-*", "texts/runs/first"),
        ("nowhere/**/*.jsonl", "run"),
        ("texts/[ab]/**", "texts/run"),
    ],
)
def test_a_run_may_be_beside_what_a_pattern_matches(
    pattern: str, run_dir: str, workspace: Workspace, home: Path
) -> None:
    Path("texts").mkdir()
    _check(workspace, Path(run_dir), data={"domain": [pattern]})


def test_a_run_may_be_new_or_go_on_wherever_it_is(workspace: Workspace, home: Path) -> None:
    for run_dir in (home / "runs" / "math", Path("run"), Path("../cwd/run")):
        _check(workspace, run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        _check(workspace, run_dir)
    Path("stages.json").write_text("{}")
    _check(workspace, Path())  # a run's directory, and the user has gone there to look at it


def test_links_are_followed(workspace: Workspace, home: Path) -> None:
    link = home / "link"
    link.symlink_to(workspace.model)
    with pytest.raises(InputError, match=r"^run_dir: .*lies in model"):
        _check(workspace, link / "run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "cache", "logs", "stages.json", "lock", "export"])
def test_what_stands_in_the_way_of_a_run_is_refused_before_it_begins(workspace: Workspace, name: str) -> None:
    """A directory where a file belongs, or the other way round."""
    run_dir = workspace.root / "taken" / name.partition(".")[0]
    run_dir.mkdir(parents=True)
    is_file = "." in name or name == "lock"
    if is_file:
        (run_dir / name).mkdir()
    else:
        (run_dir / name).write_text("theirs")
    what = "a directory, where a file" if is_file else "a file, where a directory"
    with pytest.raises(InputError, match=rf"^run_dir: '{run_dir / name}' is {what} of the run belongs; move it away"):
        _check(workspace, run_dir)
