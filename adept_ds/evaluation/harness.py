"""Tasks of lm-eval (github.com/EleutherAI/lm-evaluation-harness), by its Python API, in a process of their own.

Usage: python -m adept_ds.evaluation.harness REQUEST RESULT. The process loads the model as transformers does, knows
nothing of ranks, and gives all memory back at its end. `RESULT` is a `HarnessResult`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.lifeline import end_with
from adept_ds.base.records import Record
from adept_ds.base.run_records import Scores

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which libraries would take this process for a rank."""

_POLL_SECONDS = 0.5


class HarnessRequest(Record):
    """What is to be scored."""

    model: str | None
    """A Hugging Face directory; None: nothing is scored, but what could not be is said."""
    tasks: dict[str, str]
    """Names, each with the key of the configuration that asks for it."""
    directories: tuple[str, ...]
    """With descriptions of tasks."""
    precision: str
    """As torch calls it: 'bfloat16'."""
    device: str
    batch_size: int
    max_length: int
    """Tokens."""
    add_bos_token: bool
    """Whether texts begin with the beginning-of-sequence token."""


class HarnessResult(Record):
    """Scores, or why there are none; written anew after each task."""

    scores: Scores = {}  # noqa: RUF012 - a record does not change
    tasks: tuple[str, ...] = ()
    """That were scored."""
    is_whole: bool = False
    complaint: str | None = None


def run_harness(request: HarnessRequest, waiting: Callable[[], None], kept: Path | None = None) -> Scores:
    """The scores of each task, as lm-eval names them.

    Args:
        waiting: called every so often until it is done; an error that it raises ends the work.
        kept: a file in which scores are kept, task by task; what is there is not scored again.

    Raises:
        InputError: lm-eval does not know a task, or its data is not at hand.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", kept or Path(folder) / "result.json"
        request.save(asked)
        command = [sys.executable, "-m", "adept_ds.evaluation.harness", str(asked), str(answered)]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        process = subprocess.Popen(command, env=environment)
        try:
            while process.poll() is None:
                waiting()
                _wait(process)
        finally:
            process.kill()
            process.wait()
        result = _so_far(answered)
    if result.complaint is not None:
        raise InputError(result.complaint)
    if not result.is_whole:
        raise InputError(f"lm-eval ended with exit code {process.returncode}; the log says why")
    return result.scores


def _so_far(file: Path) -> HarnessResult:
    try:
        return HarnessResult.load(file)
    except InputError:
        return HarnessResult()


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return


# --- in the other process ---------------------------------------------------------------------------------------------


def main() -> None:
    end_with([os.getppid()])
    score(HarnessRequest.load(Path(sys.argv[1])), Path(sys.argv[2]))


def score(request: HarnessRequest, answer: Path) -> None:
    """Write the `HarnessResult`; what of it is there already is taken over."""
    so_far = _so_far(answer).model_copy(update={"complaint": None})
    so_far.save(answer)
    try:
        result = _scored(request, so_far, answer)
    except InputError as error:
        result = so_far.model_copy(update={"complaint": str(error)})
    result.save(answer)


def _scored(request: HarnessRequest, so_far: HarnessResult, answer: Path) -> HarnessResult:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = "eval.lm_eval" in request.tasks.values()  # the thousands that come with it take seconds to read
    manager = TaskManager(include_path=list(request.directories) or None, include_defaults=own)
    for name, key in request.tasks.items():
        _check_task(manager, name, key)
    if request.model is None:
        return HarnessResult(is_whole=True)
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=request.model,
        dtype=request.precision,
        device=request.device,
        batch_size=request.batch_size,
        max_length=request.max_length,
        add_bos_token=request.add_bos_token,
    )
    scores, done = dict(so_far.scores), so_far.tasks
    for name in request.tasks:
        if name in so_far.tasks:
            continue
        found = simple_evaluate(model, tasks=[name], task_manager=manager, log_samples=False, bootstrap_iters=1000)
        assert found is not None  # on the only rank
        counts = found["n-samples"]
        scores |= {task: _measures(of, counts.get(task)) for task, of in found["results"].items()}
        done = (*done, name)
        HarnessResult(scores=scores, tasks=done).save(answer)
    return HarnessResult(scores=scores, tasks=done, is_whole=True)


def _check_task(manager: Any, name: str, key: str) -> None:
    """It is known, and its data can be loaded. Raises `InputError`."""
    if name not in manager.task_index:
        raise InputError(f"{key}: '{name}' is no task of lm-eval; `lm-eval ls tasks` lists them")
    try:
        manager.load([name])
    except Exception as error:  # of any library that data sets are loaded with
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"{key}: the data of '{name}' is not at hand ({reason}); load it once with network access "
            f"(`lm-eval run --model dummy --tasks {name} --limit 1`), or leave the task out"
        ) from None


def _measures(found: dict[str, Any], counts: dict[str, int] | None) -> dict[str, float]:
    """Numbers by measure: 'acc', 'acc_stderr', 'exact_match,strict-match'."""
    measures = {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if "," in name and isinstance(value, int | float)
    }
    return measures | ({"questions": float(counts["effective"])} if counts else {})


if __name__ == "__main__":
    main()
