"""What an evaluation found, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from adept_ds.base.terminal import Terminal

_MEASURES = {"accuracy": "accuracy", "accuracy_norm": "length-normalised accuracy"}

Row = tuple[str, list[float]]
"""What it is about, and a value for each model."""


def print_evaluation(results: dict[str, Any], terminal: Terminal) -> None:
    """Held-out losses, by source where a corpus has several; then shares of questions, and what tasks measure.

    Args:
        results: as `Evaluation.to_json`; or {"model": corpora} and {"tasks": {"model": scores}} of a single model.
    """
    models, tasks = _models_in(results), results.get("tasks", {})
    _print("held-out loss (nats)", "{:.4f}", list(models), list(_losses(models)), terminal)
    _print("questions", "{:.1%}", list(models), list(_accuracies(models)), terminal)
    _print("tasks", "{:.4g}", list(tasks), list(_scores(tasks)), terminal)


def _models_in(results: Mapping[str, Any]) -> dict[str, Any]:
    """Corpora by model, from the base to the adapted one."""
    models = {name: of for name, of in results.items() if name not in ("dial", "tasks")}
    adapted = {name: models.pop(name) for name in ("adapted",) if name in models}
    positions = sorted(results.get("dial", []), key=lambda position: position["alpha"])
    return models | {f"alpha={position['alpha']:g}": position["corpora"] for position in positions} | adapted


def _losses(models: Mapping[str, Any]) -> Iterator[Row]:
    for corpus, first in _first(models).items():
        yield f"{corpus} ({first['tokens']} tokens)", [of[corpus]["loss"] for of in models.values()]
        for name, source in first.get("sources", {}).items() if len(first.get("sources", {})) > 1 else ():
            losses = [of[corpus]["sources"][name]["loss"] for of in models.values()]
            yield f"  {name} ({source['tokens']} tokens)", losses


def _accuracies(models: Mapping[str, Any]) -> Iterator[Row]:
    for corpus, first in _first(models).items():
        for name, source in first.get("sources", {}).items():
            for measure, title in _MEASURES.items():
                if measure in source:
                    found = [of[corpus]["sources"][name][measure] for of in models.values()]
                    yield f"{corpus}: {name} ({source['questions']} questions), {title}", found


def _scores(tasks: Mapping[str, Any]) -> Iterator[Row]:
    for task, measures in _first(tasks).items():
        for measure in measures:
            if not measure.endswith("_stderr"):
                yield f"{task}: {measure}", [of[task][measure] for of in tasks.values()]


def _first(models: Mapping[str, Any]) -> Any:
    return next(iter(models.values()), {})


def _print(title: str, form: str, models: list[str], rows: list[Row], terminal: Terminal) -> None:
    """A column per model, and the change from the first to the last; nothing without rows."""
    if not rows:
        return
    compares = len(models) > 1
    table = Table(title, *models, *(["change"] if compares else []))
    for name, values in rows:
        change = [form.replace(":", ":+").format(values[-1] - values[0])] if compares else []
        table.add_row(escape(name), *map(form.format, values), *change)
    terminal.console.print(table)
