"""What lies in a directory of tasks, and what is said where it is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness.packing import write_records

from adept_ds.base.errors import InputError
from adept_ds.config.data_section import DataSection
from adept_ds.config.eval_section import EvalSection
from adept_ds.data import task_files
from adept_ds.data.task_files import TaskFiles, check_tasks

QUESTION = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def found_in(*directories: Path, lm_eval: tuple[str, ...] = ()) -> TaskFiles:
    return TaskFiles.find(EvalSection(tasks=list(directories), lm_eval=list(lm_eval)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_records(tmp_path / "tasks" / "sums.jsonl", QUESTION)
    return tmp_path / "tasks"


def describe(path: Path, text: str) -> None:
    path.write_text(text)


def test_files_of_questions_are_tasks_by_the_names_of_the_files(folder: Path) -> None:
    assert found_in(folder) == TaskFiles({"sums.jsonl": folder / "sums.jsonl"}, {}, (folder,))


@pytest.mark.parametrize("name", ["sums", "'sums'", '"sums"', "sums  # a comment"])
def test_tasks_of_lm_eval_have_the_name_that_their_description_says(folder: Path, name: str) -> None:
    """Even if it names functions, which only lm-eval reads. Groups and templates are none."""
    describe(folder / "a.yaml", f"dataset_path: json\ntask: {name}\ndoc_to_text: !function utils.text\n")
    describe(folder / "b.yml", "task: other\n")
    describe(folder / "group.yaml", "group: both\ntask:\n  - sums\n  - other\n")
    describe(folder / "named_group.yaml", "group: one\ntask: sums\n")
    describe(folder / "template.yaml", "dataset_path: json\n")
    found = found_in(folder, lm_eval=("mmlu", "other"))
    assert found.harness == {"mmlu": "eval.lm_eval", "other": "eval.tasks", "sums": "eval.tasks"}
    assert found.questions.keys() == {"sums.jsonl"}


def test_beside_descriptions_other_lines_are_their_data(folder: Path) -> None:
    describe(folder / "a.yaml", "task: sums\n")
    write_records(folder / "data.jsonl", {"a": 1})
    (folder / "other.jsonl").write_text("no JSON")
    assert found_in(folder).questions.keys() == {"sums.jsonl"}


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda folder: (folder / "sums.jsonl").rename(folder.parent / "s"), "has no task"),
    "text": (
        lambda folder: write_records(folder / "t.jsonl", {"text": "a"}),
        "t.jsonl' does not begin with a question",
    ),
    "damaged": (lambda folder: (folder / "t.jsonl").write_text("{"), "t.jsonl' line 1: not JSON"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_is_no_task_is_refused_beforehand(folder: Path, kind: str) -> None:
    change, words = MISTAKES[kind]
    change(folder)
    with pytest.raises(InputError, match=r"^eval\.tasks: ") as caught:
        check_tasks(EvalSection(tasks=[folder]), DataSection())
    assert words in str(caught.value)


def test_a_directory_that_is_not_there_is_named(folder: Path) -> None:
    for path in (folder / "other", folder / "sums.jsonl"):
        with pytest.raises(InputError, match=rf"^eval\.tasks: '{path}' is no directory; give one"):
            found_in(path)


def test_two_tasks_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "more" / "sums.jsonl", QUESTION)
    with pytest.raises(InputError, match=r"^eval\.tasks: two tasks are named 'sums\.jsonl'; rename the one in "):
        found_in(folder, tmp_path / "more")


def test_without_lm_eval_its_tasks_are_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "find_spec", lambda name: None)
    found_in(folder)  # needs none
    with pytest.raises(InputError, match=r"^eval\.lm_eval: 'mmlu' is a task of lm-eval, which is not installed; pip"):
        found_in(folder, lm_eval=("mmlu",))
    describe(folder / "a.yaml", "task: sums\n")
    with pytest.raises(InputError, match=r"^eval\.tasks: 'sums' is a task of lm-eval, which is not installed; pip"):
        found_in(folder)
