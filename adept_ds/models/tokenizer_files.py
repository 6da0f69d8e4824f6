"""The tokenizer of a model directory, as files: which tokens it has, and whether the model can take them.

Imports neither torch nor transformers, so that a mistake shows at once. There are three formats; the first that is
there counts:

- `tokenizer.json`, the tokenizers library's. All its steps count as the file states them; transformers 5 rebuilds those
  of some classes (LlamaTokenizer) from the vocabulary alone, which changes what becomes of a leading space.
- `tokenizer.model`, SentencePiece's. That library reads it; transformers 5 converts it to another segmentation where
  tokenizer_config.json is missing, and for several families (Mistral, Phi-3, Qwen) where it is there.
- `vocab.json` with `merges.txt`, byte pairs as in GPT-2: which splits go with them only transformers' classes know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adept_ds.base.errors import InputError
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.tokenizer_settings import TokenizerSettings, damaged, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Format = Literal["json", "sentencepiece", "byte_pairs"]
Role = Literal["bos_token", "eos_token"]

_FORMATS: dict[tuple[str, ...], Format] = {
    ("tokenizer.json",): "json",
    ("tokenizer.model",): "sentencepiece",
    ("vocab.json", "merges.txt"): "byte_pairs",
}

_DEFAULTS: dict[str, dict[Role, str]] = {
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "GPTNeoXTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>"},
}
"""What transformers' classes call their tokens where no file does."""

_CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
}
"""The class of a `model_type` where tokenizer_config.json names none."""

_CHAT_MARKERS = ("<start_of_turn>", "<end_of_turn>")
"""Special tokens that SentencePiece models of Gemma hold among ordinary pieces such as '<table>'."""

_CONTENTS = (
    *("tokenizer.json", "*.model", "vocab.*", "merges.txt", "tekken.json", "*.tiktoken"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*"),
)
_CONFIGURATION = ("model_type", "tokenizer_class", "vocab_size", "eos_token_id")
"""Keys of config.json that a tokenizer depends on."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The settings, read; the vocabulary is read when it is asked for, and may turn out damaged then (`InputError`)."""

    directory: Path
    format: Format
    settings: TokenizerSettings
    config: Mapping[str, Any]
    """config.json; empty if the tokenizer lies alone."""

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Raises `InputError`: no tokenizer, or its settings are damaged."""
        for names, kind in _FORMATS.items():
            if all((directory / name).is_file() for name in names):
                return cls(directory, kind, TokenizerSettings.read(directory), _model_config(directory))
        raise InputError(
            f"model: '{directory}' has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt); "
            "copy its files from where the model is from"
        )

    @property
    def num_rows(self) -> int | None:
        """Rows of the model's embedding; None where config.json does not say."""
        rows = self.config.get("vocab_size")
        return rows if isinstance(rows, int) else None

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token by its spelling, added ones too."""
        if self.format == "json":
            return dict(self.json.get_vocab(with_added_tokens=True))
        if self.format == "sentencepiece":
            pieces = {piece.piece: number for number, piece in enumerate(self.sentencepiece.pieces)}
        else:
            pieces = _byte_pairs(self.directory / "vocab.json", self.directory / "merges.txt")
        return self.settings.numbers | pieces

    @cached_property
    def special(self) -> frozenset[str]:
        """Tokens that stand for something beside text, by spelling."""
        special = {token.content for token in self.settings.declared if token.special}
        if self.format == "json":
            special |= {token.content for token in self.json.get_added_tokens_decoder().values() if token.special}
        if self.format == "sentencepiece":
            kinds = self.sentencepiece.SentencePiece
            special |= {piece.piece for piece in self.sentencepiece.pieces if piece.type == kinds.CONTROL}
            special.update(_CHAT_MARKERS)
        ends = {self.token_id("bos_token"), self.token_id("eos_token")}
        special |= {token for token, number in self.vocabulary.items() if number in ends}
        return frozenset(special & self.vocabulary.keys())

    def token_id(self, role: Role) -> int | None:
        """The token of a role as the files name it, else as the SentencePiece model or transformers' class does."""
        spelling = self.settings.spelling(role)
        if role in self.settings.model_fields_set and (spelling is None or spelling in self.vocabulary):
            return None if spelling is None else self.vocabulary[spelling]
        if self.format == "sentencepiece":
            spec = self.sentencepiece.trainer_spec
            number = int(spec.bos_id if role == "bos_token" else spec.eos_id)
            return number if number >= 0 else None
        name = self.settings.tokenizer_class or _CLASSES.get(str(self.config.get("model_type")), "")
        default = _DEFAULTS.get(name.removesuffix("Fast"), {}).get(role, "")
        found = self.vocabulary.get(default)
        return self._end_of_text() if found is None and role == "eos_token" else found

    def _end_of_text(self) -> int | None:
        """As config.json has it, for generation; where it lists several, the first."""
        numbers = self.config.get("eos_token_id")
        number = numbers[0] if isinstance(numbers, list) and numbers else numbers
        return number if isinstance(number, int) else None

    @cached_property
    def json(self) -> Tokenizer:
        """tokenizer.json with the tokens that the files beside it add. It neither cuts nor pads, whatever it says."""
        from tokenizers import Tokenizer

        path = self.directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing more precise
            raise damaged(path, error) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        add_declared(tokenizer, self.settings)
        return tokenizer

    @cached_property
    def sentencepiece(self) -> Any:
        """tokenizer.model as SentencePiece's ModelProto."""
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        path = self.directory / "tokenizer.model"
        try:
            content = path.read_bytes()
            SentencePieceProcessor().LoadFromSerializedProto(content)
            model = ModelProto.FromString(content)
        except Exception as error:  # of two libraries and the file system
            raise damaged(path, f"not a SentencePiece model: {error}") from None
        if not model.pieces:
            raise damaged(path, "not a SentencePiece model: it has no pieces")
        return model


def _byte_pairs(vocabulary: Path, merges: Path) -> dict[str, int]:
    """Raises `InputError`: one of both is damaged, or they do not belong together."""
    from tokenizers.models import BPE

    tokens = read_object(vocabulary)
    if not all(isinstance(number, int) for number in tokens.values()):
        raise damaged(vocabulary, "a token without a number")
    try:
        BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises nothing more precise
        raise damaged(merges, error) from None
    return tokens


def add_declared(tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    """Add what the settings declare and the tokenizer lacks, and make special what they call so."""
    from tokenizers import AddedToken

    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in settings.declared:
        present = known.get(token.content)
        if present is None or (token.special and not present.special):
            flags = token.model_dump(exclude={"content", "special"})
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([AddedToken(token.content, special=token.special, **flags)])


def check_tokenizer(model: ModelDirectory, bos: str, seq_lens: Mapping[str, int]) -> None:
    """Refuse a tokenizer that the model cannot take, or sequences that are too long for it.

    Sequences may be longer than `max_position_embeddings` where positions are computed (rotary embeddings): the model
    takes them, and to train on more than it has seen is a way to extend it. A table of learned positions has an end.

    Args:
        bos: `data.bos`.
        seq_lens: tokens per sequence, by configuration key.

    Raises:
        InputError: no tokenizer, a damaged one, tokens without a row in the embedding, `bos: always` without such a
            token, or more positions than the model has.
    """
    _check_positions(model, seq_lens)
    files = TokenizerFiles.read(model.path)
    _check_rows(model, files)
    if bos == "always" and files.token_id("bos_token") is None:
        raise InputError(
            f"data.bos: always, but the tokenizer of '{model.path}' has no beginning-of-sequence token: "
            "use auto or never"
        )


def _check_positions(model: ModelDirectory, seq_lens: Mapping[str, int]) -> None:
    if model.family.learned_positions is None:
        return
    key, default = model.family.learned_positions
    positions = model.config.get(key, default)
    for name, tokens in seq_lens.items():
        if isinstance(positions, int) and tokens > positions:
            raise InputError(
                f"{name}: {tokens} tokens, but '{model.path}' has learned {positions} positions ({key}); "
                f"use {positions} or fewer"
            )


def _check_rows(model: ModelDirectory, files: TokenizerFiles) -> None:
    vocabulary, end, rows = files.vocabulary, files.token_id("eos_token"), files.num_rows
    if rows is None:
        return
    beyond = {token: number for token, number in vocabulary.items() if number >= rows}
    for token in model.family.tokens_without_rows:
        beyond.pop(token, None)
    if end is not None and end >= rows:
        beyond.setdefault("eos_token_id", end)
    if beyond:
        token, number = min(beyond.items(), key=lambda entry: entry[1])
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise InputError(
            f"model: '{files.directory}' has token '{token}' ({number}){others}, but its embedding has {rows} rows "
            "(vocab_size): resize it to the tokenizer (model.resize_token_embeddings) or give the tokenizer that "
            "belongs to the model"
        )


def tokenizer_fingerprint(directory: Path) -> str:
    """SHA-256 over the names and contents of all files that tokenisation depends on; not over places and times."""
    digest = hashlib.sha256()
    for path in sorted(_tokenizer_files(directory)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(json.dumps([path.relative_to(directory).as_posix(), content]).encode())
    config = _model_config(directory)
    digest.update(json.dumps({key: config.get(key) for key in _CONFIGURATION}).encode())
    return digest.hexdigest()


def _tokenizer_files(directory: Path) -> Iterator[Path]:
    yield from {path for pattern in _CONTENTS for path in directory.glob(pattern) if path.is_file()}


def _model_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return read_object(path) if path.is_file() else {}
