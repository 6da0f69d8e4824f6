"""What the user writes: the configuration, overrides, DeepSpeed's file, templates of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hjson
import pytest
import yaml
from harness.fuzzing import Fuzzing, Kind, Sandbox, file_kind, judged
from harness.launching import ROOT
from harness.mutations import ODD_TEXTS, YAML_SCALARS, changed_json, changed_yaml, spoiled
from harness.trainer_files import trainer_file
from harness.workspace import Workspace
from hypothesis import strategies as st

from adept_ds.base.errors import InputError
from adept_ds.config.loading import dump_config, load_config
from adept_ds.config.question_template import DEFAULT_TEMPLATE, check_template, render_question
from adept_ds.config.resolved import resolve
from adept_ds.config.run_directory import check_run_dir
from adept_ds.config.schema import Config
from adept_ds.zero.user_config import check_user_config


def load_and_resolve(sandbox: Sandbox, *overrides: str) -> None:
    """As `adept run` does before anything heavy."""
    config = load_config(sandbox.inputs / "run.yaml", overrides)
    settings = resolve(config, "run")
    check_run_dir(config, settings.model.path)
    assert config.deepspeed is None or settings.deepspeed is not None
    if config.deepspeed is not None:
        check_user_config(config.deepspeed, settings.deepspeed or {})
    dump_config(config)


def prepare(sandbox: Sandbox) -> Sandbox:
    """Also with DeepSpeed's file, which has everything in it that the Trainer's have."""
    tree = Workspace(sandbox.inputs).tree(sandbox.out / "run", deepspeed=str(sandbox.inputs / "zero3.json"))
    (sandbox.inputs / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    written = hjson.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text(encoding="utf-8"))
    written = trainer_file(3, **written)
    (sandbox.inputs / "zero3.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    return sandbox


def changed_run(content: bytes) -> st.SearchStrategy[bytes]:
    return changed_yaml(content, yaml.safe_load(content))


def overrides_of(inputs: Path) -> st.SearchStrategy[list[str]]:
    tree = yaml.safe_load((inputs / "run.yaml").read_text())
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    keys = [*tree, *(f"{section}.{key}" for section, values in sections.items() for key in values)]
    odd = st.one_of(st.sampled_from((*ODD_TEXTS, *YAML_SCALARS)), st.text(max_size=9), st.integers().map(str))
    pairs = st.builds("{}{}{}".format, st.one_of(st.sampled_from(keys), odd), st.sampled_from("==== :."), odd)
    plain = st.sampled_from(("1", "2", "0.5", "1e-4", "null", "[1]"))
    numbers = st.builds("{}={}".format, st.sampled_from(keys), plain)
    return st.one_of(st.lists(numbers, min_size=1, max_size=2), st.lists(pairs, min_size=1, max_size=4))


def apply_overrides(sandbox: Sandbox, overrides: list[str]) -> None:
    judged(sandbox, lambda: load_and_resolve(sandbox, *overrides))


_PIECES = (
    "{{ question }}",
    "{{ answer }}",
    "{{ choices | join(', ') }}",
    "{% for choice in choices %}",
    "{% endfor %}",
    "{% for x in range(10 ** 9) %}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ question.__class__.__mro__ }}",
    "{{ question | attr('__class__') }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "{{ [1, 2, 3] | map('upper') | list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% set x = choices.append('y') %}",
    "{{ unknown }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ namespace(a=1).a }}",
    "{{",
    "}}",
    "{#",
    "{% raw %}",
    "\ud83d",
    "\x00",
    "{{ (" * 200,
)


def templates(inputs: Path) -> st.SearchStrategy[str]:
    pieces = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=4).map(" ".join)
    bytewise = spoiled(DEFAULT_TEMPLATE.encode()).map(lambda content: content.decode(errors="replace"))
    return st.one_of(pieces, bytewise)


RECORDS: list[dict[str, Any]] = [
    {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1},
    {"question": "{{ 7 * 7 }}", "choices": ["{% x %}", 5], "answer": "A"},
]


def use_template(sandbox: Sandbox, template: str) -> None:
    def render() -> None:
        try:
            check_template(template)
            for record in RECORDS:
                render_question(record, template)
        except ValueError as error:  # from which the configuration, or the record, makes a refusal
            raise InputError(f"data.question_template: {error}") from None

    judged(sandbox, render)


CONFIGURATION = ("run.yaml", "override", *Config.model_fields)

KINDS = [
    file_kind("run.yaml", changed_run, load_and_resolve, name="configuration", names=CONFIGURATION, messages=40),
    Kind("overrides", overrides_of, apply_overrides, CONFIGURATION, messages=20),
    file_kind(
        "zero3.json",
        changed_json,
        load_and_resolve,
        name="DeepSpeed's file",
        names=("zero3.json", "deepspeed:"),
        messages=20,
    ),
    Kind("question template", templates, use_template, ("question_template",), weight=0.1),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_a_user_writes_works_or_is_refused(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)
