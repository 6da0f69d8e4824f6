"""The host waits for the device once in a training step: counted in real runs, whatever adds to the step.

Copies are those of `tools/host_copies.py`, for which every tensor on this CPU stands for one on a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.launching import ROOT, launch
from harness.marks import slow
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory

PROGRAM = """
import json, os, sys, threading
from host_copies import HostCopies
from adept_ds.base.files import read_json_lines
from adept_ds.cli.app import main
from adept_ds.data import blocks
from adept_ds.ranks.collectives import Ranks
from adept_ds.training import checkpoint_writer, trainer

found = open(sys.argv.pop(1), "a", buffering=1)
tell = lambda what, *values: print(json.dumps([what, *values]), file=found)
whole_step, whole_gradient = trainer.Trainer._train_step, trainer.accumulate_gradient
publish, gather = checkpoint_writer.CheckpointWriter._publish, blocks.Blocks.batch
words, is_training = [], [False]

for name in ("sum", "max", "gather", "barrier", "on_main"):
    def spoken(ranks, *arguments, say=getattr(Ranks, name), name=name):
        words.append(name)
        return say(ranks, *arguments)
    setattr(Ranks, name, spoken)

def stepped(training, step):
    words.clear()
    is_training[0] = True
    with HostCopies() as copies:
        outcome = whole_step(training, step)
    is_training[0] = False
    tell("step", step, copies.by_place(), words)
    return outcome

def accumulated(*arguments):
    with HostCopies() as copies:
        losses = whole_gradient(*arguments)
    tell("micro-batches", copies.by_place())
    return losses

def published(writer, manifest, stays):
    lines = read_json_lines(writer._directory.parent / "metrics.jsonl")
    tell("published", manifest.step, max(line["step"] for line in lines if "loss" in line))
    return publish(writer, manifest, stays)

def gathered(of, indices):
    tell("gather", is_training[0] and threading.current_thread() is threading.main_thread(), len(indices))
    return gather(of, indices)

trainer.Trainer._train_step, trainer.accumulate_gradient = stepped, accumulated
checkpoint_writer.CheckpointWriter._publish, blocks.Blocks.batch = published, gathered
main()
"""
PROGRAM = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\n{PROGRAM}"

ONE = {"adept_ds/zero/optimizer_step.py take_on_host": 1}
STEPS = 5


@dataclass(frozen=True)
class Counted:
    """What one run told."""

    lines: list[list[Any]]

    def of(self, what: str) -> Iterator[list[Any]]:
        return (values for kind, *values in self.lines if kind == what)


def counted(workspace: Workspace, folder: Path, stage: int, **sections: Any) -> Counted:
    train = {"steps": STEPS, "eval_every": 100, "checkpoint_every": 2} | sections.pop("train", {})
    deepspeed = str(ROOT / "ds_configs" / f"zero{stage}.json")
    config = workspace.config(folder / "run", deepspeed=deepspeed, **sections, train=train)
    result = launch(1, ["-c", PROGRAM, str(folder / "found"), "run", str(config)])
    assert result.returncode == 0, result.stderr
    assert RunDirectory(folder / "run").metrics.is_file()
    return Counted([json.loads(line) for line in (folder / "found").read_text().splitlines()])


ALL_THAT_JOINS: dict[str, tuple[int, dict[str, Any]]] = {
    "online": (3, {"importance": {"source": "online", "every": 100}}),
    "anchored": (3, {"anchor": {"kind": "kl", "share": 0.5}, "importance": {"every": 100}}),
    "bf16": (2, {"train": {"precision": "bf16"}, "importance": {"every": 100, "initial": "ones"}}),
}


@pytest.fixture(scope="module", params=[slow("online"), "anchored", slow("bf16")])
def run(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """Five steps of six micro-batches at least; whole documents in blocks, and replayed ones, where `online`."""
    stage, sections = ALL_THAT_JOINS[request.param]
    if request.param == "online":
        replay = {"replay": [str(workspace.root / "general.jsonl")], "replay_share": 1 / 3, "packing": "documents"}
        sections = sections | {"data": workspace.tree(Path())["data"] | replay}
    background = {"checkpoint": {"background": request.param == "bf16"}}
    return counted(workspace, tmp_path_factory.mktemp(request.param), stage, **sections, **background)


def test_a_step_costs_one_copy_to_the_host_deepspeeds_own_included(run: Counted) -> None:
    """From the third step on; before it, DeepSpeed compares what it has recorded of the order of modules."""
    steps = {step: places for step, places, _ in run.of("step")}
    assert len(steps) == STEPS
    assert [steps[step] for step in range(2, STEPS)] == [ONE] * (STEPS - 2)


def test_a_micro_batch_costs_none(run: Counted) -> None:
    assert list(run.of("micro-batches"))[2:] == [[{}]] * (STEPS - 2)


def test_ranks_agree_on_stopping_and_publishing_without_a_word_of_its_own(run: Counted) -> None:
    """What they have to tell each other rides along with the losses, between the devices."""
    assert [words for _, _, words in run.of("step")] == [[]] * STEPS


def test_a_steps_line_is_on_the_disk_before_its_checkpoint(run: Counted) -> None:
    published = list(run.of("published"))
    assert [step for step, _ in published] == [2, 4, 5]
    assert all(logged >= step for step, logged in published)


def test_no_batch_is_gathered_while_the_step_waits(run: Counted) -> None:
    """But for those of an anchor: a step's rows, of all its micro-batches, are gathered at once by a thread."""
    gathered = [number for waits, number in run.of("gather") if waits]
    assert max(gathered, default=0) <= 4
