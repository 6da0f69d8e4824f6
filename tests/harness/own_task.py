"""A task of lm-eval as a user writes it, and what a model must score on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

needs_lm_eval = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("lm_eval", "evaluate", "peft")),
    reason="the extra is not installed: pip install -e '.[eval]'",
)

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 1), "many"], "answer": 0}
    for a in range(2, 6)
    for b in range(1, 4)
]


def write_task(directory: Path) -> None:
    """Multiple choice, as a user writes it: a description and JSON lines beside it."""
    directory.mkdir()
    questions = directory / "sums.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "sums.yaml").write_text(yaml.safe_dump(task))


def chosen(model_dir: Path) -> list[int]:
    """What the model itself chooses: the likeliest continuation, in plain PyTorch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def likelihood(question: str, answer: str) -> float:
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, " " + answer))
        tokens = torch.tensor([before + after])
        with torch.no_grad():
            log_probabilities = model(tokens).logits[0, :-1].log_softmax(-1)
        return float(log_probabilities.gather(1, tokens[0, 1:, None])[-len(after) :].sum())

    likelihoods = [[likelihood(q["question"], choice) for choice in q["choices"]] for q in QUESTIONS]
    return [max(range(len(values)), key=values.__getitem__) for values in likelihoods]


def scored_by_the_command_line(model_dir: Path, folder: Path) -> tuple[float, list[bool]]:
    """Accuracy, and whether each question was answered rightly, as `lm-eval` says, offline, in `folder`."""
    write_task(folder / "tasks")
    command = shutil.which("lm-eval", path=str(Path(sys.executable).parent))
    assert command is not None
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={model_dir}", "--tasks", "sums"]
    arguments += ["--include_path", str(folder / "tasks"), "--device", "cpu"]
    offline = {f"{library}_OFFLINE": "1" for library in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
    result = subprocess.run(
        [command, *arguments, "--output_path", str(folder / "out"), "--log_samples"],
        env=os.environ | offline | {"HF_HOME": str(folder / "cache")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_sums_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"]["sums"]["acc,none"], [bool(line["acc"]) for line in lines]


def expected_scores(model_dir: Path) -> list[bool]:
    """The same by the model itself, in plain PyTorch."""
    return [choice == question["answer"] for choice, question in zip(chosen(model_dir), QUESTIONS, strict=True)]
