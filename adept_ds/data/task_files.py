"""Directories of tasks: files of questions, which the program scores itself, and tasks of lm-eval. Imports no torch.

    *.jsonl           a question with choices and answer on each line (see `questions`); the task has the file's name
    *.yaml, *.yml     descriptions as lm-eval takes them; the task has the name that stands there as `task:`

Beside descriptions, a *.jsonl that begins with something else than a question is taken for data of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import CorpusFiles
from adept_ds.config.data_section import DataSection
from adept_ds.config.eval_section import EvalSection
from adept_ds.data.documents import TextSource, read_questions
from adept_ds.data.questions import Question
from adept_ds.data.record_text import MAX_LINE_BYTES, QUESTION_KEYS, parse_line

_KEY = "eval.tasks"
_TASK = re.compile(r"^task:\s*['\"]?([^\s'\"#\[]+)", re.MULTILINE)
_GROUP = re.compile(r"^group:", re.MULTILINE)


@dataclass(frozen=True)
class TaskFiles:
    """What is to be scored."""

    questions: dict[str, Path]
    """Files of questions, by name."""
    harness: dict[str, str]
    """Names of tasks of lm-eval, each with the key of the configuration that asks for it: those that are described
    here, then its own."""
    directories: tuple[Path, ...]
    """Where lm-eval shall look for descriptions."""

    @classmethod
    def find(cls, section: EvalSection) -> TaskFiles:
        """All tasks of a configuration.

        Raises:
            InputError: a directory is not there or has no task, two tasks have one name, or lm-eval is needed but not
                installed.
        """
        questions, described = dict[str, Path](), list[str]()
        for directory in section.tasks:
            if not directory.is_dir():
                raise InputError(f"{_KEY}: '{directory}' is no directory; give one with *.jsonl or *.yaml files")
            names = _described(directory)
            files = [path for path in sorted(directory.glob("*.jsonl")) if not names or _holds_questions(path)]
            if not names and not files:
                raise InputError(f"{_KEY}: '{directory}' has no task; put questions there (*.jsonl), or one of lm-eval")
            for name in [*names, *(path.name for path in files)]:
                if name in questions or name in described:
                    raise InputError(f"{_KEY}: two tasks are named '{name}'; rename the one in '{directory}'")
                described += [name] if name in names else []
            questions |= {path.name: path for path in files}
        harness = dict.fromkeys(section.lm_eval, "eval.lm_eval") | dict.fromkeys(described, _KEY)
        if harness and find_spec("lm_eval") is None:
            name, key = next(iter(harness.items()))
            raise InputError(
                f"{key}: '{name}' is a task of lm-eval, which is not installed; pip install 'adept-ds[eval]', or leave "
                "it out"
            )
        return cls(questions, harness, tuple(section.tasks))


def task_questions(path: Path, data: DataSection) -> list[Question]:
    """Raises `InputError`: a line of the file is no question, or there is none."""
    found = []
    for number, (_, question) in enumerate(read_questions(_source(path, data)), start=1):
        if question is None:
            raise InputError(
                f"{_KEY}: '{path}' record {number} is no question that can be asked; give question, choices of which "
                "none is empty, and answer, and no text"
            )
        found.append(question)
    if not found:
        raise InputError(f"{_KEY}: '{path}' has no question; add some, or leave it out")
    return found


def check_tasks(section: EvalSection, data: DataSection) -> None:
    """All tasks are there, and files of questions begin with one. Raises `InputError`."""
    for path in TaskFiles.find(section).questions.values():
        _, question = next(read_questions(_source(path, data)), (0, None))
        if question is None:
            raise InputError(f"{_KEY}: '{path}' does not begin with a question; give question, choices and answer")


def _holds_questions(path: Path) -> bool:
    """Going by the first line."""
    with path.open("rb") as file:
        try:
            return set(QUESTION_KEYS) <= parse_line(file.readline(MAX_LINE_BYTES)).keys()
        except ValueError:
            return False


def _described(directory: Path) -> Sequence[str]:
    """Names of the tasks of lm-eval in a directory; templates and groups have none."""
    files = sorted([*directory.glob("*.yaml"), *directory.glob("*.yml")])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return [found[1] for text in texts if (found := _TASK.search(text)) and not _GROUP.search(text)]


def _source(path: Path, data: DataSection) -> TextSource:
    strict = data.model_copy(update={"max_bad_records": 0})
    return TextSource.of(_KEY, CorpusFiles(files=[path], format="jsonl"), strict)
