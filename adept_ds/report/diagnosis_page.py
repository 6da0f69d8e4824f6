"""`diagnosis.html`: one self-contained page that says what went wrong in a run, shows it, and says what to change."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from adept_ds.base.files import write_text
from adept_ds.base.run_dir import RunDirectory
from adept_ds.report import figures
from adept_ds.report.diagnosis import Diagnosis, written
from adept_ds.report.diagnosis_figures import FIGURES
from adept_ds.report.drawing import svg
from adept_ds.report.page import environment
from adept_ds.report.run_files import read_run


def write_page(run_dir: Path, diagnosis: Diagnosis) -> Path:
    """Write a run's diagnosis.html; a reader never sees half a page.

    Raises:
        InputError: a record of the run is damaged.
    """
    target = RunDirectory(run_dir).diagnosis_page
    shown = {"d": diagnosis, "svgs": _svgs(run_dir, diagnosis), "name": run_dir.resolve().name, "written": written}
    write_text(target, environment().get_template("diagnosis.html.j2").render(shown))
    return target


def _svgs(run_dir: Path, diagnosis: Diagnosis) -> dict[str, Markup | None]:
    found = {name: svg(name, draw, diagnosis) for name, draw in FIGURES.items()}
    if diagnosis.layers:  # the report's own figure
        found["important_layer"] = svg("important_layer", figures.FIGURES["layers"], read_run(run_dir))
    return found
