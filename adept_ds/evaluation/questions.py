"""Shares of questions that a model answers rightly: the choice that it holds for the likeliest is its answer.

    accuracy         by the log-likelihood of the choice's tokens behind the question
    accuracy_norm    by the same, divided by the number of characters of the choice

as `acc` and `acc_norm` of lm-eval (docs/evaluation.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_records import Accuracy
from adept_ds.data.choice_rows import ChoiceRows
from adept_ds.data.documents import TextSource, read_questions
from adept_ds.data.questions import Question
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.unfinished import Work

K = TypeVar("K")

_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are counted together."""

    questions: Sequence[Question]
    """At least one."""
    rows: ChoiceRows
    """Of all choices of all questions, in order."""

    @classmethod
    def of(cls, questions: Sequence[Question], tokenizer: TextTokenizer, model: ModelDirectory) -> QuestionSet:
        """Raises `InputError`: as `ChoiceRows.of`."""
        return cls(questions, ChoiceRows.of(questions, tokenizer, longest_text(model)))


def longest_text(model: ModelDirectory) -> int:
    """Tokens of it, as far as config.json says."""
    key, default = model.family.learned_positions or ("max_position_embeddings", _DEFAULT_LENGTH)
    return int(model.config.get(key) or default)


def questions_among(source: TextSource, ids: np.ndarray) -> list[Question]:
    """The questions among the first documents of a source, whose `ids` these are.

    Raises:
        InputError: as `read_questions`.
    """
    found, number = list[Question](), 0
    for known_by, question in read_questions(source):
        if number == len(ids):
            break
        if known_by == ids[number]:  # or the document was left out, for a special token that it spells
            number += 1
            if question is not None:
                found.append(question)
    return found


def accuracies(
    evaluator: Evaluator,
    sets: Mapping[K, QuestionSet],
    progress: ProgressCallback | None = None,
    work: Work | None = None,
) -> dict[K, Accuracy]:
    """Of each set; the same on every rank.

    Args:
        work: where losses of choices are kept, pass by pass.
    """
    if not sets:
        return {}
    rows = ChoiceRows.joined([found.rows for found in sets.values()])
    ends = np.cumsum([len(found.rows.tokens) for found in sets.values()])
    likelihoods = np.split(-evaluator.losses(rows, progress, work=work), ends[:-1])
    return {name: _accuracy(found.questions, of) for (name, found), of in zip(sets.items(), likelihoods, strict=True)}


def _accuracy(questions: Sequence[Question], likelihoods: np.ndarray) -> Accuracy:
    """`likelihoods`: of all choices of all questions, in order."""
    values, right, right_by_length = iter(likelihoods.tolist()), 0, 0
    for question in questions:
        of_choices = np.array(list(itertools.islice(values, len(question.choices))))
        lengths = np.array([len(choice) for choice in question.choices])
        right += int(of_choices.argmax()) == question.answer  # of several, the first
        right_by_length += int((of_choices / lengths).argmax()) == question.answer
    count = len(questions)
    share, share_by_length = right / count, right_by_length / count
    return Accuracy(
        questions=count,
        accuracy=share,
        accuracy_stderr=_standard_error(share, count),
        accuracy_norm=share_by_length,
        accuracy_norm_stderr=_standard_error(share_by_length, count),
    )


def _standard_error(share: float, count: int) -> float | None:
    """Of a mean of zeros and ones, by their sample variance."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
