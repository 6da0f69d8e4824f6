"""Pages without the second or two that it takes to turn their figures into SVG: few tests look at those.

What figures show is drawn all the same, and left out when it would be rendered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from matplotlib.figure import Figure

DRAWN = "ADEPT_TESTS_DRAW"
"""Set to anything in the environment of ranks that are to render figures."""


class _Blank:
    """In place of matplotlib's canvas."""

    def __init__(self, figure: Figure) -> None:
        pass

    def print_figure(self, out: Any, **options: Any) -> None:
        out.write('<svg viewBox="0 0 1 1"></svg>')


@contextmanager
def undrawn() -> Iterator[None]:
    with mock.patch("adept_ds.report.drawing.FigureCanvasSVG", _Blank):
        yield
