"""What a run writes about itself and is read again: by its own stages, at its end, and by who packs it."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator
from pydantic_core import from_json

from adept_ds.base.errors import InputError
from adept_ds.base.files import json_text
from adept_ds.base.records import Record, first_mistake


class Accuracy(Record):
    """Of a model on questions with choices."""

    questions: NonNegativeInt
    accuracy: float
    """Share of questions whose right choice is the likeliest."""
    accuracy_stderr: float | None
    """Its standard error; of a single question there is none."""
    accuracy_norm: float
    """As `accuracy`, with each log-likelihood divided by the number of characters of the choice."""
    accuracy_norm_stderr: float | None


class SourceLoss(Record):
    """Of a model on the held-out documents of a source; None is what is not known of them."""

    loss: float
    """Mean over predicted tokens, in nats."""
    tokens: NonNegativeInt
    """That are predicted."""
    documents: NonNegativeInt | None = None
    questions: NonNegativeInt | None = None
    """How many of them are questions with choices; the next ones are about these, as in `Accuracy`."""
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    accuracy_norm: float | None = None
    accuracy_norm_stderr: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def with_accuracy(self, found: Accuracy | None) -> SourceLoss:
        return self.model_copy(update=dict(found)) if found else self


class CorpusLoss(SourceLoss):
    """Of a model on a held-out corpus: over all tokens of all sources."""

    sources: dict[str, SourceLoss] = Field(default_factory=dict)
    """By name."""


class DialLoss(Record):
    """Of a model between base and adapted: weights = base + alpha (adapted - base)."""

    alpha: float
    corpora: dict[str, CorpusLoss]


class BaseEvaluation(Record):
    """What was found out of the base alone (evaluation_base.json)."""

    corpora: dict[str, CorpusLoss]

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and `adept eval CONFIG` makes it again"

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Evaluation(Record):
    """Held-out losses of both models, and of those between them, by corpus (evaluation.json)."""

    base: dict[str, CorpusLoss]
    adapted: dict[str, CorpusLoss]
    dial: list[DialLoss] = Field(default_factory=list)

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and `adept eval CONFIG` makes it again"

    def to_json(self) -> dict[str, Any]:
        """Without what is not known, or not there."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @model_validator(mode="after")
    def _of_the_same_corpora(self) -> Evaluation:
        for corpora in (self.adapted, *(position.corpora for position in self.dial)):
            if self.base.keys() != corpora.keys():
                raise ValueError("base and adapted are of different corpora")
        return self


Scores = dict[str, dict[str, float]]
"""Of a model: task -> measure -> value."""


class TaskScores(Record):
    """What models score on tasks (task_scores.json, task_scores_base.json)."""

    models: dict[str, Scores]
    """'base', 'adapted', 'alpha=0.5'."""

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and `adept eval CONFIG` makes it again"


class RunSummary(Record):
    """Training in numbers (summary.json), as far as the program reads them. Some come only at the end of training."""

    model_config = ConfigDict(extra="allow")

    trainable_parameters: NonNegativeInt | None = None
    total_parameters: NonNegativeInt | None = None
    world_size: NonNegativeInt | None = None
    writer_lr_ratio: NonNegativeFloat | None = None
    """Learning rate of the copies' silent factors over that of the rest of them; of methods with copies."""
    copy_dropout: NonNegativeFloat | None = None
    """Probability with which a step went around a copy; of methods with copies."""
    peak_memory_bytes: tuple[NonNegativeInt, ...] | None = None
    """Of each rank."""
    steps: NonNegativeInt | None = None
    tokens: NonNegativeInt | None = None
    seconds: NonNegativeFloat | None = None
    tokens_per_second: NonNegativeFloat | None = None
    preparation_seconds: NonNegativeFloat | None = None
    """What the method computed before the first step."""
    overhead_seconds: NonNegativeFloat | None = None
    """That, and refreshes."""

    @classmethod
    def remedy(cls) -> str:
        return "move it away; only this overview is lost"


class GivenUp(Record):
    """Learning rates with which training broke down (given_up.json): a checkpoint of one may go on with a lower one."""

    lr: tuple[NonNegativeFloat, ...] = ()

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and give train.lr as it was"

    @classmethod
    def of(cls, path: Path) -> GivenUp:
        """Without a file, none was."""
        return cls.load(path) if path.is_file() else cls()

    def may_lower(self, before: Any, now: float) -> bool:
        """Whether what was trained with the rate `before` may go on with `now`."""
        return before in self.lr and now < min(self.lr)


class LogLine(Record):
    """What every line of a run's logs has (metrics.jsonl, unit_importance.jsonl, unit_movement.jsonl)."""

    model_config = ConfigDict(extra="ignore")

    step: NonNegativeInt

    @classmethod
    def remedy(cls) -> str:
        return "restore it from a copy, or move this line to another file"


class GuardLine(Record):
    """Of a line of metrics.jsonl about what the guard has measured, as far as the program sums it up."""

    model_config = ConfigDict(extra="ignore")

    forgotten: bool


class MetricsLine(LogLine):
    """A line of metrics.jsonl, as far as the program sums it up: about a step, a refresh or an evaluation."""

    loss: float | None = None
    """None also where it is not finite."""
    tokens: NonNegativeInt = 0
    """That were trained on so far."""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    refresh_seconds: float | None = None
    guard: GuardLine | None = None
    skipped: str | None = None
    """Why the step was not taken (see `training.skipping`)."""
    anchor: float | None = None
    """Mean per predicted token of its anchor sequences."""
    anchor_tokens: NonNegativeInt = 0
    """Of this step."""
    anchor_seconds: float = 0.0
    """Of `seconds`."""

    @property
    def is_step(self) -> bool:
        return "loss" in self.model_fields_set

    @model_validator(mode="after")
    def _a_step_has_all_of_them(self) -> MetricsLine:
        missing = {"tokens", "seconds", "tokens_per_second", "mfu"} - self.model_fields_set
        if self.is_step and missing:
            raise ValueError(f"a step without {min(missing)}")
        return self


L = TypeVar("L", bound=LogLine)

_CHECKED = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


def log_line(record: Mapping[str, Any]) -> str:
    """A line of a log: the record, and last in it a checksum of the line without it."""
    text = json_text(record)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the names that TensorBoard and trackers know them by: 'train/loss',
    'refresh/refresh_seconds', 'eval/domain_loss', 'guard/web_rise'."""
    if "eval" in record:
        found = {f"eval/{name}_loss": result["loss"] for name, result in record["eval"].items()}
    elif "guard" in record:
        general = record["guard"]["general"].items()
        found = {f"guard/{name}_{key}": value for name, limits in general for key, value in limits.items()}
    else:
        group = "refresh" if "refresh_seconds" in record else "train"
        found = {f"{group}/{key}": value for key, value in record.items() if key != "step"}
    return {name: value for name, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_line(line: bytes) -> dict[str, Any] | None:
    """What a line of a log says, as whoever only watches takes it; None: it is not, or not yet, as it was written."""
    checked = _CHECKED.fullmatch(line)
    if checked and zlib.crc32(checked[1] + b"}") != int(checked[2], 16):
        return None
    try:
        found = from_json(line, allow_inf_nan=False)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def newest_lines(path: Path, most_bytes: int = 8 << 20) -> Iterator[dict[str, Any]]:
    """The lines at the end of a log that may be written this moment, newest first, as far as that many bytes reach;
    those that are not whole are passed over. Nothing if it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - most_bytes))
            text = file.read(most_bytes)
    except OSError:
        return
    lines = text.split(b"\n")
    for line in reversed(lines[1:] if start else lines):
        if (found := whole_line(line)) is not None:
            yield found


def read_log(path: Path, kind: type[L], say: Callable[[str], None] = lambda line: None) -> Iterator[tuple[bytes, L]]:
    """The lines of a log, if it is there: each as it stands there, and what it says.

    Args:
        say: is told when the last one is left out, since a crash cut it short.

    Raises:
        InputError: another line is damaged, or changed since it was written; the message names it.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        checked = _CHECKED.fullmatch(line)
        if checked and zlib.crc32(checked[1] + b"}") != int(checked[2], 16):
            raise InputError(f"'{path}' line {number} is damaged (not as it was written); {kind.remedy()}")
        try:
            yield line, kind.model_validate_json(line)
        except ValidationError as error:
            if number == len(lines) and error.errors()[0]["type"] == "json_invalid":
                say(f"'{path}' ends in half a line: left out")
                return
            raise InputError(f"'{path}' line {number} is damaged ({first_mistake(error)}); {kind.remedy()}") from None
