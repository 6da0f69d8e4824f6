"""What a browser makes of a page, and texts that would like to be more than text in it."""

from __future__ import annotations

from collections.abc import Iterable
from html.parser import HTMLParser
from typing import Any

from harness.marks import slow

HOSTILE = {
    "markup": "</script><img src=x onerror=alert(1)>",
    "quotes": "\"'&<> onmouseover=alert(1) '\"><b>",
    "comment": "--><svg onload=alert(1)><!--",
    "entity": "&lt;b&gt;&#x3c;i&#x3e;",
    "template": "{{ 7 * 7 }}{% raw %}",
    "mathematics": "$x_{<b>$ \\frac{ $",
    "style": "</style><style>*{display:none}</style>",
    "end of text": "</pre></td></table></main></body></html><p>",
    "half a character": "\ud83d<b>\udc00",
    "control characters": "\x00\x1b[31m<b>\r\n\x85\u2028",
}


def mostly_slow(kinds: Iterable[str]) -> list[Any]:
    """As parameters of a test: three of them at every commit."""
    return [kind if kind in ("markup", "template", "mathematics") else slow(kind) for kind in kinds]


class Structure(HTMLParser):
    """What a browser's parser makes of a page besides text; of figures, which kinds of elements and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.in_figures: set[tuple[str, str]] = set()
        self.text: list[str] = []
        self._figure_depth = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._figure_depth += tag == "svg"
        names = tuple(name for name, _ in attrs)
        if self._figure_depth:
            self.in_figures |= {(tag, name) for name in names}
        else:
            self.elements.append((tag, names))

    def handle_endtag(self, tag: str) -> None:
        self._figure_depth -= tag == "svg"
        if not self._figure_depth:
            self.elements.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", (data,)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)
