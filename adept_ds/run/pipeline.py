"""All stages, in order. A stage reads files and writes files; it is not run again while its inputs are the same.

probe -> layer_importance.json (or place_benefits.json) -> expand -> expanded/ -> train -> checkpoints/ -> export
-> export/ -> eval -> evaluation.json -> report -> report.html; and where a known failure shows, diagnosis.html. Methods
that train in place expand nothing. With a section `dial`, what was trained is exported to trained/; -> dial ->
dial.json, and export/ is made of trained/ at the position that was chosen.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.dial_record import DialRecord
from adept_ds.base.files import write_text
from adept_ds.base.progress import stage
from adept_ds.config.loading import dump_config
from adept_ds.methods.shape import method_of
from adept_ds.run.context import Context
from adept_ds.run.diagnose import diagnose_if_it_failed
from adept_ds.run.dial import check_dial_texts, dial_stage
from adept_ds.run.evaluate import eval_stage
from adept_ds.run.expand import expand_stage
from adept_ds.run.export import export_stage, export_trained, export_turned
from adept_ds.run.going_on import check_can_go_on
from adept_ds.run.guard import check_guard_texts
from adept_ds.run.places import places_stage
from adept_ds.run.probe import probe_stage
from adept_ds.run.score_tasks import check_harness
from adept_ds.run.train import train_stage


def run_all(run: Context) -> None:
    """All of them; inputs are packed first, where most mistakes show."""
    _ = run.precision  # refuses what the device cannot, before anything takes time
    check_can_go_on(run)
    run.ranks.on_main(lambda: write_text(run.run_dir.config, dump_config(run.settings.config)))
    prepare_data(run)
    check_dial_texts(run)
    check_guard_texts(run)
    check_harness(run)
    if run.settings.config.weighs_places:
        places_stage(run)
    elif run.settings.config.needs_probe:
        probe_stage(run)
    if method_of(run.settings.config).makes_copies:
        expand_stage(run)
    train_stage(run)
    if run.settings.config.dial is None:
        export_stage(run)
    else:
        export_at_best(run)
    eval_stage(run)
    report_stage(run)
    diagnose_if_it_failed(run)


def export_at_best(run: Context) -> DialRecord:
    """Export what was trained, choose a position of the dial for it, and export that."""
    export_trained(run)
    record = dial_stage(run)
    export_turned(run, record.chosen)
    return record


@stage("data")
def prepare_data(run: Context) -> None:
    """Tokenise and pack every corpus of the run."""
    counts = run.corpora.prepare()
    run.terminal.stage("data", ", ".join(f"{name} {count}" for name, count in counts.items()) + " blocks")


@stage("report")
def report_stage(run: Context) -> Path:
    """The page about what the run has written so far."""
    from adept_ds.report.page import write_report  # matplotlib takes a second, on rank 0 alone

    path = run.ranks.on_main(lambda: write_report(run.run_dir.root))
    run.terminal.stage("report", str(path))
    return path
