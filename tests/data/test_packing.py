"""From documents to blocks: packed once, and again only where an input has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.models import save_byte_tokenizer
from harness.packing import TEXTS, pack, stream, tokens_of, write_texts
from harness.workspace import write_corpus

from adept_ds.base.errors import InputError
from adept_ds.data import packing


def test_packing_keeps_every_token_in_order_with_separators(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    first, second = write_texts(tmp_path / "1.jsonl", *TEXTS[:3]), write_texts(tmp_path / "2.jsonl", *TEXTS[3:])
    expected = stream(TEXTS, ids)
    assert len(expected) == 42
    whole = tokens_of(pack([first, second], tokenizer_dir, tmp_path / "cache", keep_tail=True))
    assert [len(block) for block in whole] == [8, 8, 8, 8, 8, 2]
    assert [token for block in whole for token in block] == expected
    cut = tokens_of(pack([first, second], tokenizer_dir, tmp_path / "cache"))
    assert cut == whole[:5], "training drops the tail and nothing else"


def test_packing_does_not_depend_on_how_documents_are_read(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=5, documents=17)
    whole = tokens_of(pack([corpus], tokenizer_dir, tmp_path / "a", keep_tail=True))
    monkeypatch.setattr(packing, "_DOCUMENTS_PER_CALL", 3)
    assert tokens_of(pack([corpus], tokenizer_dir, tmp_path / "b", keep_tail=True)) == whole


def test_a_tail_of_one_token_predicts_nothing_and_is_left_out(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", "12345678")  # nine tokens with the separator
    assert [len(block) for block in tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True))] == [8]


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The corpus files that are really read."""
    runs: list[str] = []
    real = packing.read_documents

    def counting(key: str, path: Path, *rest: Any) -> Iterator[str]:
        runs.append(path.name)
        return real(key, path, *rest)

    monkeypatch.setattr(packing, "read_documents", counting)
    return runs


def test_packed_blocks_are_reused(tmp_path: Path, tokenizer_dir: Path, files_read: list[str]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    first = tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache"))
    assert "c.jsonl" in files_read
    files_read.clear()
    assert tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache")) == first
    assert files_read == []


def test_a_changed_corpus_is_packed_again(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    first = tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache"))
    changed = corpus.read_text().replace("matrix", "xirtam").replace("the", "eht")
    stamp = corpus.stat().st_mtime_ns
    corpus.write_text(changed)
    os.utime(corpus, ns=(stamp, stamp + 1_000_000))  # the same size, a millisecond later
    second = tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache"))
    assert first != second


@pytest.mark.parametrize("change", ["seq_len", "keep_tail", "files", "tokenizer"])
def test_what_determines_the_blocks_determines_the_cache(
    tmp_path: Path, tokenizer_dir: Path, files_read: list[str], change: str
) -> None:
    corpus, other = (write_corpus(tmp_path / f"{seed}.jsonl", seed=seed, documents=5) for seed in (1, 2))
    options: dict[str, Any] = {"seq_len": 8, "keep_tail": False}
    pack([corpus], tokenizer_dir, tmp_path / "cache", **options)
    files_read.clear()
    files, directory = [corpus], tokenizer_dir
    if change == "seq_len":
        options["seq_len"] = 9
    elif change == "keep_tail":
        options["keep_tail"] = True
    elif change == "files":
        files = [corpus, other]
    else:
        directory = tmp_path / "tokenizer"
        save_byte_tokenizer(directory)
    pack(files, directory, tmp_path / "cache", **options)
    assert set(files_read) == {file.name for file in files}


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), InputError("line 3 is not JSON")])
def test_an_interrupted_build_leaves_nothing_and_the_next_one_is_whole(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", seed=1, documents=5)
    expected = tokens_of(pack([corpus], tokenizer_dir, tmp_path / "elsewhere"))
    real = packing._pack

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[dict[str, list[int]]]:
        for number, block in enumerate(real(*args, **kwargs)):
            if number == 3:
                raise error
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_pack", interrupted)
        with pytest.raises(BaseException) as caught:
            pack([corpus], tokenizer_dir, tmp_path / "cache")
    if isinstance(error, InputError):
        assert caught.value is error, "the user sees the line about the input, not the library's wrapping"
    assert list((tmp_path / "cache").iterdir()) == []
    assert tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache")) == expected


@pytest.mark.parametrize("content", ['{"text": "abc"}\n', "\n\n"], ids=["short", "blank lines"])
def test_a_corpus_without_one_whole_block_is_refused(tmp_path: Path, tokenizer_dir: Path, content: str) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(content)
    with pytest.raises(InputError, match=r"data\.domain: .*c\.jsonl.* less than one block of 8 tokens; add text"):
        pack([corpus], tokenizer_dir, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
