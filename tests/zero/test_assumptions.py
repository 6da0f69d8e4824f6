"""A DeepSpeed that lacks what is taken for granted of it: found when an engine is made. Trainings show that the
installed one lacks nothing."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import adept_ds.zero
from adept_ds.base.errors import LayoutError
from adept_ds.zero.assumptions import OF_ENGINES, OF_FRAGMENTS, OF_PARAMETERS, WRITTEN_AGAINST, check_assumptions


def with_names(names: tuple[str, ...], **more: Any) -> Any:
    """An object of which each of these can be asked, however many dots it has."""
    made = SimpleNamespace(**more)
    for name in names:
        *owners, last = name.split(".")
        here = made
        for owner in owners:
            if not hasattr(here, owner):
                setattr(here, owner, SimpleNamespace())
            here = getattr(here, owner)
        if not hasattr(here, last):
            setattr(here, last, SimpleNamespace())
    return made


def engine_without(stage: int, engine_lacks: str = "", parameter_lacks: str = "") -> Any:
    of_parameter = OF_PARAMETERS[stage] + (() if stage == 3 else OF_FRAGMENTS)
    trained = with_names(tuple(name for name in of_parameter if name != parameter_lacks), requires_grad=True)
    frozen = SimpleNamespace(requires_grad=False)
    return with_names(
        tuple(name for name in OF_ENGINES[stage] if name != engine_lacks),
        module=SimpleNamespace(parameters=lambda: [frozen, trained]),
        zero_optimization_stage=lambda: stage,
    )


@pytest.mark.parametrize("stage", OF_ENGINES)
def test_a_deepspeed_that_has_all_of_it_is_taken(stage: int) -> None:
    check_assumptions(engine_without(stage))


@pytest.mark.parametrize(
    ("stage", "lacks"),
    [
        *((stage, {"engine_lacks": name}) for stage, names in OF_ENGINES.items() for name in names),
        *((3, {"parameter_lacks": name}) for name in OF_PARAMETERS[3]),
        *((stage, {"parameter_lacks": name}) for stage in (1, 2) for name in OF_FRAGMENTS),
    ],
)
def test_each_name_that_is_missing_is_named(stage: int, lacks: dict[str, str]) -> None:
    (name,) = lacks.values()
    with pytest.raises(LayoutError, match=f"no {name}") as caught:
        check_assumptions(engine_without(stage, **lacks))
    assert str(caught.value).endswith(f"install deepspeed=={WRITTEN_AGAINST}")


def test_everything_private_that_is_touched_is_looked_for() -> None:
    """Of names with an underscore, and those of DeepSpeed's parameters."""
    looked_for = {
        part
        for names in (*OF_ENGINES.values(), *OF_PARAMETERS.values(), OF_FRAGMENTS)
        for name in names
        for part in name.split(".")
    }
    touched = {
        node.attr: f"{path.name}:{node.lineno}"
        for path in Path(adept_ds.zero.__path__[0]).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith(("_", "ds_"))
        and not node.attr.endswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    assert len(touched) > 10, "it looks at the right files"
    assert {name: where for name, where in touched.items() if name not in looked_for} == {}
