"""What the settings beside a tokenizer say of its tokens: tokenizer_config.json, and two files of older versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from adept_ds.base.errors import InputError
from adept_ds.base.records import first_mistake

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class DeclaredToken(BaseModel):
    """A token that was added to a vocabulary, with the tokenizers library's words for how it is found in a text."""

    model_config = ConfigDict(frozen=True)

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


Spelled = str | DeclaredToken


class TokenizerSettings(BaseModel):
    """The keys that tokenisation depends on; others are left out."""

    model_config = ConfigDict(frozen=True)

    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_prefix_space: bool | None = None
    bos_token: Spelled | None = None
    eos_token: Spelled | None = None
    unk_token: Spelled | None = None
    sep_token: Spelled | None = None
    pad_token: Spelled | None = None
    cls_token: Spelled | None = None
    mask_token: Spelled | None = None
    additional_special_tokens: list[Spelled] | None = None
    extra_special_tokens: list[Spelled] | dict[str, Spelled] | None = None
    added_tokens_decoder: dict[NonNegativeInt, DeclaredToken] = {}
    added_tokens: dict[str, NonNegativeInt] = {}
    """added_tokens.json"""

    @classmethod
    def read(cls, directory: Path) -> TokenizerSettings:
        """Without files, nothing is set.

        Raises:
            InputError: a damaged file.
        """
        settings = directory / "tokenizer_config.json"
        tree = _read_object(directory / "special_tokens_map.json") | _read_object(settings)
        added = _read_object(directory / "added_tokens.json")
        try:
            return cls.model_validate(tree | {"added_tokens": added})
        except ValidationError as error:
            raise damaged(settings, first_mistake(error)) from None

    def spelling(self, role: str) -> str | None:
        token = getattr(self, role)
        return token.content if isinstance(token, DeclaredToken) else token

    @property
    def numbers(self) -> dict[str, int]:
        """The tokens that the files number, by spelling."""
        return self.added_tokens | {token.content: number for number, token in self.added_tokens_decoder.items()}

    @property
    def declared(self) -> list[DeclaredToken]:
        """All tokens that the files name; those that they number come first, in this order."""
        special = {token.content: token for token in self._special()}
        described = {token.content: token for token in self.added_tokens_decoder.values()}
        tokens = {}
        for content in [*sorted(self.numbers, key=self.numbers.__getitem__), *special]:
            plain = DeclaredToken(content=content, special=False)
            token = described.get(content) or special.get(content) or plain
            tokens[content] = token.model_copy(update={"special": token.special or content in special})
        return list(tokens.values())

    def _special(self) -> Iterator[DeclaredToken]:
        """Those that have a role or are listed."""
        extra = self.extra_special_tokens or []
        listed = [getattr(self, role) for role in _ROLES] + (self.additional_special_tokens or [])
        listed += list(extra.values() if isinstance(extra, dict) else extra)
        for token in filter(None, listed):
            yield token if isinstance(token, DeclaredToken) else DeclaredToken(content=token)


def _read_object(path: Path) -> dict[str, Any]:
    """Empty if the file is not there."""
    return read_object(path) if path.exists() else {}


def read_object(path: Path) -> dict[str, Any]:
    """Raises `InputError`: the file cannot be read or holds no JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(tree, ensure_ascii=False).encode()  # what JSON can spell and no library takes
    except UnicodeEncodeError:
        raise damaged(path, "half a character, \\ud800 to \\udfff") from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(tree, dict):
        raise damaged(path, "no JSON object")
    return tree


def damaged(path: Path, reason: object) -> InputError:
    """In one line, whatever a library has to say."""
    words = " ".join(str(reason).split())[:200]
    return InputError(f"model: '{path}' cannot be used ({words}); copy it again from where the model is from")
