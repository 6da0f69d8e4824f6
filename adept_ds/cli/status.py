"""`adept status`: what a run, or a study, is at. It reads files alone, and writes none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from adept_ds.base.activity import Bar
from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.cli.forms import JsonOption
from adept_ds.cli.session import show
from adept_ds.report.status import RunStatus, read_status, words_of
from adept_ds.study.status import StudyStatus, is_study, read_study_status

_EVERY = 2.0
"""Seconds between two looks with --watch."""

_COLOURS = {
    "running": "green",
    "stopping": "yellow",
    "silent": "yellow",
    "finished": "green",
    "unfinished": "yellow",
    "stopped": "yellow",
    "failed": "red",
    "killed": "red",
    "not begun": "dim",
}

_GOING_ON = ("running", "stopping", "silent", "not begun")

Rows = list[tuple[str, str]]
"""A word, and rich markup."""


def status(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN|STUDY_DIR", help="directory of a run (run_dir), or of a study (study_dir)")
    ],
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="look again every 2 s, until nobody works there")] = False,
) -> None:
    """What a run is at: stage, step, loss, speed, time left, last checkpoint, who runs it. Reads files alone."""
    terminal = Terminal(sys.stdout)
    if watch and (as_json or not terminal.console.is_terminal):
        raise InputError("--watch: is for a terminal; without it, a program asks with --json as often as it likes")
    read = read_study_status if is_study(directory) else read_status
    found = read(directory)
    if watch:
        _watch(lambda: read(directory), terminal)
        return
    show(terminal, as_json, found.to_json(), lambda: terminal.console.print(_shown(found)))


def _watch(read: Callable[[], RunStatus | StudyStatus], terminal: Terminal) -> None:
    """Ctrl-C ends it as well; the run does not notice."""
    found = read()
    try:
        with Live(_shown(found), console=terminal.console, auto_refresh=False) as live:
            while found.state in _GOING_ON:
                time.sleep(_EVERY)
                found = read()
                live.update(_shown(found), refresh=True)
    except KeyboardInterrupt:
        return


def _shown(found: RunStatus | StudyStatus) -> RenderableType:
    if isinstance(found, RunStatus):
        return _listed([("run", escape(found.run)), _state_row(found), *_run_rows(found)])
    rows = [("study", escape(found.study)), _state_row(found)]
    rows += [("at", _bars_in_words(found.doing))] if found.doing else []
    counts = ", ".join(f"{count} {_coloured(state)}" for state, count in found.counts.items())
    rows += [("cells", counts or "none yet")]
    return Group(_listed(rows), _cells(found)) if found.cells else _listed(rows)


def _listed(rows: Rows) -> Table:
    table = Table.grid(padding=(0, 2))
    for word, text in rows:
        table.add_row(f"[bold cyan]{word}[/]", text)
    return table


def _state_row(found: RunStatus | StudyStatus) -> tuple[str, str]:
    return "state", f"{_coloured(found.state)}: {escape(found.why)}"


def _coloured(state: str) -> str:
    return f"[{_COLOURS[state]}]{state}[/]"


def _run_rows(found: RunStatus) -> Rows:
    rows: Rows = []
    if found.seen_seconds is not None:
        moved = "" if found.moved_seconds is None else f", its work went on {words_of(found.moved_seconds)} ago"
        rows += [("seen", f"{words_of(found.seen_seconds)} ago{moved}")]
    if found.stage or found.doing:
        rows += [("stage", ": ".join(filter(None, (found.stage, _bars_in_words(found.doing)))))]
    if found.steps or found.step:
        of = f" of {found.steps} ({found.step / found.steps:.0%})" if found.steps else ""
        skipped = f", {found.skipped_steps} skipped" if found.skipped_steps else ""
        rows += [("step", f"{found.step}{of}{skipped}")]
    if found.step:
        rate = "" if found.lr is None else f", learning rate {found.lr:.3g}"
        rows += [("loss", f"{'no number' if found.loss is None else f'{found.loss:.4f}'}{rate}")]
    if found.held_out:
        losses = (f"{escape(name)} {held.loss:.4f}" for name, held in found.held_out.items())
        rows += [("held out", f"{', '.join(losses)} (step {max(held.step for held in found.held_out.values())})")]
    if found.tokens_per_second:
        ranks = f" on {found.ranks} ranks" if found.ranks and found.ranks > 1 else ""
        so_far = "" if found.tokens is None else f", {found.tokens:,} tokens so far"
        rows += [("speed", f"{found.tokens_per_second:,.0f} tokens/s{ranks}{so_far}")]
    if found.left_seconds:
        rows += [("left", f"about {words_of(found.left_seconds)} of training")]
    if found.checkpoint is not None:
        age = "" if found.checkpoint_seconds is None else f", written {words_of(found.checkpoint_seconds)} ago"
        rows += [("checkpoint", f"step {found.checkpoint}{age}")]
    if found.guard:
        rows += [("guard", f"ended training: {escape(found.guard)}")]
    if found.done:
        rows += [("done", escape(", ".join(found.done)))]
    return rows


def _bars_in_words(bars: Sequence[Bar]) -> str:
    """From the outermost: 'training 36% (step 180/500), evaluating 40%'."""
    parts = list[str]()
    for bar in bars:
        text = f" ({escape(bar.text)})" if bar.text else ""
        left = f", about {words_of(bar.left_seconds)} left" if bar.left_seconds and bar.title != "training" else ""
        parts.append(f"{escape(bar.title)} {bar.share:.0%}{text}{left}")
    return "; ".join(parts)


def _cells(found: StudyStatus) -> Table:
    table = Table("cell", "state", "step", "loss", "left", "")
    for cell in found.cells:
        step = f"{cell.step}/{cell.steps}" if cell.steps else ""
        loss = "" if cell.loss is None else f"{cell.loss:.4f}"
        left = words_of(cell.left_seconds) if cell.left_seconds and cell.state in _GOING_ON else ""
        said = escape(cell.why) if cell.state in ("failed", "killed", "silent") else ""
        table.add_row(escape(cell.title), _coloured(cell.state), step, loss, left, said)
    return table
