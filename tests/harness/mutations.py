"""Inputs as mistakes, crashes and attackers make them: valid ones that are changed, by their structure or by bytes.

All of it are strategies of hypothesis, so that an input that shows a fault shrinks to the change that matters.
"""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_TWICE = "\0twice"
"""Behind a key: it stands in its object already, and this is the second time."""

_DEEP = 100_000


def raw(text: str) -> str:
    """A value that `json_text` writes as it is, whatever JSON thinks of it."""
    return f"\0raw{text}\0"


ODD_TEXTS = (
    "",
    "0",
    "600",
    "a" * 300,
    "x" * 70_000,
    "..",
    "../canary/secret",
    "../../canary/secret.safetensors",
    "/etc/passwd",
    "/dev/zero",
    "sub/dir/model.safetensors",
    "C:\\model.safetensors",
    "nul\0byte",
    "\x1b[31mred\x1b[0m",
    "two\nlines\r\nTraceback (most recent call last):",
    "\ud83d",
    "\u202eright to left\u2028",
    "🙂 東京 e\u0301",
    "{{ 7 * 7 }}{% for x in y %}",
    "[bold]markup[/] [/]",
    "%s %d {0} {name}",
    "~nobody/x",
    "$HOME/x",
    "http://198.51.100.1/model",
    "somebody/some-model",
    "NaN",
    "model.safetensors",
)
ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    3.5,
    -0.0,
    1e-320,
    1e308,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    raw("9" * 5000),
    raw("1e999"),
    raw("NaN"),
    raw("-Infinity"),
)
ODD_SHAPES: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [0, 0],
    {"": {}},
    {"a": [{"b": None}]},
    raw("[" * _DEEP),
    raw("[" * _DEEP + "]" * _DEEP),
    raw('{"a":' * _DEEP + "1" + "}" * _DEEP),
    raw(""),
    raw("'single'"),
    raw("01"),
    raw("undefined"),
    raw("/* comment */ 1"),
)
ODD_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from(ODD_SHAPES).map(copy.deepcopy),  # other edits change them
    st.integers(-(2**70), 2**70),
    st.integers(-3, 300),
    st.floats(width=32),
    st.text(max_size=12),
)
_CHUNKS = (
    *(b"\0", b"\0" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\n", b"\r", b'"', b"{", b"[" * 2000),
    *(b",", b"null", b"-", b"9" * 400, b"\x1b[31m", b"\x1f\x8b\x08", b"PAR1", b"\x28\xb5\x2f\xfd", b"\\ud83d", b"\x80"),
)


def json_text(tree: Any) -> bytes:
    """A tree with `raw` values and keys that stand twice."""
    text = json.dumps(tree).replace(json.dumps(_TWICE)[1:-1], "")
    return re.sub(r'"\\u0000raw(.*?)\\u0000"', _unescaped, text, flags=re.DOTALL).encode()


def _unescaped(found: re.Match[str]) -> str:
    return str(json.loads(f'"{found.group(1)}"'))


@st.composite
def edited(draw: Draw, tree: Any) -> Any:
    """A tree of JSON with one change, or a few."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        *path, last = [None, *_way(draw, tree)]
        holder = {None: tree}
        node: Any = holder
        for key in path:
            node = node[key]
        draw(st.sampled_from(_EDITS))(draw, node, last, tree)
        tree = holder.get(None, {})
    return tree


def _way(draw: Draw, tree: Any) -> list[Any]:
    """To a place in a tree; what is near the root is found more often."""
    way: list[Any] = []
    while isinstance(tree, dict | list) and tree and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
        way.append(key)
        tree = tree[key]
    return way


def _replace(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    node[key] = draw(ODD_VALUES)


def _remove(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    del node[key]


def _rename(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    if isinstance(key, str):
        node[draw(st.one_of(st.sampled_from(ODD_TEXTS), st.just(key.upper()), st.just(key + " ")))] = node.pop(key)


def _repeat(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    if isinstance(key, str):
        node[key + _TWICE] = draw(ODD_VALUES) if draw(st.booleans()) else node[key]
    elif isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))


def _wrap(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    for _ in range(draw(st.sampled_from((1, 2, 50)))):
        node[key] = [node[key]] if draw(st.booleans()) else {"a": node[key]}


def _borrow(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    value = tree
    for step in _way(draw, tree):
        value = value[step]
    node[key] = copy.deepcopy(value)


def _add(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    if isinstance(node[key], dict):
        node[key][draw(st.sampled_from(ODD_TEXTS))] = draw(ODD_VALUES)
    elif isinstance(node[key], list):
        node[key].append(draw(ODD_VALUES))


def _nudge(draw: Draw, node: Any, key: Any, tree: Any) -> None:
    """A value of the same type, and one that may well pass for right."""
    value = node[key]
    if isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 1000, float(value), str(value), value / 2)
        node[key] = draw(st.sampled_from(near))
    elif isinstance(value, str):
        cut = draw(st.integers(0, len(value)))
        similar = (value[:cut], value + value, value.upper(), f" {value}", f"{value}\0", value[::-1])
        node[key] = draw(st.sampled_from(similar))
    elif isinstance(value, list):
        node[key] = draw(st.sampled_from((value[::-1], value[1:], value * 2, value[:1] * 300)))
    elif isinstance(value, dict):
        node[key] = dict(list(value.items())[draw(st.integers(0, len(value))) :])


_EDITS = (
    _replace,
    _replace,
    _replace,
    _nudge,
    _nudge,
    _nudge,
    _remove,
    _remove,
    _rename,
    _repeat,
    _wrap,
    _borrow,
    _add,
)


@st.composite
def spoiled(draw: Draw, content: bytes) -> bytes:
    """Bytes with one change, or a few."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        start, stop = sorted((draw(_position(content)), draw(_position(content))))
        content = draw(st.sampled_from(_SPOILINGS))(draw, content, start, stop)
    return content


def _position(content: bytes) -> st.SearchStrategy[int]:
    end = len(content)
    return st.one_of(st.integers(0, end), st.integers(0, min(end, 400)), st.integers(max(0, end - 400), end))


def _flip(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    if start >= len(content):
        return content
    return content[:start] + bytes([content[start] ^ (1 << draw(st.integers(0, 7)))]) + content[start + 1 :]


def _cut(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    return content[:stop]


def _drop(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + content[stop:]


def _insert(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + draw(st.one_of(st.sampled_from(_CHUNKS), st.binary(max_size=8))) + content[start:]


def _double(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    return content[:stop] + content[start:]


def _overwrite(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + bytes([draw(st.sampled_from((0, 255, 32, 10)))]) * (stop - start) + content[stop:]


def _encode(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    encoding = draw(st.sampled_from(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")))
    return content.decode("latin-1").encode(encoding)


def _become(draw: Draw, content: bytes, start: int, stop: int) -> bytes:
    return draw(st.sampled_from((b"", b"\n", b"null", b"{}", b"[]", b"\0" * 16, b"\xff" * 16, b"[" * _DEEP, b"0")))


_SPOILINGS = (_flip, _flip, _flip, _cut, _cut, _drop, _insert, _insert, _double, _overwrite, _encode, _become)


def changed_json(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file: mostly by its structure."""
    trees = edited(json.loads(content)).map(json_text)
    return st.one_of(trees, trees, trees, spoiled(content))


def changed_lines(content: bytes) -> st.SearchStrategy[bytes]:
    """A file of JSON lines: a record changes, lines move, or bytes do."""
    lines = content.splitlines()

    @st.composite
    def changed(draw: Draw) -> bytes:
        at = draw(st.integers(0, len(lines) - 1))
        tree = draw(edited(json.loads(lines[at])))
        keep = draw(st.sampled_from((len(lines), at + 1)))
        changed_file = b"\n".join([*lines[:at], json_text(tree), *lines[at + 1 : keep]])
        return changed_file + draw(st.sampled_from((b"\n", b"", b"\n\n")))

    shuffled = st.permutations(lines[:12]).map(lambda some: b"\n".join(some) + b"\n")
    return st.one_of(changed(), changed(), changed(), shuffled, spoiled(content))


def changed_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file: its header by structure, with a length that fits or does not; its data; or bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    @st.composite
    def changed(draw: Draw) -> bytes:
        text = json_text(draw(edited(header)))
        said = draw(st.sampled_from((len(text),) * 9 + (0, len(text) - 1, 2**63, 2**64 - 1, 100 << 20)))
        end = draw(st.sampled_from((len(data),) * 5 + (0, len(data) - 1)))
        return struct.pack("<Q", said) + text + data[:end]

    in_data = spoiled(data).map(lambda other: content[: 8 + length] + other)
    return st.one_of(changed(), changed(), changed(), in_data, spoiled(content))


YAML_SCALARS = (
    "2020-13-45",
    "2001-12-14t21:59:43.10-05:00",
    "!!bool 7",
    "!!python/object/apply:os.system ['touch hacked']",
    "!!python/name:os.system",
    "!!binary abc",
    "!<tag:yaml.org,2002:int> x",
    "*unknown",
    "&a [*a]",
    "{",
    "[",
    "'",
    '"\\ud83d"',
    '"\\x00"',
    "0o777",
    "0x1F",
    "1_000",
    "1:30",
    ".nan",
    "-.inf",
    "1e999",
    "yes",
    "~",
    "|",
    ">\n  folded",
    "%YAML 9.9",
    "@x",
    "`x`",
    "? complex",
    "- item",
    "{<<: {a: 1}}",
    "\t",
    "\x07",
    "9" * 5000,
    "[" * 3000,
    "{a: {a: {a: {a: 1}}}}",
    "\ufeffx",
    "=",
    "<<",
    "!",
    "''",
    "#",
)


def changed_yaml(content: bytes, tree: Any) -> st.SearchStrategy[bytes]:
    """A YAML file: the tree that it holds, as JSON, which YAML is; its lines; or bytes."""
    lines = content.decode().splitlines()

    @st.composite
    def changed(draw: Draw) -> bytes:
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        value = draw(st.one_of(st.sampled_from(YAML_SCALARS), st.sampled_from(ODD_TEXTS), st.text(max_size=9)))
        line = draw(st.sampled_from((f"{key}{colon} {value}", f"{key}{colon} {value}", value, f"  {lines[at]}")))
        return "\n".join([*lines[:at], line, *lines[at + 1 :]]).encode("utf-8", "surrogatepass")

    trees = edited(tree).map(json_text)
    return st.one_of(trees, trees, trees, changed(), changed(), spoiled(content))


def odd_arguments(arguments: Sequence[str], options: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """A command line: arguments replaced, left out, doubled, swapped, or options of other commands added."""

    @st.composite
    def changed(draw: Draw) -> list[str]:
        line = list(arguments)
        for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
            at = draw(st.integers(1, len(line)))
            some = st.text(max_size=9).map(lambda text: text.replace("/", ""))  # no directory that nobody thought of
            value = draw(st.one_of(st.sampled_from(ODD_TEXTS), st.sampled_from(_ODD_ARGUMENTS), some))
            value = value.encode("utf-8", "replace").decode().replace("\0", "") if value != _NO_TEXT else value
            how = draw(st.sampled_from(("replace", "replace", "insert", "remove", "repeat", "option", "suffix")))
            if how == "replace":
                line[at : at + 1] = [value]
            elif how == "insert":
                line.insert(at, value)
            elif how == "remove":
                del line[at : at + 1]
            elif how == "repeat":
                line[at:at] = line[at : at + 1]
            elif how == "option":
                line[at:at] = [draw(st.sampled_from(options)), value][: draw(st.integers(1, 2))]
            elif at < len(line):
                line[at] += value
        return line

    return changed()


_NO_TEXT = "caf\udce9"
"""As Python has a name that is Latin-1 on the disk."""

_ODD_ARGUMENTS = (
    _NO_TEXT,
    "-1",
    "--",
    "-",
    "--no-such-option",
    "-k",
    "=",
    "a=b",
    "train.lr",
    "train.lr=",
    "train.lr=1e999",
    "model=/nowhere",
    "expand.k=99",
    "run_dir=/",
    "run_dir=.",
    "1,2,3",
    "1,1",
    "0",
    "99999999999999999999",
    "1e3",
    "NaN",
    "auto",
    "/",
    ".",
    "..",
    "~",
    "a/" * 3000,
    "b" * 256,
    "*",
    "/proc/self/mem",
    "/dev/null",
    "--help",
)
