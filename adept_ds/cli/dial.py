"""`adept dial`: how far what a run learned is turned up, and `--alpha` of the commands that write models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from adept_ds.base.dial_record import DialRecord, HalfLosses
from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.cli.forms import JsonOption
from adept_ds.cli.session import run_session, show
from adept_ds.config.loading import load_config
from adept_ds.config.resolved import resolve
from adept_ds.config.run_directory import check_run_dir
from adept_ds.config.schema import Config
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.run.prerequisites import check_ready, check_texts

TargetArg = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML configuration, or the directory of a run")]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, dotted: dial.confidence=0.9")
]
KeepGeneralOption = Annotated[
    str | None,
    typer.Option("--keep-general", metavar="NATS", help="by so much general loss may rise (dial.max_general_rise)"),
]
AlphaOption = Annotated[
    str | None,
    typer.Option("--alpha", help="how far to turn up what was learned, 0 to 1: one for all copies, or 1,0.5,... each"),
]


def dial(
    target: TargetArg,
    overrides: OverridesArg = None,
    keep_general: KeepGeneralOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a trained run at the position that learned most without losing more general competence than allowed."""
    config = _config(target, overrides or [], keep_general)
    launched = rank_from_environment(os.environ)
    if launched.world_size == 1:
        check_ready(config, "dial")
    settings = resolve(config, "dial", launched.world_size)
    check_texts(config, "dial")
    check_run_dir(config, settings.model.path)
    with run_session(settings, launched, as_json=as_json) as session:
        from adept_ds.run.pipeline import export_at_best, report_stage

        record = export_at_best(session)
        report_stage(session)
        if session.run_dir.evaluation.is_file():
            session.terminal.stage("eval", "[dim]of the export as it is now: `adept eval` on the same configuration[/]")
        show(session.terminal, as_json, record.to_json(), lambda: print_dial(record, session.terminal))


def parse_alphas(text: str | None) -> list[float] | None:
    """What `--alpha` says. Raises `InputError`."""
    if text is None:
        return None
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--alpha: '{text}' is no list of numbers; write for example --alpha 0.5") from None
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise InputError(f"--alpha: '{text}' leaves the way from the base to what was trained; use 0 to 1")
    return alphas


def print_dial(record: DialRecord, terminal: Terminal) -> None:
    """A row per position, on test documents; then the promise."""
    table = Table(
        "alpha",
        "domain loss",
        "change",
        "general rise",
        f"{100 * record.confidence:g}% limit",
        "",
        title="test documents",
    )
    for position in record.positions:
        test, chosen = position.test, position.alphas == record.chosen
        mark = "[green]chosen[/]" if chosen else "" if position.keeps else "[dim]breaks the promise[/]"
        table.add_row(position.label, f"{test.domain.loss:.4f}", f"{test.domain.rise:+.4f}", *_of_worst(test), mark)
    terminal.console.print(table)
    terminal.console.print(f"[bold]{escape(record.promise)}[/]", soft_wrap=True)


def _of_worst(half: HalfLosses) -> tuple[str, str]:
    worst = half.general[half.worst]
    return f"{worst.rise:+.4f}", f"{worst.limit:+.4f}"


def _config(target: Path, overrides: list[str], keep_general: str | None) -> Config:
    """With a section `dial`, that of the command line over that of the file."""
    given = list(overrides)
    if keep_general is not None:
        given.append(f"dial.max_general_rise={keep_general}")
    path = target
    if target.is_dir():
        path = RunDirectory(target).config
        if not path.is_file():
            raise InputError(f"'{target}' has no {path.name}; give the directory of a run, or its CONFIG")
        given.insert(0, f"run_dir={json.dumps(str(target))}")  # it may have been moved since
    config = load_config(path, given)
    return config if config.dial is not None else load_config(path, [*given, "dial={}"])
