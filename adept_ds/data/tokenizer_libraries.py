"""The libraries that tokenise: Hugging Face's tokenizers, and SentencePiece; special tokens as letters in both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adept_ds.base.errors import InputError
from adept_ds.models.tokenizer_files import TokenizerFiles
from adept_ds.models.tokenizer_settings import damaged

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = NDArray[np.int32]

_UNSPELLABLE = "\U0010ffff\U0010ffff"
"""A noncharacter: it stands for nothing and is in no text."""


class JsonTokenizer:
    """A tokenizers library's pipeline."""

    def __init__(self, files: TokenizerFiles, tokenizer: Tokenizer, letters: bool) -> None:
        """Args:
        letters: special tokens that a text spells are letters, else tokens.
        """
        self._first = _first_token(tokenizer)
        if letters:
            in_model = files.special & tokenizer.get_vocab(with_added_tokens=False).keys()
            tokenizer = _without_spellings(tokenizer, in_model) if in_model else tokenizer
            tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def bos_by_itself(self, bos: int | None) -> int | None:
        """What this tokenizer begins a text with. Its post-processor decides, as it does in transformers."""
        return self._first if bos is None or self._first == bos else None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[Ids, Ids]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int32)
        return np.array(encoding.ids, dtype=np.int32), starts


class SentencePieceTokenizer:
    """A SentencePiece model that has nothing beside it; the library's own segmentation."""

    def __init__(self, files: TokenizerFiles, letters: bool) -> None:
        """As `JsonTokenizer`."""
        from sentencepiece import SentencePieceProcessor

        self._add_bos = files.settings.add_bos_token
        self._processor = SentencePieceProcessor(model_proto=_adjusted(files).SerializeToString())
        self._tokens = {} if letters else {token: files.vocabulary[token] for token in files.special}

    def bos_by_itself(self, bos: int | None) -> int | None:
        """The classes for such files (LlamaTokenizer, GemmaTokenizer) begin with one unless they are told not to."""
        return None if self._add_bos is False else bos

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        if self._tokens:
            return [self.encode_with_offsets(text)[0] for text in texts]
        # Several processes tokenise at once already.
        return list(self._processor.encode(list(texts), return_type="numpy", num_threads=1))

    def encode_with_offsets(self, text: str) -> tuple[Ids, Ids]:
        """What stands between special tokens is a text of its own, as the classes for such files have it."""
        ids, starts, begin = list[int](), list[int](), 0
        for part in spelling_of(self._tokens).split(text) if self._tokens else [text]:
            if part in self._tokens:
                ids.append(self._tokens[part])
                starts.append(begin)
            else:
                mapping = self._processor.encode(part, return_type="offset_mapping")
                ids += mapping["ids"]
                starts += [begin + start for start, _ in mapping["offsets"]]
            begin += len(part)
        return np.array(ids, dtype=np.int32), np.array(starts, dtype=np.int32)


@contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Whatever a library raises, when it reads a tokenizer or only at some text, becomes an `InputError` about it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries raise nothing more precise
        raise damaged(directory, f"the tokenizer fails: {error}") from None


def spelling_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of these tokens in a text, the longest first; one group."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")


def byte_pair_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """What transformers makes of vocab.json and merges.txt.

    Raises:
        InputError: it makes nothing of them.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.directory, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer
    except Exception as error:  # of whatever kind the class raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model: transformers cannot use the tokenizer of '{files.directory}' ({reason}); give one with "
            "tokenizer.json"
        ) from None


def _first_token(tokenizer: Tokenizer) -> int | None:
    """What the post-processor puts before a text, if it is one token."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    added = len(whole) - len(plain)
    return whole[0] if added and plain and whole[1 : 1 + len(plain)] == plain else None


def _without_spellings(tokenizer: Tokenizer, tokens: frozenset[str]) -> Tokenizer:
    """The same tokenizer, in which no text yields these tokens of its model's vocabulary.

    Its model itself may compose them of letters: one of unigrams looks up every string, one of byte pairs may have
    merges that end there. They keep their numbers.
    """
    tree = json.loads(tokenizer.to_str())
    model = tree["model"]
    hidden = tokens - {model.get("unk_token")}

    def rename(token: str) -> str:
        return _UNSPELLABLE + token if token in hidden else token

    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[rename(token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not tokens & {*pair, "".join(pair)}]
    for added in tree["added_tokens"]:
        added["content"] = rename(added["content"])
    return type(tokenizer).from_str(json.dumps(tree))


def _adjusted(files: TokenizerFiles) -> Any:
    """The SentencePiece model with the tokens that other files add; text yields no special ones."""
    model = type(files.sentencepiece)()
    model.CopyFrom(files.sentencepiece)
    kinds = model.SentencePiece
    if files.settings.add_prefix_space is False:
        model.normalizer_spec.add_dummy_prefix = False
    present = {piece.piece for piece in model.pieces}
    added = {number: token for token, number in files.settings.numbers.items() if token not in present}
    for number in range(len(model.pieces), max(added, default=-1) + 1):
        model.pieces.add(piece=f"{_UNSPELLABLE}{number}", score=0.0)
    for number, token in added.items():  # also where the model has a piece for later use, such as '<unused7>'
        model.pieces[number].piece, model.pieces[number].type = token, kinds.USER_DEFINED
    for piece in model.pieces:
        if piece.piece in files.special and piece.type != kinds.UNKNOWN:
            piece.type = kinds.CONTROL
    return model
