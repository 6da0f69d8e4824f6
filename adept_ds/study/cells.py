"""A cell of a study: a method with a setting, a learning rate and a seed, which is a run directory of its own.

A cell is known by its inputs: its configuration with the contents of all files that it names, and the version of the
program. So it is found again wherever the study lies, and one whose inputs change is another cell, beside the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adept_ds.base.digests import json_digest
from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.version import __version__
from adept_ds.comparison.trials import Timing, Trial
from adept_ds.config.deepspeed import check_deepspeed_file
from adept_ds.config.layer_sections import Stability
from adept_ds.config.method import EVERY_KEY
from adept_ds.config.schema import Config
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.identity import Identity
from adept_ds.study.cell_records import CellRecord
from adept_ds.study.directory import CELL_RECORD, FAILURE_RECORD, OUTPUT_LOG
from adept_ds.study.naming import slug
from adept_ds.study.variants import Variant

_HOW: dict[str, Any] = {
    "run_dir": True,
    "dist_timeout_minutes": True,
    "preset": True,
    "data": {"workers"},
    "train": {
        "checkpoint_every",
        "keep_checkpoints",
        "keep_gathered_gib",
        "activation_checkpointing",
        "kernels",
        "compile",
        "max_skipped",
    },
    "checkpoint": True,
    "logging": True,
    "anchor": {"cache_mib"},
}
"""Keys that say how a run is done, but not what comes out; of a preset, its values do."""

_NEUTRAL: dict[str, dict[str, Any]] = {
    "train": {"writer_lr_ratio": 1.0, "copy_dropout": 0.0},
    "expand": {"tie_break": "none"},
}
"""Keys that do nothing with these values: what ran before they were there is found again."""


@dataclass(frozen=True, eq=False)
class Cell:
    """What is to be run, or has been."""

    variant: Variant
    lr: float
    seed: int
    config: Config
    inputs: dict[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        return json_digest(self.inputs)

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.run_dir)

    @property
    def title(self) -> str:
        """For people."""
        return self.trial().name

    @property
    def record(self) -> CellRecord:
        return CellRecord(
            label=self.variant.label,
            setting=self.variant.setting,
            lr=self.lr,
            seed=self.seed,
            fingerprint=self.fingerprint,
            inputs=self.inputs,
        )

    @property
    def log(self) -> Path:
        return self.run.root / OUTPUT_LOG

    @property
    def failure(self) -> Path:
        return self.run.root / FAILURE_RECORD

    @property
    def is_begun(self) -> bool:
        """Whether its directory is there, and is of these very inputs."""
        record = self.run.root / CELL_RECORD
        return record.is_file() and CellRecord.load(record).fingerprint == self.fingerprint

    @property
    def is_finished(self) -> bool:
        results = [self.run.evaluation, self.run.document_losses]
        results += [self.run.task_scores] if self.config.eval.scores_tasks else []
        return self.is_begun and all(file.is_file() for file in results)

    def trial(self, shared_seconds: float = 0.0, timing: Timing | None = None) -> Trial:
        variant = self.variant
        return Trial(
            label=variant.label,
            setting=variant.setting,
            lr=self.lr,
            seed=self.seed,
            run_dir=self.run.root,
            shared_seconds=shared_seconds,
            timing=timing,
        )


def make_cell(variant: Variant, config: Config, identity: Identity, cells: Path) -> Cell:
    """A cell, named by what it is and by the beginning of its fingerprint.

    Args:
        config: with any `run_dir`.
    """
    inputs = inputs_of(config, identity)
    train, digits = config.train, json_digest(inputs)[:8]
    parts = [variant.label, variant.setting, f"lr{train.lr:g}", f"seed{train.seed}", digits]
    name = "_".join(slug(part) for part in parts if part)
    placed = config.model_copy(update={"run_dir": cells / name})
    return Cell(variant, train.lr, train.seed, placed, inputs)


def inputs_of(config: Config, identity: Identity) -> dict[str, Any]:
    """All that decides what comes out of a run, files by content, as JSON."""
    tree = config.model_dump(mode="json", exclude=_HOW)
    model = ModelDirectory.resolve("model", config.model)
    for section in _NEUTRAL.keys() & tree.keys():
        given, neutral = tree[section], _NEUTRAL[section].items()
        tree[section] = {key: value for key, value in given.items() if (key, value) not in neutral}
    tree["adept_ds"] = __version__
    tree["model"] = identity.model(model)
    tree["deepspeed"] = check_deepspeed_file(config.deepspeed)
    tree["method"] = config.method.model_dump(mode="json", context=EVERY_KEY)
    data, probe = config.data, config.probe
    for key in ("domain", "replay", "general_eval", "domain_eval"):
        entries = getattr(data, key)
        names = [source.title for source in entries if not isinstance(source, Path)]
        tree["data"][key] = [names, identity.corpus(f"data.{key}", entries)]
    if config.needs_probe or config.reads_general_text:
        tree["probe"]["corpus"] = identity.corpus("probe.corpus", probe.corpus)
        if isinstance(probe.stability, Stability) and probe.stability.corpus is not None:
            tree["probe"]["stability"] = identity.corpus("probe.stability.corpus", probe.stability.corpus)
    else:
        tree["probe"] = {"seed": probe.seed}  # expand.choose: random goes by it
    if config.guard and config.guard.action == "warn":  # changes nothing of what comes out
        del tree["guard"]
    if config.anchor:
        tree["anchor"]["corpus"] = identity.corpus("anchor.corpus", config.anchor.corpus)
    tree["eval"]["tasks"] = [_tree_digest(identity, folder) for folder in config.eval.tasks]
    return tree


def _tree_digest(identity: Identity, folder: Path) -> str:
    if not folder.is_dir():
        raise InputError(f"evaluation.tasks: '{folder}' is no directory; give one with task files")
    return identity.digests.tree(folder)
