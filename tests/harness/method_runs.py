"""`adept run` with a method that trains the tiny model in place, on real ranks, and the texts that it sees."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import oracle
import torch
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.packing import pack, rows, rows_of_step
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory, checkpoint_tag
from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config
from adept_ds.data.blocks import Blocks
from adept_ds.data.order import block_order

STEPS = 4
MIDDLE = 2
"""The step of the first checkpoint."""

GRID = [slow((1, 2)), slow((2, 2)), slow((3, 1)), (3, 2)]
"""ZeRO stages and numbers of ranks."""


@dataclass
class MethodRun:
    """A configuration, and what `adept run` made of it."""

    workspace: Workspace
    folder: Path
    method: dict[str, Any]
    stage: int = 3
    world_size: int = 1
    sections: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def file(self) -> Path:
        """The configuration's."""
        train = {"steps": STEPS, "checkpoint_every": MIDDLE}
        tree = self.workspace.tree(self.folder / "run", method=self.method, train=train)
        del tree["expand"], tree["importance"], tree["data"]["general_eval"], tree["data"]["domain_eval"]
        zero = self.folder / "zero.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": self.stage}}))
        file = self.folder / "run.yaml"
        file.write_text(json.dumps(tree | {"deepspeed": str(zero)} | self.sections))  # which is YAML too
        return file

    @cached_property
    def config(self) -> Config:
        return load_config(self.file)

    @property
    def finished(self) -> Finished:
        return Finished(self.folder / "run")

    @property
    def files(self) -> RunDirectory:
        return RunDirectory(self.folder / "run")

    def start(self) -> None:
        result = adept(self.world_size, "run", self.file)
        assert result.returncode == 0, result.stderr

    def resumed(self) -> dict[str, torch.Tensor]:
        """Exported weights after training went on from the checkpoint before the last, as after a crash."""
        shutil.rmtree(self.files.checkpoints / checkpoint_tag(STEPS))
        result = adept(self.world_size, "run", self.file)
        assert result.returncode == 0, result.stderr
        assert f"resuming after step {MIDDLE}" in result.stdout
        return self.finished.weights()

    def rates(self) -> list[float]:
        return [record["lr"] for record in self.finished.steps()]

    def steps(self) -> list[oracle.Batch]:
        """What each step trains on."""
        train, blocks = self.config.train, self._blocks("domain", self.config.data.seq_len)
        return [rows_of_step(blocks, step, train.global_batch_size, train.seed) for step in range(train.steps)]

    def sample(self, corpus: str, sequences: int, batch_sequences: int) -> list[oracle.Batch]:
        """The batches of 'general' or 'domain' text that something is estimated on."""
        config = self.config
        is_general = corpus == "general"
        blocks = self._blocks(corpus, (config.probe if is_general else config.data).seq_len, keep_tail=is_general)
        chosen = block_order(len(blocks), config.probe.seed)[:sequences]
        return [rows(blocks, chosen[first : first + batch_sequences]) for first in range(0, sequences, batch_sequences)]

    def _blocks(self, corpus: str, seq_len: int, *, keep_tail: bool = False) -> Blocks:
        file, cache = self.workspace.root / f"{corpus}.jsonl", self.folder / "oracle"
        return pack([file], self.workspace.model, cache, seq_len=seq_len, keep_tail=keep_tail)
