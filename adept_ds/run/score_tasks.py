"""Scores of the base and the adapted model on tasks (docs/evaluation.md).

Stages of the ledger:
    tasks_base    task_scores_base.json: the same in every run on these tasks
    tasks         task_scores.json: all models
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adept_ds.base.run_records import Accuracy, Scores, TaskScores
from adept_ds.data.task_files import TaskFiles, task_questions
from adept_ds.evaluation.harness import HarnessRequest, run_harness
from adept_ds.evaluation.questions import QuestionSet, accuracies, longest_text
from adept_ds.methods.shape import method_of
from adept_ds.models.device import current_device
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.context import Context
from adept_ds.run.identity import reading_settings
from adept_ds.run.ledger import Stage
from adept_ds.run.loaded import evaluator_of, turned


def tasks_stage(run: Context, adapted: ModelDirectory) -> TaskScores:
    """Of both models, and at the positions of `eval.dial` on files of questions."""
    files = run.run_dir

    def score_base(unfinished: Unfinished) -> None:
        (scores,) = score_model(run, run.settings.model, "base", unfinished=unfinished)
        run.ranks.on_main(lambda: TaskScores(models={"base": scores}).save(files.base_task_scores))

    def score_adapted(unfinished: Unfinished) -> None:
        dial = run.settings.config.eval.dial
        scores = score_model(run, adapted, "adapted", (1.0, *dial), unfinished)
        names = ["adapted", *(f"alpha={alpha:g}" for alpha in dial)]
        of_base = run.ranks.on_main(lambda: TaskScores.load(files.base_task_scores)).models
        models = of_base | dict(zip(names, scores, strict=True))
        run.ranks.on_main(lambda: TaskScores(models=models).save(files.task_scores))

    run.ledger.once(Stage("tasks_base", files.base_task_scores, lambda: _inputs(run, [run.settings.model])), score_base)
    stage = Stage("tasks", files.task_scores, lambda: _inputs(run, [run.settings.model, adapted]))
    if run.ledger.once(stage, score_adapted):
        run.terminal.stage("tasks", str(files.task_scores))
    else:
        run.unchanged("tasks")
    return run.ranks.on_main(lambda: TaskScores.load(files.task_scores))


def score_model(
    run: Context,
    model: ModelDirectory,
    title: str,
    positions: Sequence[float] = (1.0,),
    unfinished: Unfinished | None = None,
) -> list[Scores]:
    """Of a model as it is; then on files of questions, at the other positions of the dial.

    Args:
        unfinished: where answers are kept, pass by pass, and those to lm-eval task by task.

    Raises:
        InputError: a file has something else than questions; or as `run_harness`.
    """
    tasks = run.ranks.on_main(lambda: _tasks(run))
    sets = run.ranks.on_main(lambda: _question_sets(run, tasks))
    kept = unfinished or Unfinished()
    found = [*_on_questions(run, sets, model, title, positions, kept)] if sets else [{} for _ in positions]
    if tasks.harness:
        asking = f"asking {title} by lm-eval"
        found[0] |= run.ranks.on_main(lambda: _by_harness(run, tasks, model, asking, kept.file("lm_eval.json")))
    return found


def _tasks(run: Context) -> TaskFiles:
    return TaskFiles.find(run.settings.config.eval)


def _question_sets(run: Context, tasks: TaskFiles) -> dict[str, QuestionSet]:
    data, tokenizer = run.settings.config.data, run.corpora.tokenizer_of_documents
    return {
        name: QuestionSet.of(task_questions(path, data), tokenizer, run.settings.model)
        for name, path in tasks.questions.items()
    }


def _on_questions(
    run: Context,
    sets: dict[str, QuestionSet],
    model: ModelDirectory,
    title: str,
    positions: Sequence[float],
    unfinished: Unfinished,
) -> Iterator[Scores]:
    with evaluator_of(run, model) as evaluator:
        for where in turned(run, evaluator, model, f"asking {title}", positions):
            with run.progress.together(where) as bar:
                found = accuracies(evaluator, sets, bar, unfinished.work(where))
            yield {name: _scores(of_set) for name, of_set in found.items()}


def _scores(found: Accuracy) -> dict[str, float]:
    return {measure: float(value) for measure, value in found.to_json().items() if value is not None}


def check_harness(run: Context) -> None:
    """lm-eval knows the tasks that it is to score, and has their data; not asked where it scored some before.

    Raises:
        InputError: as `run_harness`.
    """

    def check() -> None:
        tasks = _tasks(run)
        if tasks.harness and not run.run_dir.base_task_scores.is_file():
            _by_harness(run, tasks, None, "looking for tasks of lm-eval")

    run.ranks.on_main(check)


def _by_harness(
    run: Context, tasks: TaskFiles, model: ModelDirectory | None, title: str, kept: Path | None = None
) -> Scores:
    request = HarnessRequest(
        model=str(model.path) if model else None,
        tasks=tasks.harness,
        directories=tuple(str(path.resolve()) for path in tasks.directories),
        precision=str(run.precision).removeprefix("torch."),
        device=str(current_device()),
        batch_size=run.settings.config.train.micro_batch_size,
        max_length=longest_text(model or run.settings.model),
        add_bos_token=run.corpora.tokenizer_of_documents.bos_id is not None,
    )
    with run.progress.on_main(title) as bar:
        return run_harness(request, lambda: bar(0.0, ", ".join(tasks.harness)), kept)


def _inputs(run: Context, models: Sequence[ModelDirectory]) -> dict[str, Any]:
    config, tasks = run.settings.config, _tasks(run)
    dial = [method_of(config).dial, config.eval.dial] if len(models) > 1 and config.eval.dial else []
    return {
        "models": [run.identity.model(model) for model in models],
        "tasks": {str(number): run.identity.digests.tree(path) for number, path in enumerate(tasks.directories)},
        "lm_eval": [*tasks.harness, _version() if tasks.harness else ""],
        "dial": dial,
        "reading": reading_settings(config.data),
        "precision": run.precision_name,
    }


def _version() -> str:
    """Of lm-eval: another one may ask in another way."""
    return version("lm_eval")
