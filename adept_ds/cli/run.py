"""The commands on a configuration: one stage each, or all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import OutputCapture, Terminal
from adept_ds.cli.dial import AlphaOption, parse_alphas
from adept_ds.cli.evaluation_tables import print_evaluation
from adept_ds.cli.forms import JsonOption
from adept_ds.cli.options import (
    LmEvalOption,
    MethodOption,
    ResultOption,
    TasksOption,
    check_result_file,
    with_method,
    with_tasks,
)
from adept_ds.cli.probe import check_method, probe_and_show, weigh_and_show
from adept_ds.cli.session import run_session, show
from adept_ds.cli.summary import (
    describe_plan,
    print_summary,
)
from adept_ds.config.decaying import OPTION, decayed
from adept_ds.config.loading import dump_config
from adept_ds.config.resolved import Purpose, ResolvedConfig, resolve
from adept_ds.config.run_directory import check_run_dir
from adept_ds.config.schema import Config
from adept_ds.ranks.launchers import LaunchedRank, rank_from_environment
from adept_ds.report.presence import check_something_to_report
from adept_ds.run.prerequisites import check_decays, check_ready, check_texts


def run(config: Config) -> None:
    """Everything: probe, expand, train, export, evaluate, report. Run it again to resume."""
    with run_session(*_resolved(config, "run")) as session:
        from adept_ds.run.pipeline import run_all

        run_all(session)
        if session.ranks.is_main:
            print_summary(session.run_dir, session.terminal, dialled=config.dial is not None)


def probe(config: Config, method: MethodOption = None, out: ResultOption = None, as_json: JsonOption = False) -> None:
    """Which layers does general competence hardly need? Or, by expand.choose: gain, where would copies do most?"""
    check_result_file(out)
    check_method(config, method)
    with run_session(*_resolved(with_method(config, method), "probe"), as_json=as_json) as session:
        from adept_ds.run.pipeline import report_stage

        if config.weighs_places:
            weigh_and_show(session, out, as_json)
            report_stage(session)  # with the plot
        elif probe_and_show(session, method, out, as_json):
            report_stage(session)  # with the plot


def expand(config: Config, as_json: JsonOption = False) -> None:
    """Insert identity copies of layers: the expanded model computes exactly the same function."""
    with run_session(*_resolved(config, "expand"), as_json=as_json) as session:
        from adept_ds.run.expand import expand_stage

        show(session.terminal, as_json, expand_stage(session).to_json())


def train(
    config: Config,
    decay_from: Annotated[
        int | None,
        typer.Option(help="with train.schedule: wsd: let the learning rate fall to 0 from the checkpoint of this step"),
    ] = None,
    decay_dir: Annotated[Path | None, typer.Option(help="run directory of the decay (RUN_DIR/decay_from_STEP)")] = None,
) -> None:
    """Train the copies of an expanded model, from the newest checkpoint if there is one."""
    if decay_from is None and decay_dir is not None:
        raise InputError(f"--decay-dir: '{decay_dir}' has no effect without {OPTION}; give the step of a checkpoint")
    branch = config if decay_from is None else decayed(config, decay_from, decay_dir)
    ready = partial(check_ready, config, "train") if decay_from is None else partial(check_decays, config, decay_from)
    with run_session(*_resolved(branch, "train", ready)) as session:
        from adept_ds.run.decay import begin_branch
        from adept_ds.run.train import train_stage

        if decay_from is not None:
            begin_branch(session, config, decay_from)
        train_stage(session)


def evaluate(
    config: Config, tasks: TasksOption = None, lm_eval: LmEvalOption = None, as_json: JsonOption = False
) -> None:
    """Held-out loss, and scores on tasks: of the base and the adapted model of a run, or of one model directory."""
    with run_session(*_resolved(with_tasks(config, tasks, lm_eval), "eval"), as_json=as_json) as session:
        from adept_ds.run.evaluate import eval_stage
        from adept_ds.run.score_tasks import check_harness

        check_harness(session)
        results = eval_stage(session)
        show(session.terminal, as_json, results, lambda: print_evaluation(results, session.terminal))


def export(
    config: Config,
    step: Annotated[
        int | None,
        typer.Option(
            help="which checkpoint (with CONFIG; by default the newest, or the best where the guard has ended training)"
        ),
    ] = None,
    alpha: AlphaOption = None,
) -> None:
    """Turn a training checkpoint into a Hugging Face directory; or an adapted model down, towards its base."""
    alphas = parse_alphas(alpha)
    with run_session(*_resolved(config, "export", partial(check_ready, config, "export", step))) as session:
        from adept_ds.run.export import export_stage

        export_stage(session, step, alphas)


def report(config: Config) -> None:
    """Write report.html from what a run has written so far."""
    check_something_to_report(config.run_dir)
    from adept_ds.report.page import write_report

    Terminal(sys.stdout).say(str(write_report(config.run_dir)))


def show_plan(config: Config, as_json: JsonOption = False) -> None:
    """The resolved configuration, and what `adept run` would do."""
    settings, _ = _resolved(config, "run")
    plan, terminal = describe_plan(settings), Terminal(sys.stdout)
    facts = {"config": config.model_dump(mode="json"), "plan": plan}
    show(terminal, as_json, facts, lambda: terminal.say(dump_config(config) + "\n".join(plan)))


def _resolved(
    config: Config, purpose: Purpose, ready: Callable[[], object] | None = None
) -> tuple[ResolvedConfig, LaunchedRank]:
    """Everything that can be checked before ranks meet is.

    Args:
        ready: checks what is there to begin with; by default by `purpose` alone.
    """
    launched = rank_from_environment(os.environ)
    if launched.world_size == 1:  # of several ranks the first one looks, when they have met (see `run.ledger`)
        (ready or partial(check_ready, config, purpose))()
    settings = resolve(config, purpose, launched.world_size)
    check_texts(config, purpose)
    check_run_dir(config, settings.model.path)
    if settings.deepspeed is not None and config.deepspeed is not None:
        _check_by_deepspeed(config.deepspeed, settings.deepspeed, config.train.precision)
    return settings, launched


def _check_by_deepspeed(path: Path, ds_config: dict[str, Any], precision: str) -> None:
    """Last of all: it takes seconds to import, and says so on the terminal."""
    silence = OutputCapture(Path(os.devnull), is_main=False)
    try:
        from adept_ds.zero.user_config import check_user_config

        check_user_config(path, ds_config, precision)
    finally:
        silence.restore()
