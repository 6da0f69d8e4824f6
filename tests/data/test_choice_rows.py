"""Choices as continuations of a question: tokenised as lm-eval does it, whose own code is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness.models import save_byte_tokenizer
from harness.packing import byte_ids
from harness.tokenizers import TEXTS, save_byte_pairs, save_chatml, save_llama_json, save_unigrams

from adept_ds.base.errors import InputError
from adept_ds.data.choice_rows import ChoiceRows, encode_pair
from adept_ds.data.order import FILLER
from adept_ds.data.questions import Question
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.models.head_loss import IGNORED_LABEL

TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "Llama": save_llama_json,  # a space before every text, and a first token
    "bytes with a first token": lambda directory: save_chatml(directory, bos=True),
    "pairs of bytes": save_byte_pairs,
    "unigrams": save_unigrams,
}
PAIRS = [
    *((context, " " + continuation) for context in TEXTS if context.strip() for continuation in ("he", "4", "東京")),
    ("two spaces behind  ", "and one  before"),
    ("a line\n", "hello"),
    ("hel", "lo"),  # together, other tokens than apart
]


def text_tokenizer(directory: Path, **options: Any) -> TextTokenizer:
    plain: dict[str, Any] = {"bos": "auto", "special_tokens_in_text": "parse", "bos_per": "document"}
    return TextTokenizer(directory, **(plain | options))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_pair_has_the_tokens_that_it_has_in_lm_eval(tmp_path: Path, kind: str) -> None:
    """Of the tokenizer that transformers loads, with the tokens that it puts by itself."""
    model = pytest.importorskip("lm_eval.api.model")
    from transformers import AutoTokenizer

    directory = TOKENIZERS[kind](tmp_path / "tokenizer")
    theirs, ours = AutoTokenizer.from_pretrained(directory), text_tokenizer(directory)
    harness = SimpleNamespace(backend="causal", tok_encode=lambda text: theirs.encode(text, add_special_tokens=True))
    for context, continuation in PAIRS:
        before, after = model.TemplateLM._encode_pair(harness, context, continuation)
        tokens, first = encode_pair(ours, context, continuation)
        assert (tokens[:first].tolist(), tokens[first:].tolist()) == (before, after), (context, continuation)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(directory)
    return text_tokenizer(directory, special_tokens_in_text="text")


def test_the_loss_of_the_choice_alone_counts(tokenizer: TextTokenizer) -> None:
    rows, ids = ChoiceRows.of([Question("1?", ("one", "no"), 0, "")], tokenizer, 100), byte_ids(tokenizer.directory)
    texts = [f"Question: 1?\nAnswer: {choice}" for choice in ("one", "no")]
    assert rows.lengths.tolist() == list(map(len, texts))
    input_ids, labels, _ = rows.batch([1, FILLER, 0])
    for place, text, choice in ((0, texts[1], " no"), (2, texts[0], " one")):
        assert input_ids[place, : len(text)].tolist() == [ids[letter] for letter in text]
        counted = labels[place] != IGNORED_LABEL
        assert labels[place][counted].tolist() == [ids[letter] for letter in choice]
        assert counted.nonzero()[-1] == len(text) - 1
    assert (labels[1] == IGNORED_LABEL).all()
    assert rows.batch([FILLER]).labels.shape == (1, 2)


def test_a_context_that_is_too_long_loses_its_beginning(tokenizer: TextTokenizer) -> None:
    question = [Question("x" * 50, ("one", "no"), 0, "")]
    whole, cut = (ChoiceRows.of(question, tokenizer, room) for room in (1000, 20))
    assert cut.lengths.tolist() == [20, 20]
    for row in (0, 1):
        assert np.array_equal(cut.tokens[row], whole.tokens[row][-20:])
        assert np.array_equal(cut.tokens[row][cut.firsts[row] :], whole.tokens[row][whole.firsts[row] :])


def test_a_choice_that_does_not_fit_is_refused_with_its_place(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"^'q' line 3: the choice 'yyyyyyyy' is longer than the 9 tokens"):
        ChoiceRows.of([Question("x", ("no", "y" * 8), 0, "'q' line 3")], tokenizer, 9)


def test_a_special_token_in_a_choice_is_refused_where_texts_must_not_spell_one(tokenizer: TextTokenizer) -> None:
    strict = text_tokenizer(tokenizer.directory, special_tokens_in_text="error")
    with pytest.raises(InputError, match=r"^'q' line 3: special token '<\|end\|>'"):
        ChoiceRows.of([Question("x", ("no", "<|end|>"), 0, "'q' line 3")], strict, 90)
