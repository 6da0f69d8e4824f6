"""A flipped bit anywhere in a run is noticed before anything is made of it: that is made again, or refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.complaints import assert_one_line
from harness.launching import adept
from harness.spoiling import flip_bit
from harness.trained_run import TrainedRun
from safetensors.torch import load_file

from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps
from adept_ds.base.terminal import Terminal
from adept_ds.config.loading import load_config
from adept_ds.config.resolved import resolve
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.context import Context
from adept_ds.run.evaluate import eval_stage
from adept_ds.run.expand import current_expansion
from adept_ds.run.export import export_learned, export_stage
from adept_ds.run.train import train_stage


@pytest.fixture
def copy(trained_run: TrainedRun, tmp_path: Path) -> TrainedRun:
    return trained_run.copied(tmp_path / "elsewhere")


def context(of: TrainedRun) -> Context:
    """In this process, up to where a model would be loaded."""
    return Context.of(resolve(load_config(of.config()), "run"), Ranks(), Terminal(None), StopRequest())


def contents(root: Path) -> dict[str, bytes]:
    """Without logs, who is at work, and the cache of what can be found out again."""
    files = {file.relative_to(root): file for file in root.rglob("*") if file.is_file()}
    besides = ("logs", "cache")
    return {str(name): file.read_bytes() for name, file in files.items() if name.parts[0] not in besides}


def optimizer_states(files: RunDirectory, step: int) -> Path:
    (states,) = (files.checkpoints / f"step_{step}").glob("*optim_states.pt")
    return states


def tokens(files: RunDirectory) -> Path:
    return max(files.tokens.glob("*/tokens.bin"), key=lambda file: file.stat().st_size)


def cut_last_line(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 20)


# --- made again -----------------------------------------------------------------------------------------------------


SPOILED: dict[str, tuple[Callable[[RunDirectory], Path], Callable[[Path], object], str]] = {
    "tokens": (tokens, flip_bit, "tokens.bin' is not as it was written (its SHA-256 is another): tokenised again"),
    "scores": (lambda files: files.layer_scores(), flip_bit, "(its SHA-256 is another): made again"),
    "expanded model": (lambda files: files.expanded / "model.safetensors", flip_bit, "made again"),
    "optimizer states": (
        lambda files: optimizer_states(files, 4),
        lambda file: flip_bit(file, file.stat().st_size // 2),
        "(its SHA-256 is another): kept as 'step_4.damaged1', going on from step 2",
    ),
    "metrics": (lambda files: files.metrics, cut_last_line, "ends in half a line: left out"),
    "summary": (lambda files: files.summary, lambda file: file.write_bytes(b"{"), "made again from the logs"),
    "export": (lambda files: files.export / "model.safetensors", flip_bit, "made again"),
    "evaluation": (lambda files: files.evaluation, lambda file: flip_bit(file, 40), "made again"),
    "losses of the base": (lambda files: files.base_document_losses, flip_bit, "made again"),
}
"""Where, how, and what is said."""


@pytest.fixture(scope="module")
def mended(
    trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainedRun, subprocess.CompletedProcess[str]]:
    """A run in which all of that is damaged, started again."""
    copy = trained_run.copied(tmp_path_factory.mktemp("mended"))
    for place, spoil, _ in SPOILED.values():
        spoil(place(copy.files))
    return copy, adept(1, "run", copy.config())


@pytest.mark.parametrize("what", SPOILED)
def test_what_can_be_made_again_is_named_and_made_again(
    trained_run: TrainedRun, mended: tuple[TrainedRun, subprocess.CompletedProcess[str]], what: str
) -> None:
    place, _, line = SPOILED[what]
    copy, result = mended
    assert result.returncode == 0, result.stderr
    path = place(trained_run.files).relative_to(trained_run.files.root)
    assert any(path.name in said and said.rstrip().endswith(line) for said in result.stdout.splitlines()), result.stdout
    if what not in ("scores", "metrics", "summary", "optimizer states"):  # which hold times as well
        assert (copy.files.root / path).read_bytes() == (trained_run.files.root / path).read_bytes()


def test_a_mended_run_ends_with_the_weights_of_one_that_was_never_damaged(
    trained_run: TrainedRun, mended: tuple[TrainedRun, subprocess.CompletedProcess[str]]
) -> None:
    copy, result = mended
    assert "resuming after step 2" in result.stdout
    found, expected = (load_file(of.files.export / "model.safetensors") for of in (copy, trained_run))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert read_json(copy.files.summary)["steps"] == 4
    assert checkpoint_steps(copy.files.checkpoints) == [2, 4]
    assert (copy.files.checkpoints / "latest").read_text() == "step_4"


def test_nothing_that_was_damaged_is_thrown_away(
    trained_run: TrainedRun, mended: tuple[TrainedRun, subprocess.CompletedProcess[str]]
) -> None:
    """Models and checkpoints: somebody may have worked on them."""
    kept = {path.parent.name for path in mended[0].files.root.rglob("*") if path.is_file()}
    assert {"expanded.kept1", "export.kept1", "step_4.damaged1"} <= kept


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "expansion.json", "base_files.json", "tokenizer.json"]
)
def test_training_does_not_begin_with_an_expanded_model_that_was_changed(copy: TrainedRun, name: str) -> None:
    flip_bit(copy.files.expanded / name, -3)
    before = contents(copy.files.root)
    with pytest.raises(
        DamagedError, match=rf"expanded/{name}' is not as it was written .*; `adept expand CONFIG` makes"
    ):
        train_stage(context(copy))
    assert contents(copy.files.root) == before


def test_a_changed_export_is_not_evaluated(copy: TrainedRun) -> None:
    for name in ("model.safetensors", "config.json"):
        flip_bit(copy.files.export / name, -3)
        with pytest.raises(
            DamagedError, match=rf"export/{name}' is not as it was written .*; `adept export CONFIG` makes"
        ):
            eval_stage(context(copy))
        flip_bit(copy.files.export / name, -3)


def test_nothing_is_exported_from_a_damaged_checkpoint_or_model(copy: TrainedRun, tmp_path: Path) -> None:
    files, out = copy.files, tmp_path / "out"
    shutil.rmtree(files.export)
    flip_bit(optimizer_states(files, 4))
    for export in (
        lambda: export_stage(context(copy)),
        lambda: export_learned(files.expanded, files.checkpoints / "step_4", out),
        lambda: export_learned(files.expanded, files.checkpoints, out),
    ):
        with pytest.raises(DamagedError, match=r"optim_states\.pt' is not as it was .*put this checkpoint aside"):
            export()
    flip_bit(optimizer_states(files, 4))
    flip_bit(files.expanded / "model.safetensors")
    for export in (
        lambda: export_stage(context(copy)),
        lambda: export_learned(files.expanded, files.checkpoints, out),
    ):
        with pytest.raises(DamagedError, match=r"expanded/model\.safetensors' is not as it was written"):
            export()
    assert not out.exists() and not files.export.exists()


def test_if_no_checkpoint_is_whole_that_is_one_line_and_nothing_is_changed(copy: TrainedRun) -> None:
    shutil.rmtree(copy.files.export)
    for step in (2, 4):
        optimizer_states(copy.files, step).write_bytes(b"")
    before = contents(copy.files.root)
    result = adept(1, "run", copy.config())
    assert result.returncode == 2, result.stdout
    assert_one_line(result.stderr, ["none of the checkpoints of steps [2, 4] is whole", "has 0 bytes of", "aside"])
    after = contents(copy.files.root)
    assert {name: content for name, content in after.items() if name in before and name != "config.yaml"} == {
        name: content for name, content in before.items() if name != "config.yaml"
    }


def test_a_line_in_the_middle_of_a_log_that_cannot_be_read_is_refused(copy: TrainedRun) -> None:
    """What it said is known nowhere else."""
    lines = copy.files.metrics.read_bytes().split(b"\n")
    copy.files.metrics.write_bytes(b"\n".join([lines[0], b"{", *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl' line 2 is damaged .*; restore it from a copy, or"):
        train_stage(context(copy))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("run", "metrics.jsonl"),
        ("run", "unit_importance.jsonl"),
        ("run", "unit_movement.jsonl"),
        ("train", "metrics.jsonl"),
    ],
)
def test_a_number_in_a_log_that_was_changed_is_refused_before_anything_is_written(
    copy: TrainedRun, command: str, name: str
) -> None:
    log = copy.files.root / name
    first, digit = log.read_bytes(), rb'("(?:loss|importance|moved)": \d)'
    log.write_bytes(re.sub(digit, lambda found: found[1][:-1] + bytes([found[1][-1] ^ 1]), first, count=1))
    before = contents(copy.files.root)
    result = adept(1, command, copy.config())
    assert result.returncode == 2, result.stdout
    assert_one_line(result.stderr, [f"{name}' line ", "is damaged (not as it was written)", "restore it from a copy"])
    assert contents(copy.files.root) == before


def test_a_model_without_a_mark_is_what_its_own_record_says(copy: TrainedRun) -> None:
    """As an older program left it, or a copy without hidden files."""
    (copy.files.expanded / ".adept_output.json").unlink()
    assert current_expansion(context(copy)).source_layers == 5
