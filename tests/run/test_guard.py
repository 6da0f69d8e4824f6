"""The guard in a run: what it measures is what plain PyTorch finds, and each action does what it says.

A tiny model learns words in lower case; held-out general text is of other letters, which it forgets on the way.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.forgetting import write_held_out
from harness.launching import adept
from harness.plain_evaluation import document_sums
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, read_json_lines
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag
from adept_ds.config.loading import load_config
from adept_ds.data.pieces import document_id
from adept_ds.run.prerequisites import exported_step

STEPS, EVERY, LR = 8, 2, 0.05
"""A rate with which letters are forgotten for certain after four steps, and not after two."""


@dataclass(frozen=True)
class GuardedRun:
    folder: Path
    config: Path
    said: str

    @property
    def files(self) -> RunDirectory:
        return RunDirectory(self.config.with_suffix(""))

    @property
    def finished(self) -> Finished:
        return Finished(self.files.root)

    def readings(self) -> dict[int, dict[str, Any]]:
        """By step."""
        return {line["step"]: line["guard"] for line in read_json_lines(self.files.metrics) if "guard" in line}

    def limits(self) -> dict[int, dict[str, float]]:
        """Of the one general source."""
        return {step: next(iter(of["general"].values())) for step, of in self.readings().items()}


def guarded(workspace: Workspace, folder: Path, ranks: int, guard: dict[str, Any], **train: Any) -> GuardedRun:
    write_held_out(workspace.root)
    data = {"general_eval": [str(workspace.root / "letters.jsonl")], "eval_sequences": 200}
    config = workspace.config(
        folder / "run",
        data=data | {"domain_eval": [str(workspace.root / "words.jsonl")]},
        expand={"k": None, "layers": [1, 3]},
        importance={"initial": "ones", "every": 100},
        train={"steps": STEPS, "eval_every": EVERY, "checkpoint_every": 100, "lr": LR} | train,
        guard=guard,
    )
    result = adept(ranks, "run", config)
    assert result.returncode == 0, result.stderr
    return GuardedRun(folder, config, result.stdout)


@pytest.fixture(scope="module")
def warned(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> GuardedRun:
    return guarded(workspace, tmp_path_factory.mktemp("warned"), 2, {}, checkpoint_every=EVERY, keep_checkpoints=9)


@pytest.fixture(scope="module")
def stopped(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> GuardedRun:
    return guarded(workspace, tmp_path_factory.mktemp("stopped"), 2, {"action": "stop"})


def validation(texts: list[str]) -> list[str]:
    return [text for text in texts if document_id(text) % 2 == 0]


def texts_of(workspace: Workspace, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (workspace.root / f"{name}.jsonl").read_text().splitlines()]


def test_what_is_measured_is_what_plain_torch_finds(workspace: Workspace, stopped: GuardedRun) -> None:
    """Of the validation documents, each alone, under the base and under the exported model of that step: to 1e-5."""
    best = read_json(stopped.files.guard)["best"]
    letters, words = (validation(texts_of(workspace, name)) for name in ("letters", "words"))
    assert 5 <= len(letters) < 24

    def sums(model: Path, texts: list[str]) -> list[float]:
        return document_sums(model, workspace.model, texts, 32)

    # Bytes and the end of the text, cut into sequences of 32, of which the first token is not predicted.
    tokens = {name: sum(predicted(len(text) + 1) for text in of) for name, of in (("l", letters), ("w", words))}
    rise = (sum(sums(stopped.files.export, letters)) - sum(sums(workspace.model, letters))) / tokens["l"]
    assert stopped.limits()[best]["rise"] == pytest.approx(rise, abs=1e-5)
    domain = sum(sums(stopped.files.export, words)) / tokens["w"]
    assert stopped.readings()[best]["domain"] == pytest.approx(domain, abs=1e-5)


def predicted(tokens: int) -> int:
    return sum(min(32, tokens - start) - 1 for start in range(0, tokens, 32))


def test_it_is_measured_with_each_evaluation_and_instead_of_a_second_one(warned: GuardedRun) -> None:
    steps = [0, 2, 4, 6, 8]
    assert list(warned.readings()) == steps
    lines = [line for line in read_json_lines(warned.files.metrics) if "eval" in line]
    assert [line["step"] for line in lines] == steps
    assert {name for line in lines for name in line["eval"]} == {"general", "domain"}
    start = warned.limits()[0]
    assert start["rise"] == pytest.approx(0, abs=1e-6), "before the first step the model is the base"


def test_a_warning_is_said_and_counted_and_changes_nothing(warned: GuardedRun, stopped: GuardedRun) -> None:
    forgotten = [step for step, reading in warned.readings().items() if reading["forgotten"]]
    assert forgotten == [step for step, of in warned.limits().items() if of["lower"] > 0]
    assert forgotten[0] == 4, "it must be forgotten bit by bit for this to mean anything"
    assert f"has risen by {warned.limits()[4]['rise']:.4f} nats by step 4" in warned.said
    assert read_json(warned.files.summary)["guard_alarms"] == len(forgotten)
    both = [[repr(record["loss"]) for record in run.finished.steps()] for run in (warned, stopped)]
    assert both[0][:4] == both[1], "and measuring leaves no trace either"
    assert len(both[0]) == STEPS


def test_an_end_exports_the_best_checkpoint_before(stopped: GuardedRun) -> None:
    """That of the end is kept as well, so that training may go on."""
    stop = read_json(stopped.files.guard)
    assert (stop["step"], stop["best"], stop["max_general_rise"]) == (4, 2, 0.0)
    assert list(stopped.readings()) == [0, 2, 4]
    assert checkpoint_steps(stopped.files.checkpoints) == [2, 4]
    assert "training ends, and the checkpoint of step 2 is the result" in stopped.said
    assert "trained tensors of step 2 in" in stopped.said


def test_it_stays_at_its_end_by_the_same_settings_and_by_no_others(stopped: GuardedRun) -> None:
    again = adept(1, "train", stopped.config)
    assert again.returncode == 0 and "ended by the guard after step 4, not run again" in again.stdout
    exported = {
        exported_step(load_config(stopped.config, [override]))
        for override in ("guard.max_general_rise=5.0", "guard.confidence=0.9", "guard.action=warn", "guard=null")
    }
    assert exported == {4}
    assert (exported_step(load_config(stopped.config)), exported_step(load_config(stopped.config), 4)) == (2, 4)


@pytest.fixture
def copied(stopped: GuardedRun, tmp_path: Path) -> GuardedRun:
    """Of the run that was ended after step 4, with the checkpoint of step 2 as its result."""
    shutil.copytree(stopped.folder, tmp_path / "copy")
    config = tmp_path / "copy" / "run.yaml"
    config.write_text(config.read_text().replace(str(stopped.files.root), str(config.with_suffix(""))))
    return GuardedRun(config.parent, config, stopped.said)


def put_aside(run: GuardedRun, *paths: Path) -> None:
    for path in paths:
        path.rename(run.folder / f"{path.name}.aside")


def test_without_the_best_checkpoint_the_forgotten_one_is_not_exported(copied: GuardedRun) -> None:
    """What the complaint names as remedies are some: the best is made again, or the end is asked for by its number."""
    weights, checkpoints = copied.finished.weights(), copied.files.checkpoints
    put_aside(copied, checkpoints / checkpoint_tag(2))
    result = adept(2, "run", copied.config)
    assert result.returncode == 2, result.stdout
    words = ["export: ", "lacks the checkpoint of step 2", "ended training after step 4", "one of [4] with"]
    assert_one_line(result.stderr, words)
    assert exported_step(load_config(copied.config), 4) == 4
    put_aside(copied, checkpoints / checkpoint_tag(4), copied.files.guard)
    result = adept(2, "run", copied.config)
    assert result.returncode == 0, result.stderr
    assert "trained tensors of step 2 in" in result.stdout
    again = copied.finished.weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_without_any_checkpoint_training_begins_anew_whatever_the_guard_did(copied: GuardedRun) -> None:
    put_aside(copied, copied.files.checkpoints)
    with pytest.raises(InputError, match="has no checkpoint; run `adept train CONFIG` first"):
        exported_step(load_config(copied.config))
    result = adept(2, "train", copied.config)
    assert result.returncode == 0, result.stderr
    assert checkpoint_steps(copied.files.checkpoints) == [2, 4]
    assert exported_step(load_config(copied.config)) == 2


def test_going_on_without_the_best_checkpoint_does_not_name_it_again(copied: GuardedRun) -> None:
    """From its end, without the record of that, it is ended again two steps later, with nothing to show."""
    put_aside(copied, copied.files.checkpoints / checkpoint_tag(2), copied.files.guard)
    result = adept(2, "train", copied.config)
    assert result.returncode == 2, result.stdout
    assert_one_line(result.stderr, ["guard.max_general_rise: ", "by step 6", "no checkpoint has less"])
    assert read_json(copied.files.guard)["best"] == 0


@pytest.mark.parametrize("changed", ["guard.confidence=0.9", "data.eval_sequences=190"])
def test_what_was_the_best_by_other_measures_is_not_exported(copied: GuardedRun, changed: str) -> None:
    """It goes on after its end, forgets more, and is ended with nothing that was found good by what holds now."""
    put_aside(copied, copied.files.guard)
    result = adept(2, "train", copied.config, changed)
    assert result.returncode == 2, result.stdout
    assert_one_line(result.stderr, ["guard.max_general_rise: ", "by step 6", "no checkpoint has less"])
    assert read_json(copied.files.guard)["best"] == 0


def test_what_was_the_best_stays_so_by_the_same_measures(copied: GuardedRun) -> None:
    put_aside(copied, copied.files.guard)
    result = adept(2, "train", copied.config)
    assert result.returncode == 0, result.stderr
    assert (read_json(copied.files.guard)["step"], exported_step(load_config(copied.config))) == (6, 2)


def test_lower_multipliers_are_lower_rates_and_resume_bit_for_bit(
    workspace: Workspace, tmp_path: Path, warned: GuardedRun
) -> None:
    """From a checkpoint behind the first alarm."""
    slowed = guarded(workspace, tmp_path, 1, {"action": "slow"}, checkpoint_every=EVERY, keep_checkpoints=9)
    rates = [[record["lr"] for record in run.finished.steps()] for run in (warned, slowed)]
    factors = {step: reading["factor"] for step, reading in slowed.readings().items()}
    assert (factors[2], factors[4]) == (1.0, 0.5) and 0 < factors[6] <= 0.5
    assert rates[1] == pytest.approx([rate * factors[step - step % 2] for step, rate in enumerate(rates[0])])
    before, losses = slowed.finished.weights(), repr(slowed.finished.losses())
    for step in (6, 8):
        shutil.rmtree(slowed.files.checkpoints / checkpoint_tag(step))
    result = adept(1, "run", slowed.config)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 4" in result.stdout
    assert repr(slowed.finished.losses()) == losses
    assert {step: reading["factor"] for step, reading in slowed.readings().items()} == factors
    again = slowed.finished.weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())


def test_too_few_documents_are_refused_before_training(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(tmp_path / "run", guard={"confidence": 0.999}, data={"eval_sequences": 3})
    result = adept(1, "run", config)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "data.general_eval: source " in line and "guard.confidence takes at least 10 of each" in line
    with pytest.raises(InputError):
        exported_step(load_config(config))
