"""`report.html`: one page that says what a run probed, copied, trained and gained.

A single file without scripts or requests: it can be mailed, archived or opened without a network. Figures are inline
SVG with letters drawn as outlines: the same look everywhere, but labels that cannot be searched (the tables can). Long
series are thinned, which bounds the page but may hide a spike of one step. Every input file is optional, and lines
that a crash cut short are skipped. The wording lives in the template.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from adept_ds.base.files import write_text
from adept_ds.base.run_dir import RunDirectory
from adept_ds.report.dial_rows import position_rows
from adept_ds.report.drawing import svg
from adept_ds.report.figures import FIGURES
from adept_ds.report.held_out import answer_rows, dial_rows, loss_rows
from adept_ds.report.run_files import finite, read_run, short


def write_report(run_dir: Path) -> Path:
    """Write a run's report.html from the files beside it; a reader never sees half a page."""
    run, target = read_run(Path(run_dir)), RunDirectory(Path(run_dir)).report
    svgs = {name: svg(name, draw, run) for name, draw in FIGURES.items()}
    write_text(target, environment().get_template("report.html.j2").render(run=run, svgs=svgs))
    return target


def environment() -> Environment:
    """What pages are rendered in."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    # Chainable: a number that a file lacks leaves its place empty instead of costing the page.
    env = Environment(loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True)
    env.filters["short"], env.tests["finite"] = short, finite
    env.globals |= {
        "loss_rows": loss_rows,
        "dial_rows": dial_rows,
        "answer_rows": answer_rows,
        "position_rows": position_rows,
    }
    return env
