"""What a run leaves behind and reads again: to go on, to export, to evaluate, to report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harness.fuzzing import Fuzzing, Kind, Sandbox, file_kind, mostly_quick, name_of
from harness.launching import adept
from harness.mutations import changed_json, changed_lines, changed_safetensors, spoiled
from harness.packing import text_source, tokenisation, write_texts
from harness.trained_run import TrainedRun
from harness.undrawn import undrawn
from harness.workspace import Workspace

from adept_ds.base.digests import FileDigests
from adept_ds.base.files import write_json
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.cli.summary import print_summary
from adept_ds.config.loading import load_config
from adept_ds.config.resolved import resolve
from adept_ds.data.packing import Packing
from adept_ds.data.streaming import WindowMaker
from adept_ds.data.tokens import tokens_of
from adept_ds.deltas.operations import pack_copies
from adept_ds.probing.scores import LayerScores
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.report.page import write_report
from adept_ds.run.context import Context
from adept_ds.run.pipeline import run_all
from adept_ds.training.run_log import RunLog
from adept_ds.weights.export import export_checkpoint

STREAM_TEXTS = ["the norm of x is zero"] * 12


def prepare(sandbox: Sandbox) -> Sandbox:
    """A finished run; and a corpus whose tokens are kept, whole and in windows."""
    time.sleep(2.1)  # what has just been written is not remembered in digests.json
    trained = TrainedRun(Workspace(sandbox.inputs), RunDirectory(sandbox.inputs / "run"))
    config = trained.config()
    result = adept(1, "run", config)
    assert result.returncode == 0, result.stderr
    text = config.read_text().replace(str(trained.files.root), str(sandbox.out / "run"))
    config.write_text(text)
    write_texts(sandbox.inputs / "stream.jsonl", *STREAM_TEXTS)
    cache = sandbox.inputs / "cache"
    cache.mkdir()
    use_cache(sandbox, cache)
    found = {path.name: path for path in cache.rglob("*.json*")}
    shutil.copy(found["windows.jsonl"], sandbox.inputs / "windows.jsonl")
    whole = next(path for path in cache.rglob("manifest.json") if "stream" not in str(path))
    shutil.copy(whole, sandbox.inputs / "manifest.json")
    shutil.copy(sandbox.inputs / "run" / "cache" / "digests.json", sandbox.inputs / "digests.json")
    methods = {name: {"deltas": [0.1, 0.2], "selected": [0], "seconds": 1.5} for name in ("mask", "fisher")}
    write_json(trained.files.layer_methods, {"methods": methods, "spearman": {"fisher": 0.5}})
    return sandbox


class WorkBeginsError(Exception):
    """All files are read; now a model would be loaded."""


DEEPSPEED_FILES = (
    "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
)

ENGINES = (
    "adept_ds.run.train.build_training_engine",
    "adept_ds.run.loaded.build_forward_engine",
    "adept_ds.probing.estimators.build_forward_engine",
)


@contextmanager
def without_engines() -> Iterator[None]:
    """The figures of the report have kinds of their own."""
    with ExitStack() as stack:
        stack.enter_context(suppress(WorkBeginsError))
        for place in ENGINES:
            stack.enter_context(mock.patch(place, side_effect=WorkBeginsError))
        stack.enter_context(mock.patch("adept_ds.run.pipeline.report_stage"))
        yield


def copied_run(sandbox: Sandbox) -> RunDirectory:
    shutil.copytree(sandbox.inputs / "run", sandbox.out / "run")
    return RunDirectory(sandbox.out / "run")


def go_on(sandbox: Sandbox) -> None:
    """`adept run` on the finished run, up to where a model would be loaded again; and what it says at its end."""
    files = copied_run(sandbox)
    settings = resolve(load_config(sandbox.inputs / "run.yaml"), "run")
    with without_engines():
        run_all(Context.of(settings, Ranks(), Terminal(None), StopRequest()))
    print_summary(files, Terminal(None))


def log_on(sandbox: Sandbox) -> None:
    """As training that goes on after step 2 does."""
    files = copied_run(sandbox)
    RunLog(files, 2, "").close()


def pack(sandbox: Sandbox) -> None:
    pack_copies(copied_run(sandbox).root, sandbox.out / "package", name="packed")


def report(sandbox: Sandbox) -> None:
    write_report(copied_run(sandbox).root)


def report_undrawn(sandbox: Sandbox) -> None:
    with undrawn():
        report(sandbox)


def export(sandbox: Sandbox) -> None:
    """From the newest checkpoint, as its files say which that is."""
    files = RunDirectory(sandbox.inputs / "run")
    export_checkpoint(files.expanded, files.checkpoints, sandbox.out / "exported")


def load_scores(sandbox: Sandbox) -> None:
    scores = LayerScores.load(sandbox.inputs / "run" / "layer_scores.safetensors")
    scores.base_loss, scores.deltas, scores.replicates(0), scores.halves()  # computed when asked for


def use_cache(sandbox: Sandbox, cache: Path) -> None:
    """Tokens and windows that were made before are used again, or made anew."""
    source = text_source([sandbox.inputs / "stream.jsonl"])
    how = tokenisation(sandbox.inputs / "model", cache)
    tokens_of(source, how, Ranks())
    maker = WindowMaker(source, how, Packing(8), window_tokens=64)
    for block in (0, 20):
        maker.covering(block)
    if maker._coming is not None:
        maker._coming.result()


def cached(name: str) -> Callable[[Sandbox], None]:
    """With the changed file in its place in the cache."""

    def read(sandbox: Sandbox) -> None:
        cache = shutil.copytree(sandbox.inputs / "cache", sandbox.out / "cache")
        for path in cache.rglob(name):
            if ("stream" in str(path)) == (name == "windows.jsonl"):
                shutil.copy(sandbox.inputs / name, path)
        use_cache(sandbox, cache)

    return read


def use_digests(sandbox: Sandbox) -> None:
    shutil.copy(sandbox.inputs / "digests.json", sandbox.out / "digests.json")
    digests = FileDigests(sandbox.out / "digests.json")
    corpus = sandbox.inputs / "domain.jsonl"
    assert digests.file(corpus) == FileDigests(sandbox.out / "none").file(corpus)


def run_kind(file: str, change: Any, read: Callable[[Sandbox], None] = go_on, weight: float = 0.1, **more: Any) -> Kind:
    return file_kind(f"run/{file}", change, read, names=("run_dir", "run/"), weight=weight, **more)


run_made_again = partial(run_kind, never_refused=True)
"""Of what a run that goes on makes again."""


def report_kind(file: str) -> Kind:
    """Lines that tell nothing are left out of the figures, and the configuration is shown as it is."""
    change = {".json": changed_json, ".jsonl": changed_lines, ".yaml": spoiled}[Path(file).suffix]
    shown = not file.endswith(".json")
    return run_kind(file, change, report_undrawn, 0.2, name=f"report of {file}", never_refused=shown)


REPORTED = (
    *("layer_importance.json", "metrics.jsonl", "unit_importance.jsonl", "unit_movement.jsonl", "layer_methods.json"),
    *("evaluation.json", "summary.json", "expanded/expansion.json", "config.yaml"),
)

KINDS = [
    run_made_again("stages.json", changed_json),
    run_made_again("layer_importance.json", changed_json),
    run_made_again("layer_scores.safetensors", changed_safetensors),
    run_kind("layer_scores.safetensors", changed_safetensors, load_scores, 0.6, name="layer scores, computed with"),
    run_kind("metrics.jsonl", changed_lines),
    run_kind("metrics.jsonl", changed_lines, log_on, 0.2, name="metrics, resumed"),
    run_kind("unit_importance.jsonl", changed_lines, log_on, 0.2, name="unit importance, resumed"),
    run_kind("unit_movement.jsonl", changed_lines, log_on, 0.2, name="unit movement, resumed"),
    run_kind("evaluation.json", changed_json),
    run_kind("evaluation.json", changed_json, pack, 0.3, name="evaluation, packed"),
    run_made_again("summary.json", changed_json),
    run_kind("summary.json", changed_json, pack, 0.3, name="summary, packed"),
    run_made_again("expanded/expansion.json", changed_json),
    run_made_again("expanded/base_files.json", changed_json),
    run_made_again("checkpoints/step_4/manifest.json", changed_json),  # by going on from the checkpoint before it
    run_kind("checkpoints/latest", spoiled, export, messages=1),
    *(run_kind(f"checkpoints/step_4/{file}", spoiled, export, 0.2) for file in DEEPSPEED_FILES),
    run_made_again("cache/digests.json", changed_json),
    file_kind("digests.json", changed_json, use_digests, name="digests", never_refused=True),
    file_kind("manifest.json", changed_json, cached("manifest.json"), name="tokens", weight=0.2, never_refused=True),
    file_kind("windows.jsonl", changed_lines, cached("windows.jsonl"), name="windows", weight=0.2, never_refused=True),
    *map(report_kind, REPORTED),
    run_kind("layer_importance.json", changed_json, report, 0.02, name="report, drawn: layers"),
    run_kind("metrics.jsonl", changed_lines, report, 0.02, name="report, drawn: training"),
    run_kind("unit_movement.jsonl", changed_lines, report, 0.02, name="report, drawn: movement"),
]  # fmt: skip


@pytest.mark.parametrize("kind", mostly_quick(KINDS, "report, drawn: training", "report, drawn: movement"), ids=name_of)
def test_a_file_of_a_run_is_used_or_refused(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)
