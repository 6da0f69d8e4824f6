"""From texts to tokens: made once, and again only where an input has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.models import save_byte_tokenizer
from harness.packing import END, TEXTS, stream, text_source, tokenisation, tokenised, write_texts
from harness.workspace import write_corpus

from adept_ds.base.errors import InputError, StopRequestedError
from adept_ds.data import pieces, tokenising, tokens
from adept_ds.data.pieces import Piece
from adept_ds.data.tokenising import TokenisedPiece
from adept_ds.data.tokens import tokens_of
from adept_ds.ranks.collectives import Ranks


def documents_of(file: tokens.TokenFile) -> list[list[int]]:
    return [part.tolist() for part in np.split(file.tokens, file.ends[:-1])]


def test_documents_follow_one_another_each_with_its_separator(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    first, second = write_texts(tmp_path / "1.jsonl", *TEXTS[:3]), write_texts(tmp_path / "2.jsonl", *TEXTS[3:])
    found = tokenised([first, second], tokenizer_dir, tmp_path / "cache")
    assert documents_of(found) == [stream([text], ids) for text in TEXTS]


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_do_not_depend_on_batches_or_processes(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=5, documents=117)
    whole = documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "a"))
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", 300)
    settings = tokenisation(tokenizer_dir, tmp_path / "b", workers=workers)
    assert documents_of(tokens_of(text_source([corpus]), settings, Ranks())) == whole


def piece(text: str, start: int = 0, stop: int | None = None, begins: bool = True, ends: bool = True) -> Piece:
    return Piece(text, start, len(text) if stop is None else stop, begins, ends, "'c.txt' line 1")


def test_of_a_part_of_a_document_only_its_own_tokens_count(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    parts = [
        piece("one two", 0, 4, ends=False),
        piece("one two three", 4, 8, False, False),
        piece("two three", 4, 9, False),
    ]
    found = list(tokenising.tokenise(parts, tokenisation(tokenizer_dir, tmp_path).tokenizer))
    assert [token for part in found for token in part.tokens] == stream(["one two three"], ids)
    assert [(part.begins, part.ends) for part in found] == [(True, False), (False, False), (False, True)]


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The corpus files that are really read."""
    runs: list[str] = []
    real = tokens.read_pieces

    def counting(source: Any, *rest: Any, **options: Any) -> Iterator[Piece]:
        runs.extend(file.name for file in source.files)
        return real(source, *rest, **options)

    monkeypatch.setattr(tokens, "read_pieces", counting)
    return runs


def test_tokens_are_reused_wherever_the_corpus_lies_now(
    tmp_path: Path, tokenizer_dir: Path, files_read: list[str]
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    first = documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "cache"))
    assert files_read == ["c.jsonl"], "read once"
    files_read.clear()
    moved = shutil.copy(corpus, tmp_path / "moved.jsonl")
    os.utime(corpus)
    for file in (corpus, Path(moved)):
        assert documents_of(tokenised([file], tokenizer_dir, tmp_path / "cache")) == first
    assert files_read == []


def test_a_changed_corpus_is_read_again(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    first = documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "cache"))
    stamp = corpus.stat().st_mtime_ns
    corpus.write_text(corpus.read_text().replace("matrix", "xirtam").replace("the", "eht"))
    os.utime(corpus, ns=(stamp, stamp + 1_000_000))  # the same size, a millisecond later
    assert documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "cache")) != first


@pytest.mark.parametrize("change", ["files", "order", "text_key", "tokenizer", "special tokens"])
def test_what_determines_the_tokens_determines_the_cache(
    tmp_path: Path, tokenizer_dir: Path, files_read: list[str], change: str
) -> None:
    one, two = (write_corpus(tmp_path / f"{seed}.jsonl", seed=seed, documents=5) for seed in (1, 2))
    tokenised([one, two], tokenizer_dir, tmp_path / "cache")
    files_read.clear()
    directory, options, settings = tokenizer_dir, dict[str, Any](), dict[str, Any]()
    files = {"files": [one], "order": [two, one]}.get(change, [one, two])
    if change == "text_key":
        for file in files:
            file.write_text(file.read_text().replace('"text"', '"body"'))
        options["text_key"] = "body"
    elif change == "tokenizer":
        directory = tmp_path / "tokenizer"
        save_byte_tokenizer(directory)
        path = directory / "tokenizer_config.json"
        path.write_text(path.read_text().replace("{", '{"model_max_length": 77,', 1))
    elif change == "special tokens":
        settings["special_tokens_in_text"] = "parse"
    tokens_of(text_source(files, **options), tokenisation(directory, tmp_path / "cache", **settings), Ranks())
    assert files_read == [file.name for file in files]


@pytest.mark.parametrize("damage", ["cut short", "no manifest", "half a manifest"])
def test_damaged_tokens_are_made_again(tmp_path: Path, tokenizer_dir: Path, damage: str) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    first = tokenised([corpus], tokenizer_dir, tmp_path / "cache")
    expected, folder = documents_of(first), first.directory
    if damage == "cut short":
        os.truncate(folder / "tokens.bin", 40)
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        os.truncate(folder / "manifest.json", 20)
    assert documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "cache")) == expected


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), InputError("line 3 is not JSON")])
def test_an_interrupted_build_leaves_nothing_half_and_the_next_one_is_whole(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    expected = documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "elsewhere"))
    real = tokens.tokenise

    def interrupted(*args: Any, **options: Any) -> Iterator[TokenisedPiece]:
        for number, done in enumerate(real(*args, **options)):
            if number == 3:
                raise error
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "tokenise", interrupted)
        with pytest.raises(type(error)) as caught:
            tokenised([corpus], tokenizer_dir, tmp_path / "cache")
    assert caught.value is error
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]
    assert bool(list(tmp_path.glob("unfinished/tokens/*"))) != isinstance(error, InputError), "that is of no use"
    assert documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "cache")) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_that_were_made_before_an_end_are_not_made_again(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Wherever it came, in the middle of a long document too; records that cannot be read are counted once."""
    for module, name, value in (
        (pieces, "MAX_PIECE_CHARACTERS", 120),
        (pieces, "_PART", 100),
        (pieces, "_CONTEXT", 10),
        (tokenising, "_BATCH_CHARACTERS", 200),
        (tokens, "EVERY", 0.0),
    ):
        monkeypatch.setattr(module, name, value)
    corpus = write_corpus(tmp_path / "c.jsonl", seed=5, documents=12)
    lines = corpus.read_text().splitlines()
    lines[3:3], lines[9:9] = ["no JSON"], [json.dumps({"text": "a long text. " * 40}), '{"nothing": 1}', "[]"]
    corpus.write_text("\n".join(lines))
    seen, killed_every, real = list[TokenisedPiece](), 1000, tokens.TokenWriter.add

    def add(writer: tokens.TokenWriter, piece: TokenisedPiece) -> None:
        if len(seen) % killed_every == killed_every - 1 and seen[-1] is not killed_at[-1]:
            killed_at.append(seen[-1])
            raise KeyboardInterrupt
        seen.append(piece)
        real(writer, piece)

    def make(cache: str) -> list[Any]:
        settings = tokenisation(tokenizer_dir, tmp_path / cache / "tokens", workers=workers)
        found = tokens_of(text_source([corpus], max_bad_records=3), settings, Ranks())
        return [found.manifest, found.tokens.tolist(), found.ends.tolist(), found.ids.tolist()]

    killed_at: list[Any] = [None]
    monkeypatch.setattr(tokens.TokenWriter, "add", add)
    whole, number = make("whole"), len(seen)
    assert whole[0].skipped == 3
    seen.clear()
    killed_every, parts = (4 if workers == 1 else 8), None  # a pool of processes takes seconds to start
    while parts is None:
        with suppress(KeyboardInterrupt):
            parts = make("parts")
    assert parts == whole
    assert len(seen) == number, "no piece was made twice"
    assert len(killed_at) > 2, "None, and who was killed"
    assert not list((tmp_path / "parts" / "unfinished" / "tokens").iterdir())


def test_tokenising_that_is_asked_to_stop_keeps_what_it_has(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=5, documents=12)
    settings = tokenisation(tokenizer_dir, tmp_path / "cache" / "tokens")

    def stop(*_: Any) -> None:
        raise StopRequestedError

    with pytest.raises(StopRequestedError):
        tokens_of(text_source([corpus]), settings, Ranks(), stop)
    seen, real = list[Any](), tokens.read_pieces

    def reading(source: Any, advance: Any, start: Any, *rest: Any) -> Any:
        seen.append(start)
        return real(source, advance, start, *rest)

    monkeypatch.setattr(tokens, "read_pieces", reading)
    expected = documents_of(tokenised([corpus], tokenizer_dir, tmp_path / "elsewhere" / "tokens"))
    assert documents_of(tokens_of(text_source([corpus]), settings, Ranks())) == expected
    assert seen == [(0, 0), (0, 1)]


def test_a_document_that_cannot_be_tokenised_is_a_bad_record_and_takes_nothing_else_with_it(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    """Special tokens spelled in text, where they are errors; in the middle of a batch."""
    texts = ["good", "bad <|end|> text", "fine"]
    corpus = write_texts(tmp_path / "c.jsonl", *texts)
    strict = tokenisation(tokenizer_dir, tmp_path / "cache", special_tokens_in_text="error")
    with pytest.raises(InputError, match=r"^data\.domain: .*c\.jsonl' line 2.*<\|end\|>"):
        tokens_of(text_source([corpus]), strict, Ranks())
    found = tokens_of(text_source([corpus], max_bad_records=1), strict, Ranks())
    assert documents_of(found) == [stream([text], ids) for text in ("good", "fine")]
    assert found.manifest.skipped == 1
    assert "line 2" in found.manifest.skipped_places[0]


def test_half_a_document_that_cannot_be_tokenised_is_taken_back(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A long one comes in pieces: those before the bad one are written already."""
    bad = tokens.BadRecords(text_source([], max_bad_records=1))
    with tokens.TokenWriter(tmp_path, bad) as writer:
        for text, begins, ends, refusal in (
            ([1, 2], True, True, None),
            ([3, 4], True, False, None),
            ([], False, False, "a special token"),
            ([5], False, True, None),
            ([6, END], True, True, None),
        ):
            writer.add(TokenisedPiece(np.array(text, np.int32), begins, ends, "'c' line 1", refusal=refusal))
        writer.finish()
    assert documents_of(tokens.TokenFile.open(tmp_path)) == [[1, 2], [6, END]]
