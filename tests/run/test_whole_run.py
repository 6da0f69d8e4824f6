"""One run, the same at every number of ranks, and the same as the method written down in plain PyTorch.

`adept run` is started on 1, 2 and 3 real ranks under ZeRO-3, on a tiny model whose parameters divide evenly by
neither 2 nor 3; the oracle repeats it in one process.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from harness.finished_run import Finished
from harness.launching import adept, launch
from harness.marks import slow
from harness.packing import pack, rows, rows_of_step
from harness.plain_evaluation import document_sums
from harness.undrawn import DRAWN
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.files import read_json, read_json_lines
from adept_ds.config.loading import load_config
from adept_ds.data.order import block_order
from adept_ds.weights.expansion import Expansion

WORLD_SIZES = [1, 2, slow(3)]


class Runs(dict[int, Finished]):
    """By number of ranks, started when they are asked for."""

    def __init__(self, workspace: Workspace, root: Path) -> None:
        super().__init__()
        self._workspace, self._root = workspace, root

    def __missing__(self, world_size: int) -> Finished:
        place = self._root / f"run{world_size}"
        with mock.patch.dict(os.environ, {DRAWN: "figures too"}):
            result = adept(world_size, "run", self._workspace.config(place))
        assert result.returncode == 0, result.stderr
        return self.setdefault(world_size, Finished(place))


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(workspace, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def plain(workspace: Workspace, runs: dict[int, Finished]) -> dict[str, Any]:
    """Everything that the oracle says about this run."""
    directory = runs[1].directory
    config = load_config(directory.with_suffix(".yaml"))
    cache = directory / "oracle"
    train, section = config.train, config.importance
    general = [workspace.root / "general.jsonl"]
    probe = pack(general, workspace.model, cache, seq_len=config.probe.seq_len, keep_tail=True)
    domain = pack([workspace.root / "domain.jsonl"], workspace.model, cache, seq_len=config.data.seq_len)
    sample = block_order(len(probe), config.probe.seed)[: section.sequences]
    probe_batches = [
        rows(probe, sample[start : start + section.batch_sequences])
        for start in range(0, section.sequences, section.batch_sequences)
    ]
    source = oracle.load(workspace.model)
    base, deltas = oracle.layer_deltas(source, [rows(probe, sample)])
    expansion = Expansion.read(directory / "expanded")
    first = oracle.importance(source, expansion.source_indices, probe_batches)
    renamed = {
        unit.replace(f"layers.{copy.source}.", f"layers.{copy.index}.", 1): value
        for unit, value in first.items()
        for copy in expansion.copies
        if unit.startswith(f"layers.{copy.source}.")
    }
    batches = [rows_of_step(domain, step, train.global_batch_size, train.seed) for step in range(train.steps)]
    rates = [record["lr"] for record in read_json_lines(directory / "metrics.jsonl") if "lr" in record]
    training = oracle.train(
        oracle.load(directory / "expanded"),
        expansion.copy_indices,
        batches,
        rates,
        renamed,
        probe_batches,
        section.every,
        {
            "betas": train.betas,
            "weight_decay": train.weight_decay,
            "eps": train.eps,
            "clip_grad_norm": train.clip_grad_norm,
        },
    )
    return {"base": base, "deltas": deltas, "training": training}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_sweep_probe_equals_one_forward_per_layer(
    runs: dict[int, Finished], plain: dict[str, Any], world_size: int
) -> None:
    """Losses are about 5.6 and agree to float32 rounding of a forward pass (2e-6)."""
    result = read_json(runs[world_size].directory / "layer_importance.json")
    assert result["base_loss"] == pytest.approx(plain["base"], abs=2e-6)
    assert [layer["delta"] for layer in result["layers"]] == pytest.approx(plain["deltas"], abs=4e-6)
    lowest = sorted(range(len(plain["deltas"])), key=lambda layer: plain["deltas"][layer])[:2]
    assert result["selected"] == sorted(lowest)
    assert max(plain["deltas"]) - min(plain["deltas"]) > 1e-3, "the layers must differ for this to mean anything"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_importances_do_not_depend_on_the_number_of_ranks(
    runs: dict[int, Finished], plain: dict[str, Any], world_size: int
) -> None:
    """At the start, before any rounding of training steps: 1e-5 relative to the oracle's own sums."""
    first = runs[world_size].units("importance")[0]
    assert first == pytest.approx(plain["training"].importances[0], rel=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_equals_plain_adamw_with_a_learning_rate_per_parameter(
    runs: dict[int, Finished], plain: dict[str, Any], world_size: int
) -> None:
    """Seven steps with three refreshes: same losses and same final weights to 1e-5 (fp32, weights of order 1)."""
    expected: oracle.Training = plain["training"]
    run = runs[world_size]
    assert len(expected.multipliers) == 4
    assert run.losses() == pytest.approx(expected.losses, abs=1e-5)
    for actual, wanted in zip(run.units("multiplier"), expected.multipliers, strict=True):
        assert actual == pytest.approx(wanted, abs=1e-3)
    weights = run.weights()
    for name, tensor in expected.weights.items():
        assert float((weights[name] - tensor).abs().max()) <= 1e-5, name


def test_training_moves_the_copies_and_nothing_else(runs: dict[int, Finished]) -> None:
    run = runs[2]
    expansion = Expansion.read(run.directory / "expanded")
    before, after = load_file(run.directory / "expanded" / "model.safetensors"), run.weights()
    copies = tuple(f"model.layers.{index}." for index in expansion.copy_indices)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith(copies), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_movement_of_a_unit_is_the_norm_of_what_its_weights_changed_by(
    runs: dict[int, Finished], world_size: int
) -> None:
    """From start to end against the two checkpoints; four intervals of seven steps, each with its multipliers."""
    run = runs[world_size]
    before, after = load_file(run.directory / "expanded" / "model.safetensors"), run.weights()
    squares: dict[str, float] = {}
    for name, tensor in after.items():
        unit = oracle.unit_of(name)
        squares[unit] = squares.get(unit, 0.0) + float((tensor - before[name]).double().square().sum())
    records = run.movement()
    assert [(record["since"], record["step"]) for record in records] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    for unit in records[-1]["units"]:
        assert unit["moved_since_start"] == pytest.approx(squares[unit["unit"]] ** 0.5, rel=1e-6)
    for record, multipliers in zip(records, run.units("multiplier"), strict=True):
        assert {unit["unit"]: unit["multiplier"] for unit in record["units"]} == multipliers
    for unit in records[0]["units"]:
        assert unit["moved"] == unit["moved_since_start"]
        assert (unit["moved"] == 0) == (unit["multiplier"] == 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_evaluation_does_not_depend_on_the_number_of_ranks(runs: dict[int, Finished], world_size: int) -> None:
    """Before training to rounding; afterwards as the weights agree."""
    for single, many in zip(runs[1].evaluations(), runs[world_size].evaluations(), strict=True):
        for corpus in ("general", "domain"):
            assert many[corpus]["tokens"] == single[corpus]["tokens"]
            assert many[corpus]["loss"] == pytest.approx(single[corpus]["loss"], abs=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_exported_model_has_the_losses_that_training_measured_last(
    workspace: Workspace, runs: dict[int, Finished], tmp_path: Path, world_size: int
) -> None:
    """In training, on packed blocks."""
    held_out = {
        corpus: pack(
            [workspace.root / f"{corpus}_heldout.jsonl"], workspace.model, tmp_path, seq_len=32, keep_tail=True
        )
        for corpus in ("general", "domain")
    }
    run = runs[world_size]
    for directory, found in (
        (workspace.model, run.evaluations()[0]),
        (run.directory / "export", run.evaluations()[-1]),
    ):
        model = oracle.load(directory)
        for corpus, blocks in held_out.items():
            with torch.no_grad():
                expected = float(oracle.mean_loss(model, [rows(blocks, range(7))]))
            assert found[corpus]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_is_of_documents_each_alone(
    workspace: Workspace, runs: dict[int, Finished], world_size: int
) -> None:
    """As many of the first as 7 sequences of 32 tokens hold; losses of about 6 to rounding of a forward pass."""
    run = runs[world_size]
    results, directories = read_json(run.directory / "evaluation.json"), (workspace.model, run.directory / "export")
    for corpus in ("general", "domain"):
        lines = (workspace.root / f"{corpus}_heldout.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        sizes = list(itertools.accumulate(len(text) + 1 for text in texts))
        count = sum(size <= 7 * 32 for size in sizes)
        tokens = sum(sizes[count - 1 : count]) - sum(-(-(len(text) + 1) // 32) for text in texts[:count])
        for model, directory in zip(("base", "adapted"), directories, strict=True):
            found = results[model][corpus]
            sums = document_sums(directory, workspace.model, texts[:count], 32)
            assert (found["documents"], found["tokens"]) == (count, tokens)
            assert found["loss"] == pytest.approx(sum(sums) / tokens, abs=1e-6)
    assert results["adapted"]["domain"]["loss"] < results["base"]["domain"]["loss"]


def test_finished_run_is_not_done_again(runs: dict[int, Finished]) -> None:
    directory = runs[1].directory
    before = {path: path.stat().st_mtime_ns for path in directory.glob("e*/*.safetensors")}
    result = adept(1, "run", directory.with_suffix(".yaml"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == 5, result.stdout
    assert {path: path.stat().st_mtime_ns for path in directory.glob("e*/*.safetensors")} == before


KILLED = """
import os, pkgutil, signal, sys
from unittest import mock
from adept_ds.cli.app import main

place, call = sys.argv.pop(1), int(sys.argv.pop(1))
module, _, name = place.rpartition(".")
owner = pkgutil.resolve_name(module)
function, calls = getattr(owner, name), 0

def killing(*arguments, **options):
    global calls
    found, calls = function(*arguments, **options), calls + 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

with mock.patch.object(owner, name, killing):
    main()
"""
"""`adept` that is killed at the end of a call of a function, the first, second, ..."""

PLACES = {
    "the second micro-batch of three of step 5": ("deepspeed.runtime.engine.DeepSpeedEngine.step", 5),
    "the refresh after step 4, when it is known and in no log": ("adept_ds.units.unit_lr.UnitLR.refresh", 1),
    "the evaluation after it": ("adept_ds.training.trainer.evaluate", 1),
}


def test_a_run_that_was_killed_anywhere_ends_bit_for_bit_like_an_uninterrupted_one(
    workspace: Workspace, runs: dict[int, Finished], tmp_path: Path
) -> None:
    """Two ranks. The run has lost everything after its checkpoint at step 3, metrics of later steps excepted; going on
    from there, both ranks are killed in one place after the other. No checkpoint lies between.
    """
    import shutil

    whole, cut = runs[2].directory, tmp_path / "cut"
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("step_6", "step_7", "export", "*.html", "summary.json"))
    (cut / "checkpoints" / "latest").write_text("step_3")
    config = workspace.config(cut)
    for place, call in PLACES.values():
        assert launch(2, ["-c", KILLED, place, str(call), "run", str(config)]).returncode == -signal.SIGKILL
    result = adept(2, "run", config)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 3" in result.stdout
    assert Finished(cut).losses() == runs[2].losses()
    assert Finished(cut).evaluations() == runs[2].evaluations()
    assert Finished(cut).units("multiplier") == runs[2].units("multiplier")
    assert Finished(cut).movement() == runs[2].movement()
    expected = runs[2].weights()
    for name, tensor in Finished(cut).weights().items():
        assert torch.equal(tensor, expected[name]), name


def test_heads_and_neurons_with_smoothed_online_importances_resume_bit_for_bit_too(
    workspace: Workspace, tmp_path: Path
) -> None:
    """What smoothing and the running mean remember is part of a checkpoint, here one between two refreshes.

    Fine units, another map, every rank with its own cut rows; without a probe corpus.
    """
    import shutil

    sections = {
        "data": {"replay": [str(workspace.root / "general.jsonl")], "replay_share": 0.35},
        "probe": {"corpus": []},
        "importance": {"source": "online", "every": 2, "granularity": "fine"},
        "lr_policy": {"map": "rank", "scope": "per_layer", "smoothing": 0.7, "min_multiplier": 0.1},
        "expand": {"k": None, "layers": [1, 3]},
    }
    whole, cut = Finished(tmp_path / "whole"), Finished(tmp_path / "cut")
    result = adept(2, "run", workspace.config(whole.directory, **sections))
    assert result.returncode == 0, result.stderr
    assert "84 units" in result.stdout  # two copies of 37 neurons, 2 heads, 1 key-value head and 2 norms
    shutil.copytree(whole.directory, cut.directory, ignore=shutil.ignore_patterns("step_6", "step_7", "export"))
    (cut.directory / "checkpoints" / "latest").write_text("step_3")
    result = adept(2, "run", workspace.config(cut.directory, **sections))
    assert result.returncode == 0, result.stderr
    assert "resuming after step 3" in result.stdout
    assert cut.units("importance") == whole.units("importance")
    assert cut.units("multiplier") == whole.units("multiplier")
    assert cut.movement() == whole.movement()
    losses = [record for record in read_json_lines(whole.directory / "metrics.jsonl") if "loss" in record]
    for record in losses:  # four replayed sequences of twelve
        assert record["loss"] == pytest.approx((4 * record["replay_loss"] + 8 * record["domain_loss"]) / 12)
    expected = whole.weights()
    for name, tensor in cut.weights().items():
        assert torch.equal(tensor, expected[name]), name
    first, second = whole.units("multiplier")[1:3]
    assert first != second
    assert min(second.values()) == 0.1


@pytest.mark.parametrize(
    ("expand", "source"),
    [({"k": None, "layers": [2]}, 2), slow({"k": 1, "choose": "uniform"}, 4)],
    ids=["list", "uniform"],
)
def test_plain_training_of_given_layers_needs_no_general_corpus(
    workspace: Workspace, tmp_path: Path, expand: dict[str, Any], source: int
) -> None:
    """With `map: constant` nothing is ever probed."""
    config = workspace.config(
        tmp_path / "run",
        probe={"corpus": []},
        expand=expand,
        lr_policy={"map": "constant"},
        train={"steps": 2},
    )
    result = adept(1, "run", config)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run" / "unit_importance.jsonl").exists()
    assert not (tmp_path / "run" / "layer_importance.json").exists()
    assert Expansion.read(tmp_path / "run" / "expanded").source_indices == [source]
    (record,) = Finished(tmp_path / "run").movement()
    assert {unit["multiplier"] for unit in record["units"]} == {1.0}
