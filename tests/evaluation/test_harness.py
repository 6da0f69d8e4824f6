"""Tasks of lm-eval, scored by lm-eval itself; on the same items its accuracies are those that the program finds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from harness.complaints import assert_one_line
from harness.launching import adept
from harness.models import save_tiny_model
from harness.own_task import needs_lm_eval
from harness.packing import write_records
from harness.questions import made_up_questions

from adept_ds.base.errors import StopRequestedError
from adept_ds.evaluation import harness
from adept_ds.evaluation.harness import HarnessRequest, HarnessResult, run_harness

pytestmark = needs_lm_eval

COUNT = 50


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS"):
        monkeypatch.setenv(f"{library}_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("harness") / "model", num_hidden_layers=2)


def write_task(directory: Path, **changes: Any) -> Path:
    """A file of questions, and a description that asks them as the program does."""
    questions = write_records(directory / "made_up.jsonl", *made_up_questions(COUNT))
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task: dict[str, Any] = {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": metrics,
    }
    (directory / "made_up.yaml").write_text(yaml.safe_dump(task | changes))
    return directory


def test_on_the_same_items_both_find_the_same_to_the_last_one(model: Path, tmp_path: Path) -> None:
    """On two ranks, of which lm-eval, beside rank 0, knows nothing."""
    tasks = write_task(tmp_path / "tasks")
    result = adept(2, "eval", model, "--tasks", tasks, "--json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)["tasks"]["model"]
    ours, theirs = scores["made_up.jsonl"], scores["made_up"]
    assert ours["questions"] == theirs["questions"] == COUNT
    for name, theirs_name in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        assert round(ours[name] * COUNT) == round(theirs[theirs_name] * COUNT)
        assert ours[f"{name}_stderr"] == pytest.approx(theirs[f"{theirs_name}_stderr"], rel=1e-9)
    assert 0 < ours["accuracy"] < 1 and ours["accuracy"] != ours["accuracy_norm"]


def test_a_task_that_lm_eval_does_not_know_is_named_in_one_line(model: Path) -> None:
    result = adept(1, "eval", model, "--lm-eval", "no_such_task", "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, ["eval.lm_eval: 'no_such_task' is no task of lm-eval", "lm-eval ls tasks"])


def test_data_that_is_not_at_hand_is_laid_to_the_task(model: Path, tmp_path: Path) -> None:
    tasks = write_task(tmp_path / "tasks", dataset_kwargs={"data_files": {"test": str(tmp_path / "gone.jsonl")}})
    result = adept(1, "eval", model, "--tasks", tasks)
    assert result.returncode == 2
    assert_one_line(
        result.stderr, ["eval.tasks: the data of 'made_up' is not at hand", "gone.jsonl", "--tasks made_up"]
    )


def test_who_is_asked_to_stop_does_not_wait_for_lm_eval(model: Path) -> None:
    request = HarnessRequest(
        model=str(model),
        tasks={"mmlu": "eval.lm_eval"},
        directories=(),
        precision="float32",
        device="cpu",
        batch_size=1,
        max_length=64,
        add_bos_token=False,
    )

    def stop() -> None:
        raise StopRequestedError("stopped")

    start = time.monotonic()
    with pytest.raises(StopRequestedError):
        run_harness(request, stop)
    assert time.monotonic() - start < 5


def test_tasks_that_were_scored_before_an_end_are_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the other process, with libraries that count how often they are asked, and are killed at the second task."""
    asked = list[str]()

    def simple_evaluate(model: object, tasks: list[str], **_: object) -> dict[str, Any]:
        asked.extend(tasks)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"n-samples": {}, "results": {tasks[0]: {"acc,none": len(tasks[0]) / 10}}}

    manager = SimpleNamespace(task_index=["one", "three"], load=lambda names: None)
    packages: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": lambda **_: manager},
        "lm_eval.models.huggingface": {"HFLM": lambda **_: None},
    }
    for name, members in packages.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    request = HarnessRequest(
        model="model",
        tasks={"one": "eval.tasks", "three": "eval.tasks"},
        directories=(),
        precision="float32",
        device="cpu",
        batch_size=1,
        max_length=64,
        add_bos_token=False,
    )
    answer = tmp_path / "lm_eval.json"
    with pytest.raises(KeyboardInterrupt):
        harness.score(request, answer)
    assert not HarnessResult.load(answer).is_whole
    harness.score(request, answer)
    assert asked == ["one", "three", "three"]
    result = HarnessResult.load(answer)
    assert result.is_whole
    assert result.scores == {"one": {"acc": 0.3}, "three": {"acc": 0.5}}
