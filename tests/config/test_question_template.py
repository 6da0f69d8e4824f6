"""Questions as text: what a template sees, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.models import save_byte_tokenizer

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.config.question_template import DEFAULT_TEMPLATE
from adept_ds.data.documents import read_documents
from adept_ds.data.packing import Packing, build_blocks

BASE = {"model": "m", "run_dir": "r"}
QUESTION = {"question": "2 + 2?", "choices": ["3", 4.5, "4"], "answer": "C"}


def read_question(tmp_path: Path, template: str = DEFAULT_TEMPLATE) -> str:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")
    (text,) = read_documents("probe.corpus", path, None, template)
    return text


def test_a_template_sees_question_choices_letters_and_the_right_answer(tmp_path: Path) -> None:
    assert read_question(tmp_path) == "Question: 2 + 2?\nA. 3\nB. 4.5\nC. 4\nAnswer: C. 4"
    template = "{{ question }}|{{ choices[1] + 1 }}|{{ letters | join(',') }}|{{ answer }}|{{ answer_letter }}\n"
    assert read_question(tmp_path, template) == "2 + 2?|5.5|A,B,C|4|C\n"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ question", "does not parse"),
        ("{{ question | shuot }}", "shuot"),
        ("{{ questoin }}", "'questoin'; variables are question, choices"),
        ("{question}", "every question the same"),
    ],
)
def test_a_template_with_a_mistake_is_refused_with_the_configuration(template: str, word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(BASE | {"data": {"question_template": template}})
    assert str(caught.value).startswith("config: data.question_template: ")
    assert word in str(caught.value)


@pytest.mark.parametrize("template", ["{{ choices[7] }}", "{{ question.__class__ }}", "{{ choices.append(1) }}"])
def test_a_template_that_fails_on_a_record_names_its_line_and_reaches_nothing_else(
    tmp_path: Path, template: str
) -> None:
    parse_config(BASE | {"data": {"question_template": template}})
    with pytest.raises(InputError, match=r"^probe\.corpus: .*q\.jsonl' line 1: data\.question_template fails on it"):
        read_question(tmp_path, template)


def test_another_template_packs_the_corpus_again(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")

    def tokens(**options: str) -> int:
        cache = tmp_path / "cache"
        packing = Packing("probe.corpus", (path,), tmp_path / "tokenizer", 6, keep_tail=True, **options)
        blocks = build_blocks(packing, cache)
        return sum(len(row["input_ids"]) for row in blocks.dataset)

    assert tokens() == len("Question: 2 + 2?\nA. 3\nB. 4.5\nC. 4\nAnswer: C. 4") + 1
    assert tokens(question_template="{{ question }} {{ answer }}") == len("2 + 2? 4") + 1
