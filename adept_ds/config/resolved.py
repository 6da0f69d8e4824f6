"""A configuration with everything looked up: what stages work with. Imports neither torch nor DeepSpeed.

A configuration is resolved and checked once, before ranks meet; after that nobody asks again which directory a model
is in, what DeepSpeed's file says or how a batch falls on ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from adept_ds.base.run_dir import RunDirectory
from adept_ds.config.checks import (
    accumulation_steps,
    anchor_shape,
    check_anchor,
    check_files,
    check_num_copies,
    check_replay,
    check_same_architecture,
)
from adept_ds.config.corpus_entries import CorpusFiles
from adept_ds.config.deepspeed_merge import deepspeed_of_run
from adept_ds.config.layer_sections import Stability
from adept_ds.config.schema import Config
from adept_ds.config.trackers import check_trackers
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.tokenizer_files import check_tokenizer
from adept_ds.models.weight_files import tensor_shapes

Purpose = Literal["run", "probe", "expand", "train", "export", "eval", "dial"]
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
    """The user's DeepSpeed configuration, merged with this one; None where no engine is built."""
    accumulation_steps: int | None
    """Micro-batches per rank and optimizer step, the anchor's included; None where nothing is trained."""

    @property
    def zero_stage(self) -> int:
        return int(self._zero["stage"])

    @property
    def offload(self) -> Literal["none", "optimizer", "parameters", "both"]:
        """What ZeRO keeps on the host."""
        parts = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        there = [part for part, key in parts.items() if (self._zero.get(key) or {}).get("device", "none") != "none"]
        return "both" if len(there) > 1 else there[0] if there else "none"  # type: ignore[return-value]

    @property
    def _zero(self) -> Mapping[str, Any]:
        assert self.deepspeed is not None
        section: Mapping[str, Any] = self.deepspeed["zero_optimization"]
        return section


def resolve(config: Config, purpose: Purpose, num_ranks: int = 1) -> ResolvedConfig:
    """Look everything up, and check all that `purpose` needs.

    Raises:
        InputError: one line naming the key, the value and the remedy.
    """
    model = ModelDirectory.resolve("model", config.model)
    if purpose not in ("eval", "export", "dial") and config.method.chooses_layers:
        check_num_copies(config, model)
    config.method.check_model(model, partial(tensor_shapes, model.path))
    trains, reference = purpose in ("run", "train"), None
    for key, corpus in corpora_read(config, purpose).items():
        check_files(key, corpus)
    if purpose == "probe" or (trains and config.needs_probe):
        reference = _reference_model(config, model)
    if purpose not in ("expand", "export"):
        check_tokenizer(model, config.data.bos, _seq_lens(config, purpose))
    steps = accumulation_steps(config.train, num_ranks) if trains else None
    deepspeed = None if purpose in ("expand", "export") else deepspeed_of_run(config, model, num_ranks, steps)
    accumulation = None if steps is None else steps + anchor_shape(config, num_ranks)[0]
    if trains:
        check_trackers(config.logging)
        check_replay(config, num_ranks)
        check_anchor(config, model)
    return ResolvedConfig(config, RunDirectory(config.run_dir), model, reference, deepspeed, accumulation)


def _seq_lens(config: Config, purpose: Purpose) -> dict[str, int]:
    """Tokens of the sequences that the model is given, by key."""
    probes = purpose not in ("eval", "dial") and (purpose == "probe" or config.needs_probe or config.reads_general_text)
    lengths = {"data.seq_len": config.data.seq_len} if purpose != "probe" else {}
    return lengths | ({"probe.seq_len": config.probe.seq_len} if probes else {})


def corpora_read(config: Config, purpose: Purpose) -> dict[str, Sequence[Path | CorpusFiles]]:
    """What is read, by key; one that is needed but not given is empty."""
    data, stability, trains = config.data, config.probe.stability, purpose in ("run", "train")
    probes = purpose == "probe" or (trains and config.needs_probe)
    needed: dict[str, Sequence[Path | CorpusFiles]] = {}
    if probes or (trains and config.reads_general_text):
        needed["probe.corpus"] = config.probe.corpus
    if probes and isinstance(stability, Stability) and stability.corpus is not None:
        needed["probe.stability.corpus"] = stability.corpus
    if trains or (probes and config.weighs_places):
        needed["data.domain"] = data.domain
    if purpose == "eval" and not (data.general_eval or config.eval.scores_tasks):
        needed["data.domain_eval"] = data.domain_eval
    held_out: dict[str, Sequence[Path | CorpusFiles]] = {
        "data.general_eval": data.general_eval,
        "data.domain_eval": data.domain_eval,
    }
    mixed_in = {"data.replay": data.replay, "anchor.corpus": config.anchor.corpus if config.anchor else []}
    evaluates = purpose in ("eval", "dial")
    optional = (mixed_in | held_out) if trains else held_out if evaluates else {}
    return needed | {key: corpus for key, corpus in optional.items() if corpus}


def _reference_model(config: Config, model: ModelDirectory) -> ModelDirectory | None:
    """That which the choice of layers is compared with."""
    stability = config.probe.stability
    if not isinstance(stability, Stability) or stability.model is None:
        return None
    reference = ModelDirectory.resolve("probe.stability.model", stability.model)
    check_same_architecture(config, model, stability.model, reference)
    return reference
