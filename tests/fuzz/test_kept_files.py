"""What is kept from one start of a run to the next: manifests, the ledger, logs, the dial, anchors and places."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from harness.fuzzing import Fuzzing, Kind, Sandbox, file_kind, mostly_quick, name_of
from harness.launching import adept
from harness.mutations import changed_json, changed_lines, changed_safetensors, spoiled
from harness.trained_run import TrainedRun
from harness.workspace import Workspace
from safetensors import SafetensorError, safe_open

from adept_ds.base.dial_record import DialRecord
from adept_ds.base.digests import sha256_of
from adept_ds.base.files import read_json
from adept_ds.base.outputs import check_as_written
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps
from adept_ds.base.run_records import LogLine, MetricsLine, read_log
from adept_ds.data.tokens import TokenFile
from adept_ds.deltas.operations import pack_copies
from adept_ds.probing.places import PlaceBenefits, PlaceScores
from adept_ds.ranks.collectives import Ranks
from adept_ds.report.page import write_report
from adept_ds.run.anchor import read_anchor_text
from adept_ds.run.kept_losses import KeptLosses
from adept_ds.run.ledger import Ledger, Stage
from adept_ds.training.checkpoint import verify
from adept_ds.training.checkpoint_choice import choose, set_aside
from adept_ds.weights.export import read_zero_checkpoint

SECTIONS = {
    "data": {"eval_sequences": 200},
    "dial": {"alphas": [0.5], "per_copy": False},
    "anchor": {"kind": "kl", "text": "sampled", "sequences": 4},
    "expand": {"k": 2, "choose": "gain"},
}

TOKENS = ("tokens.bin", "ends.bin", "ids.bin")


def prepare(sandbox: Sandbox) -> Sandbox:
    """A finished run with a dial, anchored to text that its base wrote, with copies where they gain most."""
    run = TrainedRun(Workspace(sandbox.inputs), RunDirectory(sandbox.inputs / "run"))
    result = adept(1, "run", run.config(**SECTIONS))
    assert result.returncode == 0, result.stderr
    shutil.copy(run.files.ledger, sandbox.inputs / "stages.json")
    tokens = max(run.files.tokens.glob("*/manifest.json")).parent
    for name in ("manifest.json", *TOKENS):
        shutil.copy(tokens / name, sandbox.inputs)
    return sandbox


def files_of(sandbox: Sandbox) -> RunDirectory:
    return RunDirectory(sandbox.inputs / "run")


def copied_run(sandbox: Sandbox) -> RunDirectory:
    shutil.copytree(sandbox.inputs / "run", sandbox.out / "run")
    return RunDirectory(sandbox.out / "run")


def go_on_from(sandbox: Sandbox) -> None:
    """As training does that has not ended: the newest checkpoint that is whole, or the one before it."""
    checkpoints = sandbox.out / "checkpoints"
    shutil.copytree(files_of(sandbox).checkpoints, checkpoints)
    steps = checkpoint_steps(checkpoints)
    choice = choose(checkpoints, steps, lambda place: verify(place, Ranks()))
    set_aside(checkpoints, choice, lambda line: None)
    read_zero_checkpoint(checkpoints / f"step_{choice.step}")


def look_up(sandbox: Sandbox) -> None:
    """Every stage that is recorded, with the inputs that it was recorded with."""
    files = copied_run(sandbox)
    lines: list[str] = []
    ledger = Ledger(files.ledger, Ranks(), say=lambda stage, line: lines.append(line))
    for name, entry in read_json(sandbox.inputs / "stages.json").items():
        stage = Stage(name, files.dial if name == "dial" else files.export, partial(entry.get, "made_of"))
        ledger.once(stage, lambda _: None)
    assert all(line.isprintable() for line in lines)


def read_logs(sandbox: Sandbox) -> None:
    files = files_of(sandbox)
    for path in (files.metrics, files.unit_importance, files.unit_movement):
        list(read_log(path, MetricsLine if path == files.metrics else LogLine))


def read_losses(sandbox: Sandbox) -> None:
    """Of what they are, the file itself says."""
    path = files_of(sandbox).dial_losses
    with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
        KeptLosses.load(path, (file.metadata() or {}).get("made_of", ""))
        return
    KeptLosses.load(path, "")


def read_anchor(sandbox: Sandbox) -> None:
    read_anchor_text(files_of(sandbox).anchor_text, Ranks())


def pack(sandbox: Sandbox) -> None:
    pack_copies(copied_run(sandbox).root, sandbox.out / "package", name="packed")


def report(sandbox: Sandbox) -> None:
    write_report(copied_run(sandbox).root)


def open_tokens(sandbox: Sandbox) -> None:
    (sandbox.out / "tokens").mkdir()
    for name in ("manifest.json", *TOKENS):
        shutil.copy(sandbox.inputs / name, sandbox.out / "tokens")
    TokenFile.open(sandbox.out / "tokens").check(sha256_of)


def kept(file: str, change: Any, read: Callable[[Sandbox], None], weight: float, **more: Any) -> Kind:
    return file_kind(f"run/{file}", change, read, names=("run/", "checkpoints"), weight=weight, **more)


def record(kind: type[Record], file: str) -> Callable[[Sandbox], None]:
    def load(sandbox: Sandbox) -> None:
        kind.load(sandbox.inputs / "run" / file)

    return load


def as_written(folder: str) -> Callable[[Sandbox], None]:
    return lambda sandbox: check_as_written(sandbox.inputs / "run" / folder)


STATES = "checkpoints/step_4/zero_pp_rank_0_mp_rank_00_optim_states.pt"

KINDS = [
    kept("checkpoints/step_4/manifest.json", changed_json, go_on_from, 0.4, never_refused=True),
    kept(STATES, spoiled, go_on_from, 0.1, never_refused=True),
    kept("stages.json", changed_json, look_up, 0.3, never_refused=True),
    kept("metrics.jsonl", changed_lines, read_logs, 0.1),
    kept("unit_importance.jsonl", changed_lines, read_logs, 0.1),
    kept("unit_movement.jsonl", changed_lines, read_logs, 0.1),
    kept("dial.json", changed_json, record(DialRecord, "dial.json"), 0.2),
    kept("dial.json", changed_json, pack, 0.1, name="dial.json, packed"),
    kept("dial.json", changed_json, report, 0.02, name="dial.json, reported"),
    kept("dial_losses.safetensors", changed_safetensors, read_losses, 0.2),
    kept("anchor_text.safetensors", changed_safetensors, read_anchor, 0.2),
    kept("place_benefits.json", changed_json, record(PlaceBenefits, "place_benefits.json"), 0.2),
    kept("place_scores.json", changed_json, record(PlaceScores, "place_scores.json"), 0.2),
    kept("expanded/.adept_output.json", changed_json, as_written("expanded"), 0.2),
    kept("trained/.adept_output.json", changed_json, as_written("trained"), 0.1),
    file_kind("manifest.json", changed_json, open_tokens, names=TOKENS, name="tokens", weight=0.2, messages=2),
]  # fmt: skip


@pytest.mark.parametrize("kind", mostly_quick(KINDS, "dial.json, reported"), ids=name_of)
def test_what_a_run_keeps_is_used_or_refused(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)
