"""Mathematics in words: the comments of theorems in set.mm, the Metamath proof explorer's database.

They stand before the theorems, between `$(` and `$)`, in a markup of their own (Metamath book, section 4.4.2):
`~ label` names a theorem, `` ` formula ` `` is a formula in ASCII tokens, `_word_` is emphasised, `[Author]` a work.
What becomes of it:

- formulas have the Unicode symbols of the database's own typesetting table, without fonts: `A. x x e. A` is ∀ x x ∈ A;
- labels, emphasised words and authors stay, without their marks, and doubled marks are single ones;
- who contributed, revised or shortened a proof, and when, is left out, and so is advice on using the theorem;
- comments with HTML in them are left out, as tables of proof steps, and those of obsolete theorems, as repetitions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial
from html import unescape
from pathlib import Path

from demo.prepare import Record
from demo.study.packages import member
from demo.study.texts import distinct_texts

_DATABASE = "*/set.mm"

MIN_CHARACTERS = 40
"""Shorter comments say no more than 'Lemma for ax-1.'"""

_THEOREM = re.compile(r"\$\(((?:(?!\$\)).)*)\$\)\s*(\S+)\s+\$p\s", re.DOTALL)
"""A comment (1) and, behind it, the label (2) of a statement that is proved."""
_LEFT_OUT = re.compile(r"<HTML>|\bobsolete\b", re.IGNORECASE)
_STRING = r"""(?:"[^"]*"|'[^']*')"""
_SYMBOL = re.compile(rf"althtmldef\s+({_STRING})\s+as\s+({_STRING}(?:\s*\+\s*{_STRING})*)\s*;")
_TAG = re.compile(r"<[^<>]*>")
_INNER = r"(?:[^()]|\([^()]*\))*"
_DATE = r"\b\d{1,2}-[A-Z][a-z]{2}-\d{4}\.?\s*"
_ADVICE = r"(?:New usage|Proof modification) is discouraged\."
_ADMINISTRATIVE = re.compile(rf"\s*\((?:{_INNER}{_DATE}|{_ADVICE})\)")
"""What ends with a date tells who did something; the rest is for those who write proofs."""
_FORMULA = re.compile(r"(?<!`)`(?!`)\s*((?:[^`]|``)*?)\s*(?<!`)`(?!`)")
_LABEL = re.compile(r"(?<!~)~\s+(\S+)")
_EMPHASIS = re.compile(r"(?<![\w_])_(?!_)([^_]+)_(?![\w_])")
_WORK = re.compile(r"(?<!\[)\[([A-Za-z][\w-]*)\](?!\])")
_STRAY_SPACE = re.compile(r"\s+(?=[.,;:?!)]+(?:\s|$))|(?<=\()\s+")
"""Before punctuation and inside parentheses, where tokens were kept apart."""


def theorems(archive: Path) -> list[Record]:
    """The comment of each theorem, as text; equal ones count once."""
    database = member(archive, _DATABASE).decode("ascii")
    return distinct_texts(_comments(database, typesetting(database)))


def _comments(database: str, symbols: Mapping[str, str]) -> Iterator[Record]:
    for comment, label in _THEOREM.findall(database):
        text = readable(comment, symbols)
        if len(text) >= MIN_CHARACTERS and not _LEFT_OUT.search(comment):
            yield Record(text, f"set.mm/{label}")


def typesetting(database: str) -> dict[str, str]:
    """Token -> its symbol in Unicode, from the table that the database's web pages are set with."""
    return {token[1:-1]: _plain(definition) for token, definition in _SYMBOL.findall(database)}


def _plain(definition: str) -> str:
    html = "".join(string[1:-1] for string in re.findall(_STRING, definition))
    return unicodedata.normalize("NFKC", unescape(_TAG.sub("", html))).strip()  # NFKC: letters without their fonts


def readable(comment: str, symbols: Mapping[str, str]) -> str:
    """A comment without its markup, on one line."""
    text = _ADMINISTRATIVE.sub("", " ".join(comment.split()))
    text = _FORMULA.sub(partial(_formula, symbols), text)
    text = _WORK.sub(r"\1", _EMPHASIS.sub(r"\1", _LABEL.sub(r"\1", text)))
    for mark in ("~", "`", "[", "_"):
        text = text.replace(mark * 2, mark)
    return _STRAY_SPACE.sub("", text).strip()


def _formula(symbols: Mapping[str, str], match: re.Match[str]) -> str:
    return " ".join(symbols.get(token, token) for token in match[1].split())
