"""How figures are drawn on a page: inline SVG, letters as outlines, the same everywhere without scripts or fonts."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from typing import Any, TypeVar

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

T = TypeVar("T")

INK, GREY, PALE, COPY, BLUE, GREEN = "#1f2937", "#9aa5b4", "#cfd8e4", "#d9660b", "#2459c4", "#12806a"


WIDTH = 10.4
"""Of a figure, in inches."""


STYLE: dict[str, Any] = {"svg.fonttype": "path", "font.size": 8.5, "axes.titlesize": 9.5, "axes.edgecolor": GREY}


STYLE |= {"text.parse_math": False}  # names of others' units and corpora are no formulas


STYLE |= {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e6eaef"}


STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)


def svg(name: str, draw: Callable[[T, Figure], None], shown: T) -> Markup | None:
    """Draw one figure under a fixed style; the style's context leaves matplotlib's global settings as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(layout="constrained")
        draw(shown, figure)
        if not figure.axes:
            return None
        out = StringIO()
        FigureCanvasSVG(figure).print_figure(out, format="svg", metadata={"Date": None})
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", out.getvalue(), flags=re.DOTALL)
    # Figures share one document, and matplotlib names the same things alike in each of them.
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1))


def as_file(figure: Markup) -> str:
    """A figure of a page as an SVG file of its own, on white."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return str(figure).replace("<svg ", f'<svg {spaces} style="background: white" ', 1) + "\n"
