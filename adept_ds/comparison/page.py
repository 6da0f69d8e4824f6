"""`compare.html`: one self-contained page, without scripts or requests; and the other files of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import adept_ds.report
from adept_ds.base.files import write_text
from adept_ds.comparison import wording
from adept_ds.comparison.arms import CRITERIA
from adept_ds.comparison.figures import FIGURES, looks, uses_held_out
from adept_ds.comparison.findings import Findings, compare
from adept_ds.comparison.record import StudyDescription
from adept_ds.comparison.table_texts import latex, markdown
from adept_ds.comparison.tables import pair_tables, tables_of
from adept_ds.comparison.trials import Trial
from adept_ds.comparison.verdicts import condition
from adept_ds.report.drawing import as_file, svg

FIGURE_FOLDER = "figures"
"""For each figure of the page a file."""


def write_comparison(study_dir: Path, description: StudyDescription, trials: Sequence[Trial]) -> Findings:
    """Compare the finished trials of a study; write compare.html, its tables and figures as files, and compare.json.

    Raises:
        InputError: trials cannot be compared; nothing is written then.
    """
    findings = compare(study_dir, description, trials)
    tables = tables_of(findings.comparison).values()
    figures = {name: svg(name, draw, findings) for name, draw in FIGURES.items()}
    texts = {"compare.html": page_of(findings, figures), "tables.md": markdown(tables), "tables.tex": latex(tables)}
    for name, text in texts.items():
        write_text(study_dir / name, text)
    for name, figure in figures.items():
        if figure is not None:
            write_text(study_dir / FIGURE_FOLDER / f"{name}.svg", as_file(figure))
    findings.comparison.save(study_dir / "compare.json")
    return findings


def page_of(findings: Findings, figures: Mapping[str, Markup | None]) -> str:
    folders = [Path(__file__).parent / "templates", Path(adept_ds.report.__path__[0]) / "templates"]
    env = Environment(loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                      lstrip_blocks=True)  # fmt: skip
    comparison = findings.comparison
    shown: dict[str, Any] = {
        "c": comparison,
        "svgs": figures,
        "tables": tables_of(comparison),
        "pairs": pair_tables(comparison),
        "criteria": {criterion.name: condition(criterion) for criterion in CRITERIA},
        "colors": {name: look.color for name, look in looks(comparison.arms).items()},
        "held_out": uses_held_out(findings),
        "wording": wording,
    }
    return env.get_template("compare.html.j2").render(shown)
