"""Nothing that is not an earlier output of the same command, whole and untouched, is ever replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.outputs import MARK_NAME, Command, check_output, new_output


def write(out: Path, text: str = "1", command: Command = "expand", *, overwrite: bool = False) -> None:
    """An output of two files, one of them in a directory of its own."""
    with new_output(out, command, overwrite=overwrite) as folder:
        (folder / "model.safetensors").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "config.json").write_text(text)


def files(root: Path) -> dict[str, bytes | str]:
    """All that lies there: contents of files, targets of links."""
    return {
        path.relative_to(root).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refuse(
    out: Path, *words: str, inputs: dict[str, Path] | None = None, overwrite: bool = True, root: Path | None = None
) -> None:
    """In one line that has all words and that names OUT; everything below `root` stays as it is."""
    before = files(root or out.parent)
    with pytest.raises(InputError) as refusal:
        check_output(out, "expand", inputs or {}, overwrite=overwrite)
    message = str(refusal.value)
    assert message.startswith("OUT: ") and "\n" not in message
    for word in words:
        assert word in message, message
    assert files(root or out.parent) == before


# --- earlier outputs -----------------------------------------------------------------------------------------------


def test_an_earlier_output_is_replaced_when_that_is_asked_for_and_only_then(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert check_output(out, "expand", {}) == []
    write(out, "old")
    refuse(out, f"'{out}' was written by `adept expand` before; add --overwrite, or give", overwrite=False)
    with pytest.raises(InputError, match="not empty"):
        write(out, "new")
    assert check_output(out, "expand", {}, overwrite=True) == [MARK_NAME, "deep/config.json", "model.safetensors"]
    write(out, "new", overwrite=True)
    write(out, "newer", overwrite=True)
    assert (out / "deep" / "config.json").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [out]


def test_a_moved_output_is_still_one_and_one_that_lost_files_too(tmp_path: Path) -> None:
    write(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "after" / "model.safetensors").unlink()
    write(tmp_path / "after", "new", overwrite=True)


def replace_by_one_of_the_same_size(out: Path) -> None:
    """As further training would."""
    path = out / "model.safetensors"
    times = path.stat()
    path.write_text("2")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


FOREIGN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a file": (lambda out: (out / "notes.txt").write_text("x"), ["'notes.txt', which adept did not write", "move it"]),
    "a file below": (lambda out: (out / "deep" / "notes").write_text("x"), ["'deep/notes', which adept did not write"]),
    "a link": (lambda out: (out / "a").symlink_to("model.safetensors"), ["'a', which adept did not write"]),
    "a link to a directory": (lambda out: (out / "a").symlink_to("deep"), ["'a', which adept did not write"]),
    "a link to nothing": (lambda out: (out / "a").symlink_to("b"), ["'a', which adept did not write"]),
    "a hidden file": (lambda out: (out / ".git").write_text("x"), ["'.git', which adept did not write"]),
    "other weights": (replace_by_one_of_the_same_size, ["model.safetensors' was changed after adept wrote it"]),
    "an edited file": (lambda out: (out / "deep" / "config.json").write_text("{}"), ["deep/config.json' was changed"]),
    "no mark": (lambda out: (out / MARK_NAME).unlink(), ["adept did not write ('deep/config.json')"]),
    "an empty mark": (lambda out: (out / MARK_NAME).write_text(""), [MARK_NAME, "damaged", "a new directory"]),
    "a mark of nothing": (lambda out: write_json(out / MARK_NAME, {}), [MARK_NAME, "damaged", "a new directory"]),
    "a mark of other types": (
        lambda out: write_json(out / MARK_NAME, {"command": "expand", "files": {"model.safetensors": "1"}}),
        [MARK_NAME, "damaged", "a new directory"],
    ),
    "a copied mark": (
        lambda out: (out / "deep").rename(out / "other"),
        ["'other/config.json', which adept did not write"],
    ),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_what_is_not_proven_ours_is_never_replaced(tmp_path: Path, change: str) -> None:
    spoil, words = FOREIGN[change]
    write(tmp_path / "out")
    spoil(tmp_path / "out")
    refuse(tmp_path / "out", *words)
    before = files(tmp_path)
    with pytest.raises(InputError):
        write(tmp_path / "out", "new", overwrite=True)
    assert files(tmp_path) == before


def test_the_output_of_another_command_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", command="delta pack")
    refuse(tmp_path / "out", "was written by `adept delta pack`, not by `adept expand`; give the name of a new")


def test_notes_in_a_directory_of_the_users_survive(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "notes.txt").write_text("x")
    for overwrite in (False, True):
        refuse(thesis, "'notes.txt'", "did not write", "give the name of a new directory", overwrite=overwrite)


def test_a_file_that_comes_while_the_new_output_is_written_survives(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(InputError, match=r"'notes\.txt', which adept did not write"),
        new_output(tmp_path / "out", "expand", overwrite=True),
    ):
        (tmp_path / "out" / "notes.txt").write_text("x")
    assert (tmp_path / "out" / "notes.txt").read_text() == "x"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


# --- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("models/base", "is MODEL"),
        ("models/base/.", "is MODEL"),
        ("models/../models/base", "is MODEL"),
        ("linked/base", "is MODEL"),
        ("models/base/out", "lies in MODEL"),
        ("models/base/not/there/yet", "lies in MODEL"),
        ("linked/base/out", "lies in MODEL"),
        ("models/nowhere/../base/out", "lies in MODEL"),
        ("models", "holds MODEL"),
        ("linked/../models", "holds MODEL"),
    ],
)
@pytest.mark.parametrize("through_link", [False, True])
def test_an_output_that_overlaps_with_an_input_is_refused(
    tmp_path: Path, out: str, words: str, through_link: bool
) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (tmp_path / "linked").symlink_to("models")
    model = tmp_path / "linked" / "base" if through_link else base
    refuse(tmp_path / out, words, f"('{model}'), which is read", inputs={"MODEL": model}, root=tmp_path)


def test_even_an_earlier_output_is_not_replaced_where_it_is_an_input(tmp_path: Path) -> None:
    write(tmp_path / "out")
    refuse(tmp_path / "out", "is --base", inputs={"--base": tmp_path / "out"})


def test_neighbours_with_similar_names_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model2", "mod", "model.out", "elsewhere/model"):
        assert check_output(tmp_path / name, "expand", {"MODEL": tmp_path / "model"}) == []


# --- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [".", "..", "/", "a/.."])
def test_a_place_without_a_name_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    refuse(Path(out), f"'{Path(out)}' is no name; give the name of a new directory", root=tmp_path)


def test_where_the_user_is_and_lives_nothing_is_replaced_even_if_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home/user", "work/here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "user"))
    for name, words in {"home": "your home", "home/user": "your home", "work": "in", "work/here": "in"}.items():
        refuse(tmp_path / name, "is or holds", f"{words} directory" if words != "in" else "that you are in")


def kinds_of_places(root: Path) -> None:
    (root / "file").write_text("x")
    (root / "directory").mkdir()
    (root / "link").symlink_to("directory")
    (root / "dangling").symlink_to("nothing")
    (root / "circle").symlink_to("circle")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "is a file; give the name of a new directory"),
        ("link", "is a link; give the name of a new directory"),
        ("dangling", "is a link; give the name of a new directory"),
        ("circle", "is a link; give the name of a new directory"),
        ("file/out", "cannot be written; choose another directory than"),
        ("file/deeper/out", "cannot be written; choose another directory than"),
        ("circle/out", "cannot be written"),
        ("a" * 230, "cannot be written (File name too long)"),
        ("a" * 5000, "cannot be written (File name too long)"),
        ("a/" * 2500 + "a", "cannot be written (File name too long)"),
    ],
    ids=lambda value: value[:30],
)
def test_a_place_that_can_be_no_directory_is_refused(tmp_path: Path, out: str, words: str) -> None:
    kinds_of_places(tmp_path)
    refuse(tmp_path / out, words, root=tmp_path)


def test_a_name_as_long_as_it_may_be_is_written(tmp_path: Path) -> None:
    write(tmp_path / ("a" * 216))


def test_a_directory_above_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # the tests may run as root
    refuse(tmp_path / "not" / "yet", f"cannot be written; choose another directory than '{tmp_path}'", root=tmp_path)


def test_a_mount_point_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    refuse(tmp_path / "out", "is a mount point", "a new directory inside it")


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert check_output(tmp_path / "out", "expand", {}) == []
    write(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000], ids=["component", "path"])
def test_an_input_that_no_file_can_be_called_is_blamed_itself(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^MODEL: '.*' cannot be read \(File name too long\)"):
        check_output(tmp_path / "out", "expand", {"MODEL": Path(name)})
