"""From text to blocks to the order in which they are trained on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_byte_tokenizer, write_corpus

from adept_ds.base.errors import InputError
from adept_ds.config.schema import TrainSection
from adept_ds.data import packing as data
from adept_ds.data.blocks import Blocks, Row, TrainingData
from adept_ds.data.documents import read_documents
from adept_ds.data.order import FILLER, global_batch, rank_batches
from adept_ds.data.packing import build_blocks
from adept_ds.models.head_loss import IGNORED_LABEL, count_predicted

END = 256
"""What separates documents: the tokenizer's end-of-text token."""


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def byte_ids(tokenizer_dir: Path) -> dict[str, int]:
    """Token of each printable ASCII character, from the vocabulary file alone (a space is written as Ġ)."""
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    return {chr(code): vocabulary[chr(code)] for code in range(33, 127)} | {" ": vocabulary["Ġ"]}


def write_texts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def pack(files: list[Path], tokenizer_dir: Path, cache: Path, *, seq_len: int = 8, keep_tail: bool = False) -> Blocks:
    return build_blocks("data.domain", files, tokenizer_dir, seq_len, cache, keep_tail=keep_tail)


def tokens_of(blocks: Blocks) -> list[list[int]]:
    return [list(blocks.dataset[index]["input_ids"]) for index in range(len(blocks))]


def stream(texts: list[str], byte_ids: dict[str, int]) -> list[int]:
    return [token for text in texts for token in [*(byte_ids[letter] for letter in text), END]]


TEXTS = ["hello world", "a", "the norm of x is zero", "proof"]  # 12 + 2 + 22 + 6 = 42 tokens with separators


def test_packing_keeps_every_token_in_order_with_separators(
    tmp_path: Path, tokenizer_dir: Path, byte_ids: dict[str, int]
) -> None:
    first, second = write_texts(tmp_path / "1.jsonl", *TEXTS[:3]), write_texts(tmp_path / "2.jsonl", *TEXTS[3:])
    expected = stream(TEXTS, byte_ids)
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
    monkeypatch.setattr(data, "_DOCUMENTS_PER_CALL", 3)
    assert tokens_of(pack([corpus], tokenizer_dir, tmp_path / "b", keep_tail=True)) == whole


def test_a_tail_of_one_token_predicts_nothing_and_is_left_out(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", "12345678")  # nine tokens with the separator
    assert [len(block) for block in tokens_of(pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True))] == [8]


def test_padding_and_fillers_never_count(tmp_path: Path, tokenizer_dir: Path, byte_ids: dict[str, int]) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", *TEXTS)
    blocks = pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True)
    expected = stream(TEXTS, byte_ids)
    indices = [0, 5, FILLER]
    input_ids, labels = blocks.batch(indices)
    assert input_ids.shape == labels.shape == (3, 8)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert input_ids[0].tolist() == labels[0].tolist() == expected[:8]
    assert labels[1].tolist() == expected[40:] + [IGNORED_LABEL] * 6
    assert input_ids[1, :2].tolist() == expected[40:]
    assert labels[2].tolist() == [IGNORED_LABEL] * 8
    assert blocks.predicted_tokens(indices) == 7 + 1 + 0 == count_predicted(labels)


def test_the_loss_of_a_padded_block_is_that_of_its_tokens_alone(
    tmp_path: Path, tokenizer_dir: Path, byte_ids: dict[str, int]
) -> None:
    from conftest import save_tiny_model
    from transformers import AutoModelForCausalLM

    from adept_ds.models.head_loss import install_row_losses

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    text = TEXTS[2]
    alone = torch.tensor([stream([text], byte_ids)])
    expected = model(input_ids=alone, labels=alone).loss
    blocks = pack(
        [write_texts(tmp_path / "c.jsonl", text)], tokenizer_dir, tmp_path / "cache", seq_len=32, keep_tail=True
    )
    model.requires_grad_(False)
    install_row_losses(model)
    losses = model(*blocks.batch([0, FILLER]))
    # float32 sums of 21 token losses in another order
    torch.testing.assert_close(losses[0] / blocks.predicted_tokens([0]), expected, rtol=1e-5, atol=0.0)
    assert float(losses[1]) == 0.0


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "num_blocks"), [(4, 10), (5, 10), (12, 12), (7, 5), (25, 4)])
def test_every_epoch_is_a_permutation_of_all_blocks(size: int, num_blocks: int) -> None:
    steps = 3 * num_blocks  # whole epochs, wherever the batches cut them
    order = [index for step in range(steps) for index in global_batch(step, size, num_blocks, seed=3)]
    assert len(order) == steps * size
    epochs = [order[start : start + num_blocks] for start in range(0, len(order), num_blocks)]
    assert all(sorted(epoch) == list(range(num_blocks)) for epoch in epochs)


def test_epochs_and_seeds_have_different_orders_and_the_same_seed_the_same() -> None:
    first = global_batch(0, 30, 30, seed=0)
    assert first == global_batch(0, 30, 30, seed=0)
    assert first != global_batch(1, 30, 30, seed=0)
    assert first != global_batch(0, 30, 30, seed=7)
    assert first != list(range(30))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("replayed", [0, 4, 5])
def test_a_batch_is_the_same_at_every_number_of_ranks_and_replayed_sequences_come_first(
    tmp_path: Path, tokenizer_dir: Path, world_size: int, replayed: int
) -> None:
    domain = pack([write_texts(tmp_path / "d.jsonl", "x" * 200)], tokenizer_dir, tmp_path / "cache")
    general = pack([write_texts(tmp_path / "g.jsonl", "y" * 130)], tokenizer_dir, tmp_path / "cache")
    data = TrainingData(domain, general if replayed else None, replayed)
    train = TrainSection(global_batch_size=12, micro_batch_size=1, seed=1)
    for step in range(5):
        ranks = [data.micro_batches(step, train, rank, world_size) for rank in range(world_size)]
        rows = [row for batches in ranks for batch in batches for row in batch]
        assert {len(batches) for batches in ranks} == {12 // world_size}
        assert sorted(row.index for row in rows if row.replayed) == sorted(
            global_batch(step, replayed, len(general), 1)
        )
        mine = [row.index for row in rows if not row.replayed]
        assert sorted(mine) == sorted(global_batch(step, 12 - replayed, len(domain), 1))
        for batches in ranks:
            kinds = [row.replayed for batch in batches for row in batch]
            assert kinds == sorted(kinds, reverse=True)
            assert replayed % world_size or sum(kinds) == replayed // world_size


def test_a_micro_batch_of_both_texts_has_each_rows_own_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    domain, general = (
        pack([write_texts(tmp_path / "d.jsonl", "x" * 200)], tokenizer_dir, tmp_path / "cache"),
        pack([write_texts(tmp_path / "g.jsonl", "y" * 130)], tokenizer_dir, tmp_path / "cache"),
    )
    data = TrainingData(domain, general, 1)
    input_ids, labels = data.batch([Row(1, replayed=True), Row(2, replayed=False)])
    assert torch.equal(input_ids, torch.cat([general.batch([1])[0], domain.batch([2])[0]]))
    assert torch.equal(labels, input_ids)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 13])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_rank_makes_the_same_number_of_passes_and_each_block_is_seen_once(
    world_size: int, count: int, batch_size: int
) -> None:
    indices = list(range(100, 100 + count))
    ranks = [rank_batches(indices, rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    seen = [index for batches in ranks for batch in batches for index in batch if index != FILLER]
    assert sorted(seen) == indices
    # No pass more than the fullest rank needs.
    assert len(ranks[0]) == math.ceil(math.ceil(count / world_size) / batch_size)


# --- records -------------------------------------------------------------------------------------------------------

QUESTION = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
RENDERED = "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer: B. 4"


@pytest.mark.parametrize("answer", [1, "B"], ids=["index", "letter"])
def test_a_question_is_rendered_with_its_choices_and_the_right_answer(tmp_path: Path, answer: Any) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION | {"answer": answer}) + "\n")
    assert list(read_documents("probe.corpus", path)) == [RENDERED]


def test_texts_and_questions_may_be_mixed_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n" + json.dumps({"text": "ä\n"}) + "\n   \n" + json.dumps(QUESTION), encoding="utf-8")
    assert list(read_documents("probe.corpus", path)) == ["ä\n", RENDERED]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\n{two}\n", encoding="utf-8")
    assert list(read_documents("data.domain", path)) == ["one\n\n{two}\n"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('{"text": "a', id="cut short"),
        pytest.param("plain words", id="not JSON"),
        pytest.param('{"txt": "a"}', id="no text"),
        pytest.param('{"text": 5}', id="text is a number"),
        pytest.param('["a"]', id="a list"),
        pytest.param('{"question": "q", "choices": ["a", "b"]}', id="no answer"),
        pytest.param('{"question": "q", "choices": ["a", "b"], "answer": 2}', id="answer past the choices"),
        pytest.param('{"question": "q", "choices": ["a", "b"], "answer": "C"}', id="letter past the choices"),
        pytest.param('{"question": "q", "choices": ["a", "b"], "answer": null}', id="answer is null"),
        pytest.param('{"question": "q", "choices": 5, "answer": 0}', id="choices is a number"),
        pytest.param('{"question": "q", "choices": [], "answer": 0}', id="no choices"),
    ],
)
def test_a_malformed_record_is_named_by_key_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(InputError) as caught:
        list(read_documents("data.domain", path))
    message = str(caught.value)
    assert message.startswith("data.domain: ")
    assert "c.jsonl' line 3" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_text_that_is_not_utf8_is_refused_with_the_files_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=name):
        list(read_documents("data.domain", path))


# --- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The corpus files that are really read."""
    runs: list[str] = []
    real = data.read_documents

    def counting(key: str, path: Path, *rest: Any) -> Iterator[str]:
        runs.append(path.name)
        return real(key, path, *rest)

    monkeypatch.setattr(data, "read_documents", counting)
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
    real = data._pack

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[dict[str, list[int]]]:
        for number, block in enumerate(real(*args, **kwargs)):
            if number == 3:
                raise error
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(data, "_pack", interrupted)
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
