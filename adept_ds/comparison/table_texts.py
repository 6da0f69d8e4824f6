"""Tables of a comparison in Markdown and in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from adept_ds.comparison.tables import Entry, Table
from adept_ds.comparison.wording import MINUS, NONE


def markdown(tables: Iterable[Table]) -> str:
    """For GitHub and whatever knows its tables."""
    return "\n".join(_markdown_of(table) for table in tables)


def _markdown_of(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(entry: Entry) -> str:
        first, *others = map(escape_markdown, (entry.text, *entry.details))
        return "<br>".join([f"**{first}**" if entry.strong else first, *others])

    rule = line([":--", *("--:" for _ in table.header[1:])])
    rows = [line(map(cell, row)) for row in table.rows]
    return "\n".join([escape_markdown(table.caption), "", line(map(escape_markdown, table.header)), rule, *rows, ""])


def latex(tables: Iterable[Table]) -> str:
    """For the packages booktabs and graphicx; each table is made as wide as the text."""
    return "\n".join([r"% needs \usepackage{booktabs,graphicx}", *map(_latex_of, tables)])


def _latex_of(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + r" \\"

    def cell(entry: Entry, side: str) -> str:
        first, *others = map(escape_latex, (entry.text, *entry.details))
        first = rf"\textbf{{{first}}}" if entry.strong else first
        return rf"\shortstack[{side}]{{" + r" \\ ".join([first, *others]) + "}" if others else first

    columns = "l" + "r" * (len(table.header) - 1)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(table.caption)}}}",
            rf"\label{{tab:{table.name}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(map(escape_latex, table.header)),
            r"\midrule",
            *(line(cell(entry, "r" if i else "l") for i, entry in enumerate(row)) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _replacing(characters: Mapping[str, str]) -> Callable[[str], str]:
    """Each character by its replacement, in one pass; white space becomes one space."""
    pattern = re.compile("|".join(map(re.escape, characters)))

    def replace(text: str) -> str:
        return pattern.sub(lambda found: characters[found[0]], " ".join(text.split()))

    return replace


escape_markdown = _replacing({char: f"\\{char}" for char in r"\|*_`[]<>~$#"} | {"&": "&amp;"})
escape_latex = _replacing(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", MINUS: "$-$", NONE: "---"}
)
