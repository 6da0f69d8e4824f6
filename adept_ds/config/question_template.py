"""Benchmark-style questions as text, by a template of the user's.

A record has `question`, `choices` (a list) and `answer`, a position in it or a letter. This module imports neither
torch nor DeepSpeed: `config` refuses a template with mistakes before anything heavy starts.

The program's own template is rendered here, any other in a process with limits (`template_process`): one that explodes
is refused with the configuration, or is a mistake in the record that made it.
"""

from __future__ import annotations

import functools
import os
import reprlib
from collections.abc import Mapping
from typing import Any

from jinja2 import Template

from adept_ds.config.template_process import ENVIRONMENT, TemplateProcess

VARIABLES = ("question", "choices", "letters", "answer", "answer_letter")
"""What a template may use: the question, its choices, a letter for each, the right choice's text and its letter."""


DEFAULT_TEMPLATE = (
    "Question: {{ question }}\n"
    "{% for choice in choices %}{{ letters[loop.index0] }}. {{ choice }}\n{% endfor %}"
    "Answer: {{ answer_letter }}. {{ answer }}"
)

_MOST_CHOICES = 26

_SAMPLE = {"question": "What is 2 + 2?", "choices": ["3", "4", "5", "22"], "answer": 1}


def check_template(template: str) -> str:
    """`template` itself.

    Raises:
        ValueError: it does not parse, names an unknown variable, or none at all, or exceeds a limit on a plain
            question; the message says what to do.
    """
    if template == DEFAULT_TEMPLATE:
        return template
    shown = repr(template if len(template) <= 200 else template[:197] + "...")
    process = _process_of(template, os.getpid())
    if process.refusal is not None:
        raise ValueError(f"{shown} {process.refusal}")
    rendered = process.render(question_variables(_SAMPLE))
    if rendered.exceeds:
        raise ValueError(f"{shown} cannot be rendered: {rendered.reason}; simplify it")
    return template


def render_question(record: Mapping[str, Any], template: str) -> str:
    """The record as text.

    Raises:
        ValueError: the record is no question with choices of which one is right, or the template fails on it.
    """
    values = question_variables(record)
    if template == DEFAULT_TEMPLATE:
        return _default().render(values)
    rendered = _process_of(template, os.getpid()).render(values)
    if rendered.text is None:
        raise ValueError(f"data.question_template fails on it: {rendered.reason}")
    return rendered.text


@functools.cache
def _default() -> Template:
    return ENVIRONMENT.from_string(DEFAULT_TEMPLATE)


@functools.lru_cache(maxsize=4)
def _process_of(template: str, owner: int) -> TemplateProcess:
    """Not shared with processes that are forked from the owner, or they would read each other's answers."""
    return TemplateProcess(template, VARIABLES)


def question_variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a template may use of a record, by name (see `VARIABLES`). Raises `ValueError`: it is no question."""
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list):
        raise ValueError("'choices' is not a list; give the list of answers")
    if len(choices) > _MOST_CHOICES:
        raise ValueError(f"{len(choices)} choices are more than there are letters; give at most {_MOST_CHOICES}")
    letters = [chr(ord("A") + position) for position in range(len(choices))]
    if isinstance(answer, str) and answer in letters:
        answer = letters.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer {reprlib.repr(record['answer'])} is none of the {len(choices)} choices")
    return {
        "question": record["question"],
        "choices": choices,
        "letters": letters,
        "answer": choices[answer],
        "answer_letter": letters[answer],
    }
