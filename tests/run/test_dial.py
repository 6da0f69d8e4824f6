"""A run with a dial: what it chooses is what plain PyTorch finds in the files, wherever it was interrupted.

A tiny model learns words in lower case; held-out general text is of other letters, which it forgets on the way.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness.complaints import refused
from harness.domains import all_tensors, content
from harness.forgetting import write_held_out
from harness.launching import adept, start
from harness.marks import slow
from harness.plain_evaluation import document_sums
from harness.trained_run import TrainedRun
from harness.workspace import Workspace
from safetensors.numpy import load_file

from adept_ds.base.dial_record import DialRecord, HalfLosses
from adept_ds.base.run_dir import RunDirectory
from adept_ds.data.pieces import document_id
from adept_ds.deltas.package import Package
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.turning import write_turned

PATIENCE = 300.0
"""Seconds until something that takes a few must have happened."""


class DialledRun(TrainedRun):
    """The same with held-out text of two kinds, and a section `dial`."""

    def config(self, **sections: Any) -> Path:
        data = {
            "general_eval": [str(self.workspace.root / "letters.jsonl")],
            "domain_eval": [str(self.workspace.root / "words.jsonl")],
            "eval_sequences": 200,
        }
        sections["data"] = data | sections.get("data", {})
        sections.setdefault("dial", {"alphas": [0.5]})
        return super().config(**sections)

    def texts(self, name: str) -> list[str]:
        lines = (self.workspace.root / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    @property
    def record(self) -> DialRecord:
        return DialRecord.load(self.files.dial)

    def copied(self, place: Path) -> DialledRun:
        copy = super().copied(place)
        return DialledRun(copy.workspace, copy.files)


def done(result: Any) -> str:
    assert result.returncode == 0, result.stderr
    return str(result.stdout)


@pytest.fixture(scope="module")
def first(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[DialledRun, str]:
    """A run on one rank, and what it said."""
    root = tmp_path_factory.mktemp("dialled")
    shutil.copytree(workspace.root, root / "inputs")
    write_held_out(root / "inputs")
    run = DialledRun(Workspace(root / "inputs"), RunDirectory(root / "run"))
    return run, done(adept(1, "run", run.config()))


@pytest.fixture(scope="module")
def dialled(first: tuple[DialledRun, str]) -> DialledRun:
    return first[0]


# --- what is chosen --------------------------------------------------------------------------------------------------


def plain_changes(run: DialledRun, model: Path, validation: bool) -> dict[str, tuple[float, float]]:
    """Loss, and its rise above the base's, of each corpus on one half: documents by hash, sums over sums."""
    found = {}
    for corpus, name in (("general", "letters"), ("domain", "words")):
        texts = [text for text in run.texts(name) if (document_id(text) % 2 == 0) == validation]
        tokens = sum(len(text) + 1 - math.ceil((len(text) + 1) / 32) for text in texts)
        sums = [sum(document_sums(place, run.workspace.model, texts, 32)) for place in (model, run.workspace.model)]
        found[corpus] = (sums[0] / tokens, (sums[0] - sums[1]) / tokens)
    return found


def assert_found(half: HalfLosses, wanted: dict[str, tuple[float, float]]) -> None:
    """Losses are about 5 and agree to the rounding of a forward pass."""
    (general,) = half.general.values()
    for found, (loss, rise) in ((general, wanted["general"]), (half.domain, wanted["domain"])):
        assert found.loss == pytest.approx(loss, rel=2e-6)
        assert found.rise == pytest.approx(rise, abs=2e-5)


def test_positions_have_the_losses_of_models_that_are_written_so(dialled: DialledRun, tmp_path: Path) -> None:
    """On both halves: the base, a common position, one of each copy by itself, and the export."""
    record = dialled.record
    last_single = [position for position in record.positions if position.tried_as == "single"][-1]
    models = {(0.0, 0.0): dialled.workspace.model, record.chosen: dialled.files.export}
    for alphas in ((0.5, 0.5), last_single.alphas):
        write_turned(dialled.files.trained, tmp_path / str(alphas), alphas)
        models[alphas] = tmp_path / str(alphas)
    at = {position.alphas: position for position in record.positions}
    assert len(models) >= 3 and models.keys() <= at.keys()
    for alphas, model in models.items():
        assert_found(at[alphas].validation, plain_changes(dialled, model, validation=True))
        assert_found(at[alphas].test, plain_changes(dialled, model, validation=False))


def test_the_lowest_domain_loss_that_keeps_the_promise_is_chosen_and_exported(
    first: tuple[DialledRun, str],
) -> None:
    run, said = first
    record, export = run.record, run.files.export
    limits = {
        position.alphas: max(of.limit for of in position.validation.general.values()) for position in record.positions
    }
    assert limits[1.0, 1.0] > 0, "what was trained forgets, or there was nothing to choose"
    keeping = [position for position in record.positions if limits[position.alphas] <= 0]
    assert record.position == min(keeping, key=lambda position: position.validation.domain.loss)
    assert 0 < sum(record.chosen) < 2
    assert Expansion.read(export).alphas == record.chosen
    assert Expansion.read(run.files.trained).alphas is None
    evaluation = json.loads(run.files.evaluation.read_text())
    domain = (record.position.validation.domain, record.position.test.domain)
    mean = sum(half.loss * half.tokens for half in domain) / sum(half.tokens for half in domain)
    assert evaluation["adapted"]["domain"]["loss"] == pytest.approx(mean, rel=2e-6), "the export is what is evaluated"
    assert record.promise in said.replace("\n", " ") and record.reason in said
    assert record.sources == tuple(Expansion.read(export).source_indices)
    page = run.files.report.read_text()
    assert record.promise in page.replace("&#39;", "'") and '<section id="dial"' in page


def test_at_its_ends_the_dial_says_what_evaluation_says_of_base_and_trained_model(dialled: DialledRun) -> None:
    """The base rises by exactly nothing; losses of documents at 1 are those of trained/, to the rounding of a pass."""
    record, base = dialled.record, load_file(dialled.files.base_document_losses)
    at = {position.alphas: position for position in record.positions}
    assert [change.rise for change in at[0.0, 0.0].validation.general.values()] == [0.0]
    assert at[0.0, 0.0].test.domain.limit == 0.0
    kept = load_file(dialled.files.dial_losses)
    assert np.array_equal(kept["0/general/letters"], base["loss/base/general/letters"])
    wanted = document_sums(dialled.files.trained, dialled.workspace.model, dialled.texts("words"), 32)
    assert kept["1/domain/words"].tolist() == pytest.approx(wanted, rel=2e-6)


# --- once, and on from anywhere --------------------------------------------------------------------------------------


def without_seconds(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    for part in (tree, *tree["positions"]):
        part.pop("seconds")
    return tree


LACKING: list[Sequence[str]] = [
    ("trained", "dial.json", "dial_losses.safetensors", "export", "evaluation.json"),
    ("dial.json", "export", "evaluation.json"),
    ("export", "evaluation.json"),
    (),
]
"""Of a run that was killed before its dial, at its end, or before the export at what was chosen; and of a whole one."""


def test_killed_between_any_two_stages_the_same_command_goes_on(dialled: DialledRun, tmp_path: Path) -> None:
    wanted, exported = without_seconds(dialled.files.dial), content(dialled.files.export)
    run, unchanged = dialled.copied(tmp_path), []
    for names in LACKING:
        for path in map(run.files.root.joinpath, names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        said = done(adept(1, "run", run.config()))
        assert without_seconds(run.files.dial) == wanted
        assert content(run.files.export) == exported
        assert run.files.evaluation.is_file()
        unchanged.append(said.count("not run again"))
    assert unchanged == sorted(set(unchanged)), "each time less is left to do"


def test_killed_in_the_middle_of_the_dial_it_goes_on_where_it_was(dialled: DialledRun, tmp_path: Path) -> None:
    run = dialled.copied(tmp_path)
    wanted = without_seconds(run.files.dial)
    for path in (run.files.dial, run.files.dial_losses):
        path.unlink()
    (process,) = start(1, ["-m", "adept_ds", "dial", str(run.config())])
    end = time.monotonic() + PATIENCE
    while not run.files.dial_losses.is_file() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run.files.dial_losses.is_file() and not run.files.dial.exists()
    before = load_file(run.files.dial_losses)
    done(adept(1, "dial", run.config()))
    after = load_file(run.files.dial_losses)
    assert before.keys() <= after.keys() and all(np.array_equal(after[name], before[name]) for name in before)
    assert without_seconds(run.files.dial) == wanted


@pytest.mark.parametrize("zero", [slow("zero1"), "zero3"])
def test_two_ranks_find_the_same(dialled: DialledRun, tmp_path: Path, zero: str) -> None:
    """Under ZeRO-3 of slices, and with whole models: the same positions, with losses to the rounding of a pass."""
    run, wanted = dialled.copied(tmp_path), dialled.record
    for path in (run.files.dial, run.files.dial_losses, run.files.base_evaluation):
        path.unlink()
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": int(zero[-1])}}))
    found = json.loads(done(adept(2, "dial", run.config(deepspeed=str(settings)), "--json")))
    assert found["chosen"] == pytest.approx(wanted.chosen, abs=0.0011), "proposals are rounded to thousandths"
    assert Expansion.read(run.files.export).alphas == tuple(found["chosen"])
    for position, of in zip(found["positions"], wanted.positions, strict=True):
        if of.tried_as != "proposed":
            assert tuple(position["alphas"]) == of.alphas
            assert position["test"]["domain"]["loss"] == pytest.approx(of.test.domain.loss, rel=2e-6)


# --- afterwards ------------------------------------------------------------------------------------------------------


def test_another_promise_afterwards_evaluates_nothing_that_was_evaluated(dialled: DialledRun, tmp_path: Path) -> None:
    """On the run's directory, moved elsewhere; with so much room that all is turned up."""
    run = dialled.copied(tmp_path)
    run.config()
    stamp = run.files.dial_losses.stat().st_mtime_ns
    found = json.loads(done(adept(1, "dial", run.files.root, "--keep-general", "50", "dial.per_copy=false", "--json")))
    assert (found["max_general_rise"], found["chosen"]) == (50.0, [1.0, 1.0])
    assert run.files.dial_losses.stat().st_mtime_ns == stamp
    assert content(run.files.export) == content(run.files.trained)
    assert "at most 50 nats worse than the base" in found["promise"]


def test_an_export_at_a_position_and_the_package_of_it(dialled: DialledRun, tmp_path: Path) -> None:
    """`adept export CONFIG --alpha` needs no engine; a package of the run holds what was trained, and recommends."""
    run, out = dialled.copied(tmp_path), tmp_path / "package"
    done(adept(1, "delta", "pack", run.files.root, out))
    assert tuple(Package.load(out).manifest.metrics.alphas) == run.record.chosen
    said = done(adept(1, "delta", "apply", run.workspace.model, out, tmp_path / "applied"))
    assert "as recommended; --alpha 1" in said
    done(adept(1, "delta", "apply", run.workspace.model, out, tmp_path / "whole", "--alpha", "1"))
    for applied, wanted in (("applied", run.files.export), ("whole", run.files.trained)):
        tensors, own = all_tensors(tmp_path / applied), all_tensors(wanted)
        assert tensors.keys() == own.keys() and all(torch.equal(tensors[name], own[name]) for name in own)
    done(adept(1, "export", run.config(), "--alpha", "0.25,1"))
    write_turned(run.files.trained, tmp_path / "wanted", [0.25, 1.0])
    assert content(run.files.export) == content(tmp_path / "wanted")
    done(adept(1, "export", run.files.trained, tmp_path / "plain", "--alpha", "0.25,1"))
    assert content(tmp_path / "plain") == content(tmp_path / "wanted")


def test_a_method_in_place_is_interpolated_with_its_base(dialled: DialledRun, tmp_path: Path) -> None:
    """The same for full training; nothing is known of copies."""
    run = DialledRun(dialled.workspace, RunDirectory(tmp_path / "run"))
    sections = {"method": "full", "train": {"steps": 3, "checkpoint_every": 3, "lr": 3e-3}}
    path = run.config(**sections, dial={"max_general_rise": 0.02})
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: of for key, of in tree.items() if key not in ("expand", "importance")}))
    done(adept(1, "run", path))
    record = run.record
    assert (record.kind, record.sources) == ("interpolation", ())
    assert [position.alphas for position in record.positions] == [(a,) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
    (alpha,) = record.chosen
    ends, export = (
        [all_tensors(place) for place in (run.workspace.model, run.files.trained)],
        all_tensors(run.files.export),
    )
    for name, tensor in export.items():
        wanted = ends[0][name] + alpha * (ends[1][name] - ends[0][name])
        assert torch.equal(tensor, ends[1][name] if alpha == 1 else ends[0][name] if alpha == 0 else wanted), name


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_in_one_line(dialled: DialledRun, tmp_path: Path) -> None:
    config, fresh = dialled.config(), tmp_path / "fresh"
    for arguments, words in {
        ("dial", tmp_path): ["has no config.yaml; give the directory of a run"],
        ("dial", config, f"run_dir={fresh}"): ["has no checkpoint; run `adept train CONFIG` first"],
        ("dial", config, "--keep-general", "much"): ["dial.max_general_rise=much", "dial.max_general_rise: 'much'"],
        ("dial", config, "--keep-general", "-1"): ["dial.max_general_rise: -1", "greater than or equal to 0"],
        ("export", config, "--alpha", "2"): ["--alpha: '2' leaves the way", "use 0 to 1"],
        ("export", config, "--alpha", "half"): ["--alpha: 'half' is no list of numbers"],
        ("export", dialled.files.trained, fresh): ["--alpha is missing", "is a model, no checkpoint"],
        ("export", dialled.files.trained, fresh, "--alpha", "1,1,1"): ["--alpha: 3 positions for 2 copies"],
        ("export", dialled.files.trained, fresh, "--alpha", "1", "--dtype", "float32"): [
            "--dtype: float32 has no effect"
        ],
        ("export", dialled.files.checkpoints, fresh, "--alpha", "0.5"): ["--alpha: ", "is no adapted model"],
        ("delta", "pack", dialled.files.export, fresh): ["is turned down (alpha", "--alpha 1"],
    }.items():
        refused(arguments, words)
    assert not fresh.exists()


def test_too_few_documents_are_refused_before_anything_is_trained(dialled: DialledRun, tmp_path: Path) -> None:
    run = DialledRun(dialled.workspace, RunDirectory(tmp_path / "run"))
    result = adept(1, "run", run.config(data={"eval_sequences": 4}))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    for word in ("data.general_eval: source 'letters' has", "dial.confidence takes at least 5", "data.eval_sequences"):
        assert word in line, line
    assert not run.files.checkpoints.exists()
