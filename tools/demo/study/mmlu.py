"""General competence: the MMLU development questions with worked answers, from the package `lm-eval`."""

from __future__ import annotations

from pathlib import Path

from demo.prepare import MMLU_PROMPTS, Record, mmlu_records
from demo.study.packages import member
from demo.study.texts import distinct_texts


def development_questions(archive: Path) -> list[Record]:
    """Five questions of each of 57 subjects, as texts."""
    return distinct_texts(mmlu_records(member(archive, f"lm_eval/{MMLU_PROMPTS.as_posix()}")))
