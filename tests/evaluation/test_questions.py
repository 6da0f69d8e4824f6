"""Which choices a model holds for the likeliest: as plain PyTorch finds it, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.launching import adept
from harness.marks import slow
from harness.models import save_byte_tokenizer, save_tiny_model
from harness.packing import text_source, tokenised, write_records
from harness.plain_evaluation import chosen
from harness.questions import made_up_questions

from adept_ds.evaluation.questions import questions_among

QUESTIONS = made_up_questions(40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("questions") / "model", "qwen2", num_hidden_layers=3)


@pytest.fixture(scope="module")
def answers(model: Path) -> list[tuple[int, int]]:
    """Of plain PyTorch: by likelihood, and by likelihood per character."""
    found = chosen(model, model, QUESTIONS)
    assert len(set(found)) > 3 and any(likely != by_length for likely, by_length in found)
    return found


def shares(answers: list[tuple[int, int]], first: int, last: int) -> dict[str, Any]:
    """What must be found of some of the questions."""
    right, count = [question["answer"] for question in QUESTIONS[first:last]], last - first
    result: dict[str, Any] = {"questions": count}
    for number, name in enumerate(("accuracy", "accuracy_norm")):
        share = sum(of[number] == answer for of, answer in zip(answers[first:last], right, strict=True)) / count
        result[name] = pytest.approx(share, abs=1e-12)
        result[f"{name}_stderr"] = pytest.approx((share * (1 - share) / (count - 1)) ** 0.5, rel=1e-12)
    return result


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_questions_in_held_out_text_and_in_tasks_are_answered_by_likelihood(
    model: Path, answers: list[tuple[int, int]], tmp_path: Path, ranks: int
) -> None:
    """On two ranks under ZeRO-3. A text between the questions is none, and an answer may be a letter."""
    letter = QUESTIONS[0] | {"answer": "ABCDE"[QUESTIONS[0]["answer"]]}
    text = write_records(tmp_path / "held_out.jsonl", letter, {"text": "no question"}, *QUESTIONS[1:])
    parts = {"part0.jsonl": (0, 25), "part1.jsonl": (25, 40)}
    for name, (first, last) in parts.items():
        write_records(tmp_path / "tasks" / name, *QUESTIONS[first:last])
    result = adept(ranks, "eval", model, "--text", text, "--tasks", tmp_path / "tasks", "--seq-len", "64", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    source = found["model"]["text"]["sources"]["held_out"]
    assert (source["documents"], source["tokens"] > 1000) == (41, True)
    assert source == source | shares(answers, 0, 40)
    assert found["tasks"]["model"] == {name: shares(answers, *part) for name, part in parts.items()}


def test_questions_that_are_not_evaluated_as_text_are_not_asked(
    model: Path, answers: list[tuple[int, int]], tmp_path: Path
) -> None:
    """The budget of tokens counts for both: 128 sequences of 8 tokens."""
    text = write_records(tmp_path / "held_out.jsonl", *QUESTIONS)
    result = adept(1, "eval", model, "--text", text, "--seq-len", "8", "--json")
    assert result.returncode == 0, result.stderr
    source = json.loads(result.stdout)["model"]["text"]["sources"]["held_out"]
    count = source["documents"]
    assert 2 < count < 40
    assert source == source | shares(answers, 0, count)


@pytest.mark.parametrize("order", [("wiki.txt", "exams.jsonl"), ("exams.jsonl", "wiki.txt")])
def test_questions_are_found_before_and_behind_a_file_of_plain_text(tmp_path: Path, order: tuple[str, str]) -> None:
    """In one source. The text is longer than the pieces in which it is read (256 Ki characters)."""
    (tmp_path / "wiki.txt").write_text("of zero\n" * 40_000)
    write_records(tmp_path / "exams.jsonl", *QUESTIONS[:2], {"text": "no question"}, *QUESTIONS[2:5])
    files = [tmp_path / name for name in order]
    save_byte_tokenizer(tmp_path / "tokenizer")
    documents = tokenised(files, tmp_path / "tokenizer", tmp_path / "cache").ids
    assert len(documents) == 7
    found = questions_among(text_source(files), documents)
    assert [question.question for question in found] == [question["question"] for question in QUESTIONS[:5]]
