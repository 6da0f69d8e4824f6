"""A directory with a tiny model and tiny corpora, and the configuration of a run on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml


def write_corpus(path: Path, seed: int, documents: int = 60) -> Path:
    """JSON lines of made-up sentences that a tiny model can learn something from."""
    generator = torch.Generator().manual_seed(seed)
    words = ["matrix", "sum", "the", "of", "norm", "x", "is", "zero", "layer", "seven", "and", "proof"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            picks = torch.randint(len(words), (12,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(words[pick] for pick in picks)}) + "\n")
    return path


@dataclass(frozen=True)
class Workspace:
    """A directory with a tiny model and corpora, and the configuration tree of a run on them."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    def tree(self, run_dir: Path, **sections: Any) -> dict[str, Any]:
        """A small complete run; `sections` are merged over it."""
        tree: dict[str, Any] = {
            "model": str(self.model),
            "run_dir": str(run_dir),
            "data": {
                "seq_len": 32,
                "domain": [str(self.root / "domain.jsonl")],
                "general_eval": [str(self.root / "general_heldout.jsonl")],
                "domain_eval": [str(self.root / "domain_heldout.jsonl")],
                "eval_sequences": 7,
            },
            "probe": {
                "corpus": [str(self.root / "general.jsonl")],
                "sequences": 7,
                "seq_len": 24,
                "max_stack_tokens": 60,
            },
            "expand": {"k": 2},
            "importance": {"every": 2, "sequences": 7, "batch_sequences": 5},
            "train": {
                "steps": 7,
                "lr": 1e-2,
                "global_batch_size": 12,
                "micro_batch_size": 2,
                "checkpoint_every": 3,
                "keep_checkpoints": 3,
                "eval_every": 4,
                "warmup_ratio": 0.3,
                "weight_decay": 0.1,
                "clip_grad_norm": 0.5,
            },
        }
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        return tree

    def config(self, run_dir: Path, **sections: Any) -> Path:
        """The same as a file beside the run directory."""
        path = run_dir.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.tree(run_dir, **sections)), encoding="utf-8")
        return path
