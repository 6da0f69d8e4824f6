"""A study of a tiny model on tiny texts, and what it has left behind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from harness.launching import ROOT, free_port, rank_environment
from harness.packing import write_records
from harness.questions import made_up_questions
from harness.rank_processes import RankProcess
from harness.workspace import write_corpus


@dataclass(frozen=True)
class TinyStudy:
    """In a directory with a model and texts of its own."""

    root: Path
    model: Path

    @property
    def study_dir(self) -> Path:
        return self.root / "study"

    @property
    def file(self) -> Path:
        return self.root / "study.yaml"

    def write_texts(self) -> None:
        for seed, name in enumerate(("general", "general_validation", "general_test")):
            write_corpus(self.root / f"{name}.jsonl", seed, 20)
        write_corpus(self.root / "domain.jsonl", 7, 120)
        write_records(self.root / "tasks" / "quiz.jsonl", *made_up_questions(6))

    def tree(self, **changes: Any) -> dict[str, Any]:
        """STUDY.yaml: two methods, two learning rates, one seed to search and one to confirm."""
        texts = {
            name: [str(self.root / f"{name}.jsonl")]
            for name in ("domain", "general", "general_validation", "general_test")
        }
        tree: dict[str, Any] = {
            "study_dir": str(self.study_dir),
            "base": {
                "model": str(self.model),
                "data": {"seq_len": 32},
                "probe": {"sequences": 6, "seq_len": 24},
                "expand": {"k": 2},
                "importance": {"every": 2, "sequences": 4, "batch_sequences": 4},
                "train": {"global_batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 1},
            },
            "domain": {"sources": texts["domain"], "validation": 0.2, "test": 0.2},
            "general": {
                "train": texts["general"],
                "validation": texts["general_validation"],
                "test": texts["general_test"],
            },
            "methods": ["full", "adept"],
            "learning_rates": {"start": 1e-3, "count": 2},
            "seeds": {"search": [0], "confirm": [1]},
            "budget": {"tokens": 4 * 128},
            "dial": [0.5],
            "evaluation": {"sequences": 6, "tasks": [str(self.root / "tasks")]},
            "threads": 1,
        }
        return tree | changes

    def write(self, **changes: Any) -> Path:
        self.file.write_text(yaml.safe_dump(self.tree(**changes)), encoding="utf-8")
        return self.file

    def start(self, *arguments: str) -> RankProcess:
        """`adept compare`, with runs that are forked (see `harness.compare_worker`)."""
        command = ["-m", "harness.compare_worker", "compare", str(self.file), *arguments]
        return RankProcess(command, rank_environment(0, 1, free_port()), ROOT)

    def cells(self) -> dict[str, Path]:
        """Run directories by name without fingerprint."""
        return {path.name.rpartition("_")[0]: path for path in sorted((self.study_dir / "cells").glob("*"))}

    def steps_run(self) -> Counter[tuple[str, int]]:
        """How often each step of each cell stands in a log."""
        return Counter(
            (name, line["step"])
            for name, run in self.cells().items()
            for line in map(json.loads, _lines(run / "metrics.jsonl"))
            if "loss" in line
        )

    def said(self, words: str) -> dict[str, int]:
        """How often each cell's output has these words."""
        return {name: (run / "output.log").read_text().count(words) for name, run in self.cells().items()}

    def losses(self) -> Mapping[str, Any]:
        """All results that do not depend on time: of every trial in compare.json."""
        comparison = json.loads((self.study_dir / "compare.json").read_text())
        return {trial["run_dir"]: trial["losses"] for trial in comparison["trials"]} | {
            arm["name"]: arm["chosen"] for arm in comparison["arms"]
        }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
