"""What a step of each method takes on this machine, measured alone before any cell runs (rates/rates.json)."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from typing import Any

from pydantic import Field

from adept_ds.base.digests import Digest, json_digest
from adept_ds.base.errors import AdeptError
from adept_ds.base.files import write_text
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import MetricsLine, RunSummary, read_log
from adept_ds.base.terminal import Terminal
from adept_ds.config.loading import dump_config, parse_config
from adept_ds.config.schema import Config
from adept_ds.study.budget import Rate, refreshed_every
from adept_ds.study.cells import inputs_of
from adept_ds.study.children import last_words
from adept_ds.study.directory import OUTPUT_LOG
from adept_ds.study.executing import Executor
from adept_ds.study.naming import slug
from adept_ds.study.plan import Plan
from adept_ds.study.shared import SharedWork, probe_seconds
from adept_ds.study.variants import Variant

WARM_UP, MEASURED = 5, 20
"""Steps."""


class MeasuredRate(Record):
    """Of one variant."""

    fingerprint: Digest
    """Of the run that was timed, and of how it was started."""
    rate: Rate
    machine: dict[str, Any]


class Rates(Record):
    """rates.json"""

    variants: dict[str, MeasuredRate] = Field(default_factory=dict)

    @classmethod
    def remedy(cls) -> str:
        return "move it away; rates are measured again, and cells of other lengths follow from them"


def known_rates(plan: Plan) -> dict[str, Rate]:
    """Those that have been measured for just these variants, by name."""
    file = plan.directory.rates / "rates.json"
    measured = Rates.load(file).variants if file.is_file() else {}
    return {
        variant.name: measured[variant.name].rate
        for variant in plan.checked.variants
        if variant.name in measured and measured[variant.name].fingerprint == _fingerprint(plan, variant)
    }


def measure_rates(plan: Plan, executor: Executor, shared: SharedWork, terminal: Terminal) -> dict[str, Rate]:
    """Of all variants; what is known is not measured again.

    Raises:
        AdeptError: a run failed.
        StopRequestedError: see `Executor.execute`.
    """
    known = known_rates(plan)
    for variant in plan.checked.variants:
        if variant.name not in known:
            known[variant.name] = _measure(plan, variant, executor, shared)
            _record(plan, variant, known[variant.name])
            rate = known[variant.name]
            terminal.stage(
                "rate", f"{variant.name}: {rate.step_seconds:.3f} s a step, {rate.before_training:.1f} s before"
            )
    return known


def rate_of(run: RunDirectory) -> Rate:
    """From what a run has written about itself."""
    lines = [line for _, line in read_log(run.metrics, MetricsLine)]
    steps = [line.seconds for line in lines if line.is_step][WARM_UP:]
    refreshes = [line.refresh_seconds for line in lines if line.refresh_seconds is not None and line.step]
    first = sum(line.refresh_seconds or 0.0 for line in lines if not line.step)
    prepared = RunSummary.load(run.summary).preparation_seconds or 0.0
    return Rate(
        step_seconds=statistics.median(steps),
        refresh_seconds=statistics.median(refreshes) if refreshes else 0.0,
        preparation_seconds=prepared + first,
        probe_seconds=probe_seconds(run),
    )


def _measure(plan: Plan, variant: Variant, executor: Executor, shared: SharedWork) -> Rate:
    config = _timed_config(plan, variant)
    run, inputs = RunDirectory(config.run_dir), inputs_of(config, plan.identity)
    if run.root.exists():  # a measurement that was interrupted; times of a resumed run would be others
        shutil.rmtree(run.root)
    shared.take_over(run, inputs)
    write_text(run.config, dump_config(config))
    log = run.root / OUTPUT_LOG
    code = executor.execute(["run", str(run.config)], log)
    if code:
        raise AdeptError(f"{variant.origin}: measuring its rate failed: {last_words(log)}; all of it is in '{log}'")
    shared.keep(run, inputs)
    for weights in (run.checkpoints, run.export, run.expanded):
        shutil.rmtree(weights, ignore_errors=True)
    return rate_of(run)


def _timed_config(plan: Plan, variant: Variant) -> Config:
    """As a cell's, a few steps long, with one refresh at least, and without evaluation."""
    config = plan.config(variant, variant.rates[0], plan.study.seeds.search[0], WARM_UP + MEASURED)
    tree = config.model_dump(mode="json")
    tree["run_dir"] = str(plan.directory.rates / slug(variant.name))
    tree["data"] |= {"general_eval": [], "domain_eval": []}
    tree["eval"] = {}
    tree["guard"] = None  # it looks at held-out text
    tree["train"] |= {"checkpoint_every": WARM_UP + MEASURED, "eval_every": WARM_UP + MEASURED}
    if (every := refreshed_every(config)) is not None:
        tree["importance"]["every"] = min(every, (WARM_UP + MEASURED) // 2)
    return parse_config(tree, variant.origin)


def _fingerprint(plan: Plan, variant: Variant) -> str:
    inputs = inputs_of(_timed_config(plan, variant), plan.identity)
    return json_digest([inputs, plan.study.ranks, plan.study.threads])


def _record(plan: Plan, variant: Variant, rate: Rate) -> None:
    file = plan.directory.rates / "rates.json"
    earlier = Rates.load(file).variants if file.is_file() else {}
    machine = {"host": platform.node(), "processor": platform.machine(), "cores": os.cpu_count()}
    machine |= {"ranks": plan.study.ranks, "threads": plan.study.threads}
    found = MeasuredRate(fingerprint=_fingerprint(plan, variant), rate=rate, machine=machine)
    Rates(variants=earlier | {variant.name: found}).save(file)
