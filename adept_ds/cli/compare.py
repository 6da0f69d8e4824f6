"""`adept compare STUDY.yaml`: methods side by side."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adept_ds.base.activity import Teller
from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.files import json_text, remove_abandoned_files
from adept_ds.base.terminal import Terminal
from adept_ds.base.writer_lock import WriterLock
from adept_ds.cli.forms import JsonOption
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.ranks.stopping import StopRequest

if TYPE_CHECKING:
    from adept_ds.study.plan import CheckedStudy, Plan
    from adept_ds.study.running import StudyState

StudyArg = Annotated[Path, typer.Argument(metavar="STUDY", help="YAML description of the study")]
StudyOverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, dotted: seeds.confirm=[1,2,3]")
]
ScaleOption = Annotated[
    float, typer.Option(min=1e-6, max=1e9, help="times the budget, held-out text and what is counted in steps")
]
OnlyOption = Annotated[
    list[str] | None, typer.Option(metavar="LABEL", help="run this method alone; may be given several times")
]

CellOption = Annotated[
    str | None,
    typer.Option(metavar="PHASE:INDEX", help="make a cell ready and print its configuration; for jobs of --submit"),
]


def compare(
    study: StudyArg,
    overrides: StudyOverridesArg = None,
    scale: ScaleOption = 1.0,
    only: OnlyOption = None,
    report: Annotated[bool, typer.Option("--report", help="write the page from what is there, run nothing")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="as jobs of a Slurm cluster")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be run or submitted")] = False,
    stop_on_failure: Annotated[bool, typer.Option("--stop-on-failure", help="end with the first that fails")] = False,
    cell: CellOption = None,
    as_json: JsonOption = False,
) -> None:
    """Methods side by side, on equal terms: each learning rate and seed a run, one page about all. Again to resume."""
    from adept_ds.study.plan import check_study
    from adept_ds.study.schema import load_study

    if rank_from_environment(os.environ).world_size > 1:
        raise InputError("compare starts the ranks of its runs itself; start it once, and set ranks: in the study")
    if sum((report, submit, dry_run and not submit)) > 1:
        raise InputError("--report, --submit and --dry-run: --report goes with neither of the others; leave it out")
    checked = check_study(load_study(study, overrides or ()), study, scale, overrides or ())
    _check_labels(checked, only or [])
    logging.captureWarnings(True)
    terminal = Terminal(sys.stdout)
    if as_json or cell is not None:
        terminal.mute()
    lock = WriterLock(checked.directory.lock, "study_dir")
    with StopRequest(lock.ends).listening() as stop:
        session = _Session(checked, scale, only or [], terminal, stop, lock, as_json)
        if cell is not None:
            session.show_cell(cell)
        elif submit:
            session.submit(dry_run=dry_run)
        elif dry_run:
            session.show_plan()
        elif report:
            session.write_page()
        else:
            session.run(stop_on_failure=stop_on_failure)


def _check_labels(checked: CheckedStudy, only: list[str]) -> None:
    labels = [entry.title for entry in checked.study.methods]
    for label in only:
        if label not in labels:
            raise InputError(f"--only: '{label}' is no method of the study; choose of {', '.join(labels)}")


class _Session:
    """A command on a checked study."""

    def __init__(
        self,
        checked: CheckedStudy,
        scale: float,
        only: list[str],
        terminal: Terminal,
        stop: StopRequest,
        lock: WriterLock,
        as_json: bool,
    ) -> None:
        self._checked, self._scale, self._only, self._as_json = checked, scale, only, as_json
        self._terminal, self._stop, self._lock = terminal, stop, lock

    def run(self, *, stop_on_failure: bool) -> None:
        from adept_ds.study.executing import Executor
        from adept_ds.study.rates import measure_rates
        from adept_ds.study.running import StudyRun

        study = self._checked.study
        directory = self._checked.directory
        with (
            self._lock.held(partial(self._terminal.waiting, "compare")),
            Teller(directory.activity, self._lock, ranks=1),
        ):
            remove_abandoned_files(directory.root)
            plan = self._plan()
            executor = Executor(study.ranks, study.threads, self._stop)
            state = self._state(plan)
            if self._checked.tells_time:
                plan.rates = measure_rates(plan, executor, state.shared, self._terminal)
            self._say_strangers(plan)
            run = StudyRun(state, executor, self._terminal, stop_on_failure)
            run.run()
            if any(cell.is_finished for cell in state.search):
                self._finish(state)
            if run.failed:
                names = "; ".join(cell.title for cell in run.failed)
                raise AdeptError(f"{len(run.failed)} cells failed: {names}; the same command tries them again")

    def write_page(self) -> None:
        plan = self._plan()
        self._use_known_rates(plan)
        state = self._state(plan)
        state.tidy()
        self._finish(state)

    def show_plan(self) -> None:
        from adept_ds.study.planned import planned

        plan = self._plan()
        self._use_known_rates(plan, required=False)
        found = planned(self._state(plan))
        self._show(found.to_json(), "\n".join(found.lines()))

    def submit(self, *, dry_run: bool) -> None:
        from adept_ds.study.submission import submit

        plan = self._plan()
        self._use_known_rates(plan)
        submitted = submit(self._state(plan), dry_run=dry_run)
        self._show(submitted.to_json(), "\n".join(submitted.lines()))

    def show_cell(self, address: str) -> None:
        """The configuration of a cell of a submitted study, made ready to run; nothing where there is none to run."""
        from adept_ds.study.submission import cell_at

        plan = self._plan()
        self._use_known_rates(plan)
        config = cell_at(self._state(plan), address)
        self._show({"config": config}, config or "")

    def _plan(self) -> Plan:
        from adept_ds.study.plan import Plan

        return Plan(self._checked, self._terminal, self._stop)

    def _state(self, plan: Plan) -> StudyState:
        from adept_ds.study.overlaps import overlaps_of
        from adept_ds.study.running import StudyState

        data = plan.example(self._checked.variants[0]).data
        overlaps = overlaps_of(plan.texts, plan.other_texts, data, plan.directory.data, plan.identity, self._terminal)
        return StudyState(plan, self._scale, overlaps, self._only)

    def _use_known_rates(self, plan: Plan, *, required: bool = True) -> None:
        from adept_ds.study.rates import known_rates

        if self._checked.tells_time:
            plan.rates = known_rates(plan)
            missing = [variant.name for variant in self._checked.variants if variant.name not in plan.rates]
            if missing and required and self._checked.study.budget.seconds is not None:
                name = missing[0]
                raise InputError(f"budget.seconds: the rate of {name} is not known; `adept compare STUDY` measures it")

    def _say_strangers(self, plan: Plan) -> None:
        strangers = plan.strangers()
        if strangers:
            what = f"{len(strangers)} of an earlier version of the study stay where they are, such as"
            self._terminal.stage("cells", f"{what} '{strangers[0].name}'")

    def _finish(self, state: StudyState) -> None:
        findings = state.write_page()
        page = state.plan.directory.page
        for sentence in findings.comparison.warnings:
            self._terminal.stage("warning", sentence)
        failed = {cell.run.root.name: failure.reason for cell, failure in state.failed().items()}
        finished = sum(cell.is_finished for cell in state.cells())
        self._show({"page": str(page), "finished": finished, "failed": failed}, str(page))

    def _show(self, facts: dict[str, Any], text: str) -> None:
        if self._as_json:
            self._terminal.console.print_json(json_text(facts))
        else:
            self._terminal.say(text)
