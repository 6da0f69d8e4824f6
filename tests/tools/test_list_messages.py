"""What the program says and what its pages say of that are the same."""

from __future__ import annotations

import re

import pytest
from harness.launching import ROOT
from list_messages import Message, messages, page

GUIDE = ROOT / "docs" / "when_things_go_wrong.md"
PAGES = [GUIDE, ROOT / "docs" / "launching.md", ROOT / "docs" / "checkpoints.md", ROOT / "README.md"]


def pattern(message: Message) -> re.Pattern[str]:
    """Matches a whole line of it."""
    parts = [message.cause, message.remedy] if message.remedy else [message.cause]
    if message.kind == "stop":
        parts.append("run the same command again to go on")
    return re.compile("adept: " + ".+".join(re.escape(part) for part in "; ".join(parts).split("...")))


def quoted(text: str) -> list[str]:
    """Lines of code blocks that are messages, put together where they were broken."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
    joined = [re.sub(r"\n {4}(?! *adept: )", " ", block).splitlines() for block in blocks]
    return [line.strip() for block in joined for line in block if line.strip().startswith("adept: ")]


def test_the_page_of_all_messages_is_that_of_this_program() -> None:
    """If it is not: python tools/list_messages.py > docs/messages.md"""
    assert (ROOT / "docs" / "messages.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_message_that_a_page_shows_is_one_of_the_programs(path: object) -> None:
    assert isinstance(path, type(GUIDE))
    known = [pattern(message) for message in messages()]
    for line in quoted(path.read_text(encoding="utf-8")):
        assert any(one.fullmatch(line) for one in known), line


@pytest.mark.parametrize(
    "message", [m for m in messages() if m.kind == "machine" and len(m.cause) > 10], ids=lambda m: m.cause[:30]
)
def test_the_guide_shows_every_failure_of_the_machine(message: Message) -> None:
    lines = quoted(GUIDE.read_text(encoding="utf-8"))
    assert any(pattern(message).fullmatch(line) for line in lines)


def test_messages_have_a_remedy() -> None:
    """But those that are put together with what raised them, and a few that say it with a colon."""
    found = messages()
    without = [message.cause for message in found if not message.remedy and message.kind in ("input", "machine")]
    assert len(found) > 300
    assert len(without) < 0.1 * len(found), without
