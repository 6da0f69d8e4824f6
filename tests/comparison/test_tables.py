"""Tables: the numbers of compare.json, in a form that Markdown and LaTeX take for tables, whatever stands in them."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest

from adept_ds.comparison import wording
from adept_ds.comparison.record import Comparison
from adept_ds.comparison.table_texts import escape_latex, escape_markdown, latex, markdown
from adept_ds.comparison.tables import Entry, Table, pair_tables, tables_of

NASTY = Table("t", "a | b_c & 50%", ["x_1", "y|z", "\\w"], [[Entry("a|b"), Entry("<c>", ("d_e",), True), Entry("$f$")]])


@pytest.fixture(scope="module")
def comparison(study_dir: Path) -> Comparison:
    return Comparison.load(study_dir / "compare.json")


def cells_of(line: str) -> list[str]:
    """Of a row in Markdown: what stands between bars that are not escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_table_is_one_in_markdown_and_in_latex(study_dir: Path, comparison: Comparison) -> None:
    tables = tables_of(comparison).values()
    text = (study_dir / "tables.md").read_text()
    assert text == markdown(tables)
    assert (study_dir / "tables.tex").read_text() == latex(tables)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(tables)
    for block, table in zip(blocks, tables, strict=True):
        assert {len(cells_of(line)) for line in block} == {len(table.header)}
        assert len(block) == 2 + len(table.rows)


def test_losses_are_means_over_the_seeds_of_the_chosen_rate(comparison: Comparison) -> None:
    table = tables_of(comparison)["losses"]
    place = table.header.index("domain: mondo")
    for row in table.rows[1:]:
        plain = next(arm for arm in comparison.arms if arm.name == row[0].text).chosen["plain"]
        assert plain is not None
        trials = [trial for trial in comparison.trials if (trial.arm, trial.lr) == (row[0].text, plain.lr)]
        assert len(trials) == 3
        expected = fmean(trial.losses["1"]["domain"]["test/mondo"] for trial in trials)
        assert row[place].text == wording.nats(expected)
        assert expected == pytest.approx(plain.domain_loss)


def test_scores_on_tasks_are_means_over_seeds_by_the_measure_that_counts_lengths(comparison: Comparison) -> None:
    def scores(share: float, loss: float) -> dict[str, dict[str, float]]:
        return {"quiz": {"acc": 0.9, "acc_norm": share, "acc_norm_stderr": 0.1}, "web": {"bits": loss}}

    assert "tasks" not in tables_of(comparison)
    trials = [trial.model_copy(update={"scores": {"1": scores(0.1 * trial.seed, 2.0)}}) for trial in comparison.trials]
    asked = comparison.model_copy(update={"base_scores": scores(0.25, 1.5), "trials": trials})
    table = tables_of(asked)["tasks"]
    assert table.header == ["method", "quiz: acc_norm", "web: bits"]
    assert table.rows[0] == [Entry("base"), Entry("25.0%"), Entry("1.5")]
    rows = [[Entry("10.0%", (wording.points(-0.15),)), Entry("2", ("+0.500",))]] * len(comparison.arms)
    assert [row[1:] for row in table.rows[1:]] == rows


def test_bold_differences_are_those_that_are_told_apart(comparison: Comparison) -> None:
    table = tables_of(comparison)["differences"]
    better = {(pair.criterion, pair.first, pair.second) for pair in comparison.differences if pair.better}
    for row in table.rows:
        for entry, criterion in zip(row[1:], pair_tables(comparison), strict=True):
            names = (criterion, row[0].text, comparison.reference), (criterion, comparison.reference, row[0].text)
            assert entry.strong == bool(better & set(names))


def test_all_pairs_are_antisymmetric(comparison: Comparison) -> None:
    for table in pair_tables(comparison).values():
        values = [[entry.text for entry in row[1:]] for row in table.rows]
        for i, row in enumerate(values):
            assert row[i] == wording.NONE
            for j, text in enumerate(row):
                there = values[j][i]
                unsigned = text in (wording.NONE, "0.000")
                assert text == there if unsigned else (text[1:] == there[1:] and text[0] != there[0])


def test_names_do_not_break_a_table_in_markdown() -> None:
    caption, _, header, _, row, *_ = markdown([NASTY]).splitlines()
    assert caption == r"a \| b\_c &amp; 50%"
    assert cells_of(header) == [r"x\_1", r"y\|z", r"\\w"]
    assert cells_of(row) == [r"a\|b", r"**\<c\>**<br>d\_e", r"\$f\$"]


def test_names_do_not_break_a_table_in_latex() -> None:
    text = latex([NASTY])
    assert r"\caption{a | b\_c \& 50\%}" in text
    assert r"x\_1 & y|z & \textbackslash{}w \\" in text
    assert r"a|b & \shortstack[r]{\textbf{\textless{}c\textgreater{}} \\ d\_e} & \$f\$ \\" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("escape", [escape_markdown, escape_latex])
def test_a_name_stays_on_its_line(escape: object) -> None:
    assert callable(escape)
    assert escape("a\n\n b\r\nc") == "a b c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.change(-0.0316), "\N{MINUS SIGN}0.032"),
        (wording.excess(0.0002), "less than 0.001"),
        (wording.duration(95.2), "95 s"),
        (wording.duration(5400), "90 min"),
        (wording.size(1.26e9), "1.26 GB"),
        (wording.count(61_440), "61.4 k"),
        (wording.percent(None), wording.NONE),
        (wording.percent(1, 8), "12.5%"),
        (wording.rate(2e-4), "2e-4"),
    ],
)
def test_numbers_are_worded(text: str, expected: str) -> None:
    assert text == expected
