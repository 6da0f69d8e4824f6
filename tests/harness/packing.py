"""Tiny corpora packed with the byte tokenizer, and what their tokens must be."""

from __future__ import annotations

import json
from pathlib import Path

from harness.models import save_byte_tokenizer

from adept_ds.data.blocks import Blocks
from adept_ds.data.packing import Packing, build_blocks

END = 256
"""What separates documents: the tokenizer's end-of-text token."""

TEXTS = ["hello world", "a", "the norm of x is zero", "proof"]  # 12 + 2 + 22 + 6 = 42 tokens with separators


def byte_ids(tokenizer_dir: Path) -> dict[str, int]:
    """Token of each printable ASCII character, from the vocabulary file alone (a space is written as Ġ)."""
    if not tokenizer_dir.is_dir():
        save_byte_tokenizer(tokenizer_dir)
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    return {chr(code): vocabulary[chr(code)] for code in range(33, 127)} | {" ": vocabulary["Ġ"]}


def write_texts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def pack(files: list[Path], tokenizer_dir: Path, cache: Path, *, seq_len: int = 8, keep_tail: bool = False) -> Blocks:
    return build_blocks(Packing("data.domain", tuple(files), tokenizer_dir, seq_len, keep_tail), cache)


def tokens_of(blocks: Blocks) -> list[list[int]]:
    return [list(blocks.dataset[index]["input_ids"]) for index in range(len(blocks))]


def stream(texts: list[str], byte_ids: dict[str, int]) -> list[int]:
    return [token for text in texts for token in [*(byte_ids[letter] for letter in text), END]]
