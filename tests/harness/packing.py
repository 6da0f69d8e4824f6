"""Tiny corpora packed with the byte tokenizer, and what their tokens must be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.models import save_byte_tokenizer

from adept_ds.base.digests import FileDigests
from adept_ds.config.question_template import DEFAULT_TEMPLATE
from adept_ds.data.blocks import Blocks, PackedTokens
from adept_ds.data.documents import TextSource
from adept_ds.data.order import endless_order
from adept_ds.data.packing import Concatenated, Packing
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.data.tokens import TokenFile, Tokenisation, tokens_of
from adept_ds.ranks.collectives import Ranks

END = 256
"""What separates documents: the tokenizer's end-of-text token."""

TEXTS = ["hello world", "a", "the norm of x is zero", "proof"]  # 12 + 2 + 22 + 6 = 42 tokens with separators


def byte_ids(tokenizer_dir: Path) -> dict[str, int]:
    """Token of each printable ASCII character, from the vocabulary file alone (a space is written as Ġ, a line's end
    as Ċ)."""
    if not tokenizer_dir.is_dir():
        save_byte_tokenizer(tokenizer_dir)
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    return {chr(code): vocabulary[chr(code)] for code in range(33, 127)} | {" ": vocabulary["Ġ"], "\n": vocabulary["Ċ"]}


def write_texts(path: Path, *texts: str) -> Path:
    return write_records(path, *({"text": text} for text in texts))


def write_records(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def text_source(files: Sequence[Path], **options: Any) -> TextSource:
    """Of plain settings, but for `options`."""
    plain: dict[str, Any] = {"format": "auto", "text_key": "text", "max_bad_records": 0}
    return TextSource("data.domain", tuple(files), **({"question_template": DEFAULT_TEMPLATE} | plain | options))


def tokenisation(tokenizer_dir: Path, cache: Path, workers: int | None = None, **options: Any) -> Tokenisation:
    plain: dict[str, Any] = {"bos": "never", "special_tokens_in_text": "text", "bos_per": "document"}
    return Tokenisation(
        TextTokenizer(tokenizer_dir, **(plain | options)), cache, FileDigests(cache / "digests.json"), workers
    )


def tokenised(files: Sequence[Path], tokenizer_dir: Path, cache: Path, ranks: Ranks | None = None) -> TokenFile:
    return tokens_of(text_source(files), tokenisation(tokenizer_dir, cache), ranks or Ranks())


def pack(
    files: Sequence[Path],
    tokenizer_dir: Path,
    cache: Path,
    *,
    seq_len: int = 8,
    keep_tail: bool = False,
    documents: bool = False,
    bos_id: int | None = None,
    ranks: Ranks | None = None,
) -> Blocks:
    """The blocks of a corpus."""
    ranks = ranks or Ranks()
    file = tokenised(files, tokenizer_dir, cache, ranks)
    return Blocks.of(file, Packing(seq_len, keep_tail, documents), bos_id, ranks)


def rows(blocks: Blocks, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels, as a plain model takes them."""
    input_ids, labels, positions = blocks.batch(indices)
    assert positions is None
    return input_ids, labels


def rows_of_step(blocks: Blocks, step: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step trains on, `count` of these blocks, when no source is mixed with another."""
    return rows(blocks, endless_order(step * count, (step + 1) * count, len(blocks), seed))


def made_up_blocks(tokens: np.ndarray) -> Blocks:
    """[blocks, seq_len] tokens, without a text."""
    count, seq_len = tokens.shape
    return Blocks((PackedTokens(tokens.reshape(-1), Concatenated(count * seq_len, seq_len, keep_tail=False)),), seq_len)


def block_tokens(blocks: Blocks) -> list[list[int]]:
    """Of each block, the tokens of its texts behind one another."""
    return [[int(token) for text in blocks.texts(index) for token in text] for index in range(len(blocks))]


def stream(texts: list[str], byte_ids: dict[str, int]) -> list[int]:
    return [token for text in texts for token in [*(byte_ids[letter] for letter in text), END]]
