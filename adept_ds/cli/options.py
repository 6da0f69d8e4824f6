"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import from_json

from adept_ds.base.outputs import check_new_file
from adept_ds.base.records import Record
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.probing.places import PlaceBenefits
from adept_ds.probing.result import LayerImportance

MethodOption = Annotated[
    str | None, typer.Option(help="mask, taylor, gradient or fisher (probe.method); all compares them")
]
TasksOption = Annotated[
    list[Path] | None, typer.Option(help="directory of tasks: question files, and tasks of lm-eval (eval.tasks)")
]
LmEvalOption = Annotated[
    str | None, typer.Option("--lm-eval", help="tasks that lm-eval knows, such as mmlu,gsm8k (eval.lm_eval)")
]
_LARGEST_RESULT = 100 << 20


ResultOption = Annotated[Path | None, typer.Option(help="write the result here too, as JSON")]


def check_result_file(out: Path | None) -> None:
    """`--out` replaces nothing but an earlier result of a probe. Raises `InputError`."""
    if out is not None and not (out.is_file() and _is_result(out)):
        check_new_file(out, "--out")


def _is_result(path: Path) -> bool:
    if path.is_symlink() or path.stat().st_size > _LARGEST_RESULT:
        return False
    try:
        found = from_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    kinds: tuple[type[Record], ...] = (LayerImportance, PlaceBenefits)
    required = [{name for name, field in kind.model_fields.items() if field.is_required()} for kind in kinds]
    return isinstance(found, dict) and any(found.keys() >= names for names in required)


def with_method(config: Config, method: str | None) -> Config:
    """The configuration with another `probe.method`; `all` is none of them. Raises `InputError` for an unknown one."""
    if method in (None, "all"):
        return config
    tree = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(tree | {"probe": tree.get("probe", {}) | {"method": method}}, "--method")


def tasks_section(tasks: list[Path] | None, lm_eval: str | None) -> dict[str, list[str]]:
    """What the options say, as keys of the section `eval`; without those that are not given."""
    names = [name.strip() for name in (lm_eval or "").split(",")]
    section = {"tasks": [str(path) for path in tasks or []], "lm_eval": [name for name in names if name]}
    return {key: values for key, values in section.items() if values}


def with_tasks(config: Config, tasks: list[Path] | None, lm_eval: str | None) -> Config:
    """The configuration with these tasks instead of its own, as far as they are given."""
    section = tasks_section(tasks, lm_eval)
    if not section:
        return config
    tree = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(tree | {"eval": tree.get("eval", {}) | section}, "--tasks")
