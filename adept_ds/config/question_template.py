"""Benchmark-style questions as text, by a template of the user's.

A record has `question`, `choices` (a list) and `answer`, a position in it or a letter. This module imports neither
torch nor DeepSpeed: `config` refuses a template with mistakes before anything heavy starts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

VARIABLES = ("question", "choices", "letters", "answer", "answer_letter")
"""What a template may use: the question, its choices, a letter for each, the right choice's text and its letter."""


DEFAULT_TEMPLATE = (
    "Question: {{ question }}\n"
    "{% for choice in choices %}{{ letters[loop.index0] }}. {{ choice }}\n{% endfor %}"
    "Answer: {{ answer_letter }}. {{ answer }}"
)


# A template comes with a configuration, which may be somebody else's: it can read its variables and nothing else.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def check_template(template: str) -> str:
    """`template` itself.

    Raises:
        ValueError: it does not parse, or names an unknown variable, or none at all; the message says what to do.
    """
    try:
        _compiled(template)
        used = meta.find_undeclared_variables(_ENVIRONMENT.parse(template))
    except TemplateSyntaxError as error:
        where = f"line {error.lineno}: {error.message}"
        raise ValueError(f"{template!r} does not parse as a Jinja template ({where}); correct it") from None
    unknown = sorted(used - set(VARIABLES) - _ENVIRONMENT.globals.keys())
    if unknown:
        raise ValueError(f"{template!r} names '{unknown[0]}'; variables are {', '.join(VARIABLES)}")
    if not used & set(VARIABLES):
        raise ValueError(f"{template!r} would render every question the same; write for example {{{{ question }}}}")
    return template


def render_question(record: Mapping[str, Any], template: str) -> str:
    """The record as text.

    Raises:
        ValueError: the record is no question with choices of which one is right, or the template fails on it.
    """
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list):
        raise ValueError("'choices' is not a list; give the list of answers")
    letters = [chr(ord("A") + position) for position in range(len(choices))]
    if isinstance(answer, str) and answer in letters:
        answer = letters.index(answer)
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer {record['answer']!r} is none of the {len(choices)} choices")
    values = {
        "question": record["question"],
        "choices": choices,
        "letters": letters,
        "answer": choices[answer],
        "answer_letter": letters[answer],
    }
    try:
        return _compiled(template).render(values)
    except Exception as error:  # whatever an expression of the user's can raise
        raise ValueError(f"data.question_template fails on it: {error}") from None


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)
