"""An export is a model that the evaluation harness takes as it is: by its own command line, offline, on a new task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.trained_run import TrainedRun

pytestmark = pytest.mark.skipif(
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


def test_the_harness_own_command_line_scores_an_export_offline(trained_run: TrainedRun, tmp_path: Path) -> None:
    export = trained_run.files.export
    write_task(tmp_path / "tasks")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={export}"]
    command += ["--tasks", "sums", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    offline = {f"{library}_OFFLINE": "1" for library in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
    result = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out"), "--log_samples"],
        env=os.environ | offline | {"HF_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    expected = [choice == question["answer"] for choice, question in zip(chosen(export), QUESTIONS, strict=True)]
    found = json.loads(results.read_text())["results"]["sums"]
    assert found["acc,none"] == pytest.approx(sum(expected) / len(expected))
    (samples,) = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [bool(line["acc"]) for line in lines] == expected
