"""`adept diagnose`: why a run did not come out as it should."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.cli.forms import JsonOption
from adept_ds.cli.session import run_session, show
from adept_ds.config.loading import load_config
from adept_ds.config.resolved import resolve
from adept_ds.config.schema import Config
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.report.diagnosis import Diagnosis, written
from adept_ds.run.prerequisites import check_diagnosable, check_texts

SequencesOption = Annotated[
    int | None, typer.Option(help="at most so many sequences of each held-out corpus; by default, all evaluated ones")
]


def on_config(config: Config, sequences: SequencesOption = None, as_json: JsonOption = False) -> None:
    """Why a run did not come out as it should: which copy does harm, what held learning back, what to change."""
    if sequences is not None and sequences < 1:
        raise InputError(f"--sequences: {sequences} leaves nothing to look at; give 1 or more")
    launched = rank_from_environment(os.environ)
    check_diagnosable(config)
    settings = resolve(config, "eval", launched.world_size)
    check_texts(config, "eval")
    with run_session(settings, launched, as_json=as_json) as session:
        from adept_ds.run.diagnose import diagnose_stage

        diagnosis = diagnose_stage(session, sequences)
        show(session.terminal, as_json, diagnosis.to_json(), lambda: print_diagnosis(diagnosis, session.terminal))


def on_directory(run_dir: Path, sequences: SequencesOption = None, as_json: JsonOption = False) -> None:
    path = RunDirectory(run_dir).config
    if not path.is_file():
        raise InputError(f"'{run_dir}' has no {path.name}; give the directory of a run, or its CONFIG")
    # It may have been moved since.
    on_config(load_config(path, [f"run_dir={json.dumps(str(run_dir))}"]), sequences, as_json)


def print_diagnosis(diagnosis: Diagnosis, terminal: Terminal) -> None:
    """A row per finding, and what to change."""
    table = Table("", "seen", "change", show_lines=True)
    for finding in diagnosis.findings:
        mark = "[yellow]to blame[/]" if finding.problem else "[dim]fine[/]"
        advice = escape(_typed(finding.settings)) if finding.problem else ""
        change = f"{escape(finding.change or '')}:\n[bold]{advice}[/]" if finding.problem else ""
        table.add_row(f"{finding.topic}\n{mark}", escape(finding.saw), change)
    terminal.console.print(table)


def _typed(settings: dict[str, Any]) -> str:
    """As overrides on a command line."""
    return "\n".join(f"{key}={written(value)}" for key, value in settings.items())
