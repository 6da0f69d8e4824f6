"""A configuration with everything looked up: what stages work with. Imports neither torch nor DeepSpeed.

A configuration is resolved and checked once, before ranks meet; after that nobody asks again which directory a model
is in, what DeepSpeed's file says or how a batch falls on ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adept_ds.base.run_dir import RunDirectory
from adept_ds.config.checks import (
    accumulation_steps,
    check_files,
    check_num_copies,
    check_replay,
    check_same_architecture,
)
from adept_ds.config.deepspeed import check_deepspeed_file
from adept_ds.config.schema import Config, Stability
from adept_ds.models.directory import ModelDirectory

Purpose = Literal["run", "probe", "expand", "train", "export", "eval"]
"""What a command does with a configuration, and so what of it has to be there."""


@dataclass(frozen=True)
class ResolvedConfig:
    """What a stage gets."""

    config: Config
    run_dir: RunDirectory
    model: ModelDirectory
    """The base."""
    reference_model: ModelDirectory | None
    """That which the choice of layers is compared with (`probe.stability.model`)."""
    deepspeed: dict[str, Any] | None
    """The user's DeepSpeed configuration; None where no engine is built."""
    accumulation_steps: int | None
    """Micro-batches per rank and optimizer step; None where nothing is trained."""

    @property
    def zero_stage(self) -> int:
        assert self.deepspeed is not None
        return int(self.deepspeed["zero_optimization"]["stage"])


def resolve(config: Config, purpose: Purpose, num_ranks: int = 1) -> ResolvedConfig:
    """Look everything up, and check all that `purpose` needs.

    Raises:
        InputError: one line naming the key, the value and the remedy.
    """
    model = ModelDirectory.resolve("model", config.model)
    check_num_copies(config, model)
    trains, reference = purpose in ("run", "train"), None
    if purpose == "probe" or (trains and config.expand.needs_probe):
        reference = _check_probe(config, model)
    elif trains and config.lr_policy.map != "constant" and config.importance.source == "corpus":
        check_files("probe.corpus", config.probe.corpus)
    if trains:
        _check_corpora(config)
    if purpose == "eval":
        _check_held_out(config)
    deepspeed = None if purpose in ("expand", "export") else check_deepspeed_file(config.deepspeed)
    accumulation = accumulation_steps(config.train, num_ranks) if trains else None
    if trains:
        check_replay(config, num_ranks)
    return ResolvedConfig(config, RunDirectory(config.run_dir), model, reference, deepspeed, accumulation)


def _check_probe(config: Config, model: ModelDirectory) -> ModelDirectory | None:
    """What stage one reads: the corpus, and what the choice of layers is compared with; returns the other model."""
    check_files("probe.corpus", config.probe.corpus)
    stability = config.probe.stability
    if not isinstance(stability, Stability):
        return None
    if stability.corpus is not None:
        check_files("probe.stability.corpus", stability.corpus)
    if stability.model is None:
        return None
    reference = ModelDirectory.resolve("probe.stability.model", stability.model)
    check_same_architecture(config, model, stability.model, reference)
    return reference


def _check_corpora(config: Config) -> None:
    check_files("data.domain", config.data.domain)
    optional = {
        "data.replay": config.data.replay,
        "data.general_eval": config.data.general_eval,
        "data.domain_eval": config.data.domain_eval,
    }
    for key, files in optional.items():
        if files:
            check_files(key, files)


def _check_held_out(config: Config) -> None:
    """One of both corpora at least."""
    if config.data.domain_eval or not config.data.general_eval:
        check_files("data.domain_eval", config.data.domain_eval)
    if config.data.general_eval:
        check_files("data.general_eval", config.data.general_eval)
