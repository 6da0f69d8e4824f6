"""The demo's data keeps its promises: nothing held out is seen, and nothing half-written is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo import prepare

PROMPT = """The following are multiple choice questions (with answers) about arithmetic.

Q: What is 1 + 1?
(A) 1 (B) 2 (C) 3 (D) 4
A: Let's think step by step. One and one make two. The answer is (B).

Q: This question refers to the following text.

A baker sells 3 loaves. FAQ: are they fresh?

How many loaves are sold?
(A) 1 (B) 2 (C) 3 (D) 4
A: Let's think step by step. The text says three. The answer is (C).

"""


def records(count: int = 400) -> list[prepare.Record]:
    """Make distinct texts that share no n-gram."""
    return [prepare.Record(" ".join(f"w{i}x{j}" for j in range(30)), f"made_up/{i}") for i in range(count)]


def reflowed(originals: list[prepare.Record]) -> list[prepare.Record]:
    """Return copies that differ from the originals in whitespace only."""
    return [record._replace(text=record.text.replace(" ", "\n  ")) for record in originals]


def body(text: str) -> str:
    """Return a text without its heading, which would hide a copy, and with normalised whitespace."""
    return " ".join(text.split("\n\n", 1)[-1].split())


@pytest.fixture(scope="module")
def sympy_sample() -> list[prepare.Record]:
    return list(prepare.sympy_records(prepare.package_folder("sympy") / "liealgebras"))


def test_no_held_out_text_is_ever_trained_or_probed_on(tmp_path: Path, sympy_sample: list[prepare.Record]) -> None:
    seen, held_out = tmp_path / "seen.jsonl", tmp_path / "held_out.jsonl"
    prepare.prepare_corpus(seen, held_out, 0.4, lambda: [*records(), *reflowed(records()), *sympy_sample])
    texts = [[body(json.loads(line)["text"]) for line in path.open()] for path in (seen, held_out)]
    everything_seen = "\n".join(texts[0])
    assert texts[1]
    assert not [text for text in texts[1] if text in everything_seen]


def test_held_out_text_quoted_inside_a_seen_text_is_dropped() -> None:
    _, held_out = prepare.split(records(), 0.4)
    quoted = held_out[0]
    for i in range(50):  # some of these quotations land on the seen side
        quotation = prepare.Record(f"Quotation {i}: {quoted.text}", "quotation")
        if quotation in prepare.split([quotation], 0.4)[0]:
            break
    _, remaining = prepare.split([*records(), quotation], 0.4)
    assert remaining == held_out[1:]


def test_split_does_not_depend_on_order() -> None:
    forwards, backwards = prepare.split(records(), 0.2), prepare.split(reversed(records()), 0.2)
    assert [set(side) for side in forwards] == [set(side) for side in backwards]


def test_split_keeps_every_distinct_text_once_and_in_the_requested_proportion() -> None:
    seen, held_out = prepare.split([*records(), *reflowed(records())], 0.2)
    assert sorted(seen + held_out) == sorted(records())
    assert 0.15 < len(held_out) / 400 < 0.25


def test_interrupted_preparation_leaves_no_half_written_file(tmp_path: Path) -> None:
    def interrupted() -> Iterator[prepare.Record]:
        yield from records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write_jsonl(tmp_path / "corpus.jsonl", interrupted())
    with pytest.raises(KeyboardInterrupt), prepare.atomic_path(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_interrupted_rewriting_keeps_the_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    prepare.write_jsonl(path, records(3))
    before = path.read_text()
    with pytest.raises(ZeroDivisionError):
        prepare.write_jsonl(path, (r for r in records(3) if 1 / 0))
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_complete_corpus_is_not_prepared_again_but_a_lone_side_is(tmp_path: Path) -> None:
    seen, held_out = tmp_path / "seen.jsonl", tmp_path / "held_out.jsonl"
    prepare.prepare_corpus(seen, held_out, 0.4, records)
    complete = seen.read_text(), held_out.read_text()
    prepare.prepare_corpus(seen, held_out, 0.4, lambda: pytest.fail("prepared again"))
    seen.unlink()
    held_out.write_text("from another package version\n")
    prepare.prepare_corpus(seen, held_out, 0.4, records)
    assert (seen.read_text(), held_out.read_text()) == complete


def test_interruption_between_the_two_sides_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, held_out = tmp_path / "seen.jsonl", tmp_path / "held_out.jsonl"
    held_out.write_text("from another package version\n")
    write_jsonl = prepare.write_jsonl

    def write_seen_only(path: Path, side: list[prepare.Record]) -> None:
        if path == held_out:
            raise KeyboardInterrupt
        write_jsonl(path, side)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "write_jsonl", write_seen_only)
        prepare.prepare_corpus(seen, held_out, 0.4, records)
    prepare.prepare_corpus(seen, held_out, 0.4, records)
    assert "another package version" not in held_out.read_text()


def test_incomplete_model_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="not a complete model"):
        prepare.prepare_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_questions_are_separated_without_header_and_keep_their_blank_lines() -> None:
    first, second = prepare.parse_questions(PROMPT)
    assert first.startswith("Q: What is 1 + 1?") and first.endswith("The answer is (B).")
    assert second.startswith("Q: This question") and second.endswith("The answer is (C).")
    assert "fresh?\n\nHow many" in second


def test_docstrings_carry_their_qualified_name_and_are_long_and_distinct(sympy_sample: list[prepare.Record]) -> None:
    bodies = []
    for record in sympy_sample:
        heading, _, docstring = record.text.partition("\n\n")
        assert heading == f"# {record.source.removeprefix('sympy/')}"
        assert len(docstring) >= prepare.MIN_DOCSTRING_CHARACTERS
        assert not prepare.SKIPPED_FOLDERS & set(record.source.split("."))
        bodies.append(body(record.text))
    assert any(record.source == "sympy/sympy.liealgebras.root_system.RootSystem" for record in sympy_sample)
    assert len(set(bodies)) == len(bodies)
