"""The files of a study that never took place: losses of documents as one wants them, in `adept eval`'s format."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness.made_up_run import write_lines
from numpy.typing import NDArray
from safetensors.numpy import save_file

from adept_ds.comparison.record import StudyDescription
from adept_ds.comparison.trials import Trial

Array = NDArray[Any]
DIAL = (0.25, 0.5, 0.75)


def write_trial(
    trial: Trial,
    tokens: Mapping[str, Sequence[int]],
    sums: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    accuracy: Mapping[str, Mapping[str, float]] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Trial:
    """Write what a finished trial leaves.

    Args:
        tokens: of each document, by source ('domain/test/NAME').
        sums: of each document's token losses, by model ('base', 'adapted', 'alpha=0.5') and source.
        accuracy: by model and source; None: no evaluation.json.
    """
    trial.run_dir.mkdir(parents=True)
    tensors: dict[str, Array] = {}
    for source, counts in tokens.items():
        tensors[f"ids/{source}"] = np.array([document_id(f"{source} {i}") for i in range(len(counts))])
        tensors[f"tokens/{source}"] = np.array(counts, dtype=np.int64)
        tensors |= {f"loss/{model}/{source}": np.array(of[source], dtype=np.float64) for model, of in sums.items()}
    save_file(tensors, trial.run_dir / "document_losses.safetensors")
    (trial.run_dir / "summary.json").write_text(json.dumps(summary or {}))
    if accuracy is not None:
        corpora = {model: _corpora(tokens, of, accuracy.get(model, {})) for model, of in sums.items()}
        evaluation: dict[str, Any] = {model: corpora.pop(model) for model in ("base", "adapted")}
        dial = [{"alpha": float(model.removeprefix("alpha=")), "corpora": of} for model, of in corpora.items()]
        (trial.run_dir / "evaluation.json").write_text(json.dumps(evaluation | {"dial": dial}))
    return trial


def document_id(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _corpora(
    tokens: Mapping[str, Sequence[int]], sums: Mapping[str, Sequence[float]], accuracy: Mapping[str, float]
) -> dict[str, Any]:
    """As evaluation.json has it, of one model."""
    corpora: dict[str, Any] = {}
    for source, counts in tokens.items():
        corpus, name = source.split("/", 1)
        entry = {"loss": sum(sums[source]) / sum(counts), "tokens": sum(counts), "documents": len(counts)}
        if source in accuracy:
            entry |= {"questions": len(counts), "accuracy": 0.9, "accuracy_norm": accuracy[source]}
        corpora.setdefault(corpus, {"sources": {}})["sources"][name] = entry
    for of in corpora.values():
        tokens_of = {name: source["tokens"] for name, source in of["sources"].items()}
        of["tokens"] = sum(tokens_of.values())
        of["loss"] = sum(n * of["sources"][name]["loss"] for name, n in tokens_of.items()) / of["tokens"]
    return corpora


FOUR = ("general/validation/g", "general/test/g", "domain/validation/d", "domain/test/d")
"""The sources of a study as small as can be."""


def write_small(
    study_dir: Path,
    label: str,
    lr: float,
    seed: int,
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    tokens: Mapping[str, Sequence[int]],
) -> Trial:
    """A trial by its losses per token: model -> source -> of each document."""
    sums = {
        model: {source: [loss * n for loss, n in zip(of[source], tokens[source], strict=True)] for source in of}
        for model, of in losses.items()
    }
    run_dir = study_dir / f"{label} {lr:g} {seed}"
    return write_trial(Trial(label=label, lr=lr, seed=seed, run_dir=run_dir), tokens, sums)


@dataclass(frozen=True)
class Behaviour:
    """Of a made-up method: losses are quadratic in the logarithm of the rate and in the position of the dial."""

    gain: float
    """In domain loss at the best rate, in nats."""
    forgetting: float
    """Rise of general losses there; grows with the square of the dial and with the rate."""
    best_lr: float = 2e-4
    share: float = 1.0
    """Of parameters that train."""
    tokens_per_second: float = 900.0
    overhead_seconds: float = 0.0


METHODS = {
    "full": Behaviour(0.42, 0.16, best_lr=4e-5, tokens_per_second=610),
    "replay": Behaviour(0.36, 0.05, best_lr=4e-5, tokens_per_second=600),
    "llama_pro": Behaviour(0.29, 0.055, share=0.095, tokens_per_second=840),
    "adept": Behaviour(0.33, 0.03, share=0.095, tokens_per_second=820, overhead_seconds=21.0),
    "freeze": Behaviour(0.27, 0.07, best_lr=1e-4, share=0.105, tokens_per_second=880),
    "lora": Behaviour(0.31, 0.085, best_lr=8e-4, share=0.0182, tokens_per_second=700),
}
SOURCES = {
    "general/validation/questions": (60, 3.1, 0.6),
    "general/validation/countries": (50, 2.6, 1.2),
    "general/test/questions": (160, 3.1, 0.6),
    "general/test/news": (140, 2.9, 1.0),
    "domain/validation/mondo": (80, 2.4, 1.0),
    "domain/test/mondo": (300, 2.4, 1.0),
}
"""Number of documents, base loss, how strongly a method acts on it."""


def make_study(
    study_dir: Path,
    methods: Mapping[str, Behaviour] = METHODS,
    *,
    search_seed: int = 0,
    more_seeds: Sequence[int] = (1, 2),
    setting: str = "",
) -> list[Trial]:
    """Three rates around each method's best with the search seed, the best one with the others."""
    trials = []
    for method, behaviour in methods.items():
        for factor in (0.5, 1.0, 2.0):
            lr = behaviour.best_lr * factor
            for seed in (search_seed, *(more_seeds if factor == 1.0 else ())):
                run_dir = study_dir / "cells" / hashlib.sha256(f"{method} {lr:g} {seed}".encode()).hexdigest()[:12]
                trial = Trial(label=method, setting=setting, lr=lr, seed=seed, run_dir=run_dir)
                trials.append(_make_trial(trial, behaviour))
    return trials


def description(**changes: Any) -> StudyDescription:
    facts: dict[str, Any] = {
        "title": "Seven ways to teach a small model medicine",
        "model": "SmolLM2-135M",
        "budget": "61,440 tokens of domain text each (60 steps of 1,024 tokens), fp32, two CPU cores",
        "texts": {"trained on": "MONDO definitions", "replayed and probed": "MMLU dev"},
        "commands": ["adept compare launch/studies/first.yaml"],
    }
    return StudyDescription(**facts | changes)


def _make_trial(trial: Trial, behaviour: Behaviour) -> Trial:
    tokens: dict[str, list[int]] = {}
    sums: dict[str, dict[str, list[float]]] = {}
    off = math.log2(trial.lr / behaviour.best_lr)
    own = np.random.default_rng([trial.seed, *trial.label.encode()])
    luck = own.normal(0, 0.004)
    for number, (source, (documents, base, strength)) in enumerate(SOURCES.items()):
        shared = np.random.default_rng(number)  # documents are the same for every method
        counts = shared.integers(20, 200, documents)
        of_base = base + shared.normal(0, 0.5, documents)
        liking = shared.normal(1, 0.3, documents)
        tokens[source] = counts.tolist()
        for model, alpha in {"base": 0.0, **{f"alpha={a:g}": a for a in DIAL}, "adapted": 1.0}.items():
            change = strength * _change(source, behaviour, off, alpha) + alpha * luck
            losses = of_base + change * liking + alpha * own.normal(0, 0.03, documents)
            sums.setdefault(model, {})[source] = (losses * counts).tolist()
    right = {"base": 0.31, "adapted": 0.31 - behaviour.forgetting / 3}
    accuracy = {model: {"general/test/questions": share} for model, share in right.items()}
    write_trial(trial, tokens, sums, accuracy=accuracy, summary=_summary(behaviour))
    _write_log(trial, behaviour, off)
    return trial


def _change(source: str, behaviour: Behaviour, off: float, alpha: float) -> float:
    """In nats, at a rate that is 2^off times the best."""
    if source.startswith("domain/"):
        return -behaviour.gain * (1 - 0.12 * off**2) * (1 - (1 - alpha) ** 2)
    return behaviour.forgetting * 2**off * alpha**2 - 0.02 * alpha * (1 - alpha)


def _summary(behaviour: Behaviour) -> dict[str, Any]:
    total = 134_515_008
    return {"trainable_parameters": int(total * behaviour.share), "total_parameters": total, "world_size": 1,
            "tokens": 61_440, "seconds": 61_440 / behaviour.tokens_per_second,
            "tokens_per_second": behaviour.tokens_per_second, "overhead_seconds": behaviour.overhead_seconds,
            "peak_memory_bytes": [int(1.1e9 + 1.7e9 * behaviour.share)],
            "learned_bytes": int(4 * total * behaviour.share)}  # fmt: skip


def _write_log(trial: Trial, behaviour: Behaviour, off: float, steps: int = 60) -> None:
    noise = np.random.default_rng([7, trial.seed])
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        fell = behaviour.gain * (1 - 0.12 * off**2) * (1 - math.exp(-step / 15))
        speed = behaviour.tokens_per_second
        if step:
            lines.append({"step": step, "loss": 2.4 - fell + noise.normal(0, 0.08), "tokens": 1024 * step,
                          "seconds": 1024 / speed, "tokens_per_second": speed, "mfu": 0.2, "lr": trial.lr})  # fmt: skip
        if step % 10 == 0:
            losses = {"domain": {"loss": 2.4 - fell, "tokens": 1}, "general": {"loss": 3.0, "tokens": 1}}
            lines.append({"step": step, "eval": losses})
    write_lines(trial.run_dir / "metrics.jsonl", lines)
