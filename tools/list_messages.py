"""Every message that adept-ds ends with, with its remedy: docs/messages.md, made from the program's own text.

    python tools/list_messages.py > docs/messages.md

A message is one line, "adept: CAUSE; REMEDY". What stands in it of the input is shown as "...".
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ERRORS = {
    "InputError": "input",
    "DamagedError": "damage",
    "NonFiniteLossError": "input",
    "UnreachedError": "input",
    "StopRequestedError": "stop",
    "MachineError": "machine",
    "LostRankError": "machine",
}

KINDS = {
    "input": "Exit code 2: the input cannot work",
    "damage": "Files that are not as they were written",
    "machine": "Exit code 4: the machine failed",
    "stop": "Exit code 3: stopped on request",
    "launch": "Exit code 2, of the launch scripts",
}
"""Headings, in the order of the page."""

_SENTENCES = {
    "adept_ds/base/files.py": {"disk_failure": "machine"},
    "adept_ds/ranks/watch.py": {"describe": "machine"},
}
"""Functions that put messages together, whatever is raised with them."""

_WILD = "..."


@dataclass(frozen=True, order=True)
class Message:
    """What is said; values that stand in it are `...`."""

    kind: str
    room: str
    cause: str
    remedy: str


def messages() -> list[Message]:
    """All of them, sorted as the page has them."""
    found = set(_of_scripts())
    for path in sorted((ROOT / "adept_ds").rglob("*.py")):
        found |= set(_of_module(path))
    order = list(KINDS)
    return sorted(found, key=lambda message: (order.index(message.kind), message.room, message))


def _of_module(path: Path) -> Iterator[Message]:
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = _constants(tree)
    room = name.split("/")[1].removesuffix(".py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            text = _text(node.args[0], known)
            more = _text(node.args[1], known) if len(node.args) > 1 else None
            if text and _says_something(text):
                yield _message(ERRORS[node.func.id], room, text, more)
        elif isinstance(node, ast.FunctionDef) and node.name in _SENTENCES.get(name, {}):
            for inner in ast.walk(node):
                text = _text(inner, known) if isinstance(inner, ast.JoinedStr) else None
                if text and "; " in text:
                    yield _message(_SENTENCES[name][node.name], room, text, None)


def _of_scripts() -> Iterator[Message]:
    for path in sorted((ROOT / "launch").iterdir()):
        if path.is_file():
            for text in re.findall(r'\bdie "((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8")):
                said = re.sub(r"\$\{[^}]*\}|\$\w+|\$[*@]", _WILD, text)
                yield _message("launch", path.name, said, None)


def _message(kind: str, room: str, text: str, remedy: str | None) -> Message:
    cause, _, rest = text.rpartition("; ") if "; " in text else (text, "", "")
    return Message(kind, room, _plain(cause), _plain(remedy or rest))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"(\.\.\.){2,}", _WILD, text).split())


def _says_something(text: str) -> bool:
    """Beyond what others have said, which is passed on."""
    return len(re.sub(r"\W", "", text.replace(_WILD, ""))) > 3


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a module has names for."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, {})
            if text:
                found[node.targets[0].id] = text
    return found


def _text(node: ast.AST, known: dict[str, str]) -> str | None:
    """Of an expression; None: it is put together elsewhere.

    Args:
        known: texts by name.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else _WILD
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known) or _WILD for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return known.get(node.value.id, _WILD) if isinstance(node.value, ast.Name) else _WILD
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left, known) or _WILD) + (_text(node.right, known) or _WILD)
    return None


def page() -> str:
    """docs/messages.md"""
    lines = [
        "# Every message",
        "",
        "What adept-ds says where it ends without having done what was asked: one line on stderr,",
        "`adept: CAUSE; REMEDY`. In this list `...` stands for what the line names: a key, a value, a file, a number.",
        "It is made from the program",
        "(`python tools/list_messages.py > docs/messages.md`); what to do at three in the morning stands in",
        "[when_things_go_wrong.md](when_things_go_wrong.md). No remedy here deletes anything.",
    ]
    kind = room = ""
    for message in messages():
        if message.kind != kind:
            kind, room = message.kind, ""
            lines += ["", f"## {KINDS[kind]}"]
        if message.room != room:
            room = message.room
            lines += ["", f"### {room}", "", "| cause | remedy |", "|---|---|"]
        lines.append(f"| {_cell(message.cause)} | {_cell(message.remedy)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text.replace("`", "'"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
