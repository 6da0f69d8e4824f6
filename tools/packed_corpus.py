"""Blocks of a corpus for measurements, by plain settings."""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.digests import FileDigests
from adept_ds.config.question_template import DEFAULT_TEMPLATE
from adept_ds.data.blocks import Blocks
from adept_ds.data.documents import TextSource
from adept_ds.data.packing import Packing
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.data.tokens import Tokenisation, tokens_of
from adept_ds.ranks.collectives import Ranks


def packed_corpus(corpus: Path, model: Path, seq_len: int, cache: Path, ranks: Ranks) -> Blocks:
    """The corpus in whole blocks, without tokens at the beginning of documents; every rank has to ask for it."""
    tokenizer = TextTokenizer(model, bos="never", special_tokens_in_text="text", bos_per="document")
    tokenisation = Tokenisation(tokenizer, cache, FileDigests(cache / "digests.json"))
    source = TextSource("corpus", (corpus,), "auto", "text", DEFAULT_TEMPLATE, 0)
    return Blocks.of(tokens_of(source, tokenisation, ranks), Packing(seq_len), None, ranks)
