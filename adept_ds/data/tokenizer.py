"""Text -> tokens, as the model's own tokenizer makes them, and where a beginning-of-sequence token goes.

Special tokens that a text happens to spell ('<s>' in a page about HTML) are letters unless the configuration says
otherwise: a model that is trained on the token instead unlearns what it stands for. The tokens that begin and end a
document are put by packing, by their numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adept_ds.base.errors import InputError
from adept_ds.data.tokenizer_libraries import (
    JsonTokenizer,
    SentencePieceTokenizer,
    byte_pair_tokenizer,
    spelling_of,
    usable,
)
from adept_ds.models.tokenizer_files import TokenizerFiles, tokenizer_fingerprint

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a model directory. To pickle it sends its settings; it loads once per process, when used."""

    directory: Path
    _: KW_ONLY
    bos: Literal["auto", "always", "never"]
    """`data.bos`. auto: where the tokenizer itself begins a text with one; never two in a row."""
    special_tokens_in_text: Literal["text", "parse", "error"]
    """`data.special_tokens_in_text`."""
    bos_per: Literal["document", "block"]
    """`Family.bos_per`."""

    @property
    def per_block(self) -> bool:
        """Whether every block begins with `bos_id`, rather than every document.

        Llama 3 and others were pretrained with one before each document; in a block that continues a document there
        is none. Gemma's models need one at the first position of whatever they see (see `family_table`).
        """
        return self.bos_per == "block"

    @cached_property
    def bos_id(self) -> int | None:
        """The token to put at the beginning of documents or blocks; None: nothing.

        Raises:
            InputError: `bos: always`, and the tokenizer has no such token.
        """
        if self.bos == "never":
            return None
        token = self._files.token_id("bos_token")
        if self.bos == "auto":
            return self._library.bos_by_itself(token)
        if token is None:
            raise InputError(
                f"data.bos: always, but the tokenizer of '{self.directory}' has no beginning-of-sequence token: "
                "use auto or never"
            )
        return token

    @cached_property
    def eos_id(self) -> int | None:
        """The token to put between documents; None: there is none."""
        return self._files.token_id("eos_token")

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, int32, without those that packing puts: not even a `bos_id` that it begins with.

        Raises:
            ValueError: a text spells a special token that it must not.
        """
        for text in texts:
            self._refuse_spelled(text)
        with usable(self.directory):
            found = self._library.encode(texts)
        return [ids[self._num_doubled(ids) :] for ids in found]

    def encode_with_offsets(self, text: str) -> tuple[Ids, Ids]:
        """The same tokens of one text, and for each the character at which it starts (never decreasing)."""
        self._refuse_spelled(text)
        with usable(self.directory):
            ids, starts = self._library.encode_with_offsets(text)
        doubled = self._num_doubled(ids)
        return ids[doubled:], starts[doubled:]

    def fingerprint(self) -> str:
        """SHA-256 over the tokenizer's files and these settings."""
        settings = [self.bos, self.special_tokens_in_text, self.bos_per]
        return hashlib.sha256(json.dumps([tokenizer_fingerprint(self.directory), settings]).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _files(self) -> TokenizerFiles:
        return TokenizerFiles.read(self.directory)

    @cached_property
    def _library(self) -> JsonTokenizer | SentencePieceTokenizer:
        letters = self.special_tokens_in_text != "parse"
        with usable(self.directory):
            if self._files.format == "sentencepiece":
                return SentencePieceTokenizer(self._files, letters)
            if self._files.format == "json":
                return JsonTokenizer(self._files, self._files.json, letters)
            return JsonTokenizer(self._files, byte_pair_tokenizer(self._files), letters)

    @cached_property
    def _refused(self) -> re.Pattern[str] | None:
        """What a text must not spell: any special token, or one that the model has no row for."""
        if self.special_tokens_in_text == "text":
            return None
        refused, rows = set(self._files.special), self._files.num_rows
        if self.special_tokens_in_text == "parse":
            refused = {token for token in refused if rows is not None and self._files.vocabulary[token] >= rows}
        return spelling_of(refused) if refused else None

    def _refuse_spelled(self, text: str) -> None:
        if self._refused is not None and (found := self._refused.search(text)):
            why = ", which the model has no row for" if self.special_tokens_in_text == "parse" else ""
            raise ValueError(
                f"special token '{found.group()}'{why} (data.special_tokens_in_text: {self.special_tokens_in_text})"
            )

    def _num_doubled(self, ids: Ids) -> int:
        return int(self.bos_id is not None and len(ids) > 0 and ids[0] == self.bos_id)
