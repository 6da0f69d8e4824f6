"""STUDY.yaml: what it says, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.tiny_study import TinyStudy
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.study.plan import check_study
from adept_ds.study.schema import Grid, load_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> TinyStudy:
    found = TinyStudy(tmp_path_factory.mktemp("schema"), workspace.model)
    found.write_texts()
    return found


def check(study: TinyStudy, tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    check_study(load_study(path), path)


def test_a_grid_goes_in_factors_of_two() -> None:
    assert Grid(start=1.5e-4, count=4).rates == [1.5e-4, 3e-4, 6e-4, 1.2e-3]


def test_a_method_may_have_rates_of_its_own(study: TinyStudy, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    methods = ["full", {"method": "adept", "learning_rates": [1e-4, 5e-3]}]
    path.write_text(yaml.safe_dump(study.tree(methods=methods)), encoding="utf-8")
    found = load_study(path)
    assert [found.rates(entry) for entry in found.methods] == [[1e-3, 2e-3], [1e-4, 5e-3]]


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown key": ({"metods": []}, ["unknown key 'metods'", "did you mean 'methods'?"]),
    "an unknown key in a section": ({"budget": {"token": 5}}, ["unknown key 'budget.token'", "budget.tokens"]),
    "no budget": ({"budget": {}}, ["budget", "give tokens or seconds"]),
    "two budgets": ({"budget": {"tokens": 512, "seconds": 5.0}}, ["budget", "give tokens or seconds"]),
    "less than a step": ({"budget": {"tokens": 127}}, ["budget.tokens: 127", "4 sequences of 32 tokens"]),
    "a finer grid": (
        {"learning_rates": {"start": 1e-3, "factor": 3.0}},
        ["factor: 3", "factors of 2", "list the rates"],
    ),
    "rates out of order": ({"learning_rates": [2e-3, 1e-3]}, ["learning_rates", "ascending", "sort them"]),
    "no rates": ({"learning_rates": None}, ["'full' has no learning rates", "learning_rates: {start"]),
    "no method": ({"methods": ["ful"]}, ["methods", "'ful' is no method", "choose one of adept"]),
    "one method twice": ({"methods": ["full", "full"]}, ["two are called 'full'", "label"]),
    "a label with a slash": ({"methods": [{"method": "full", "label": "a/b"}]}, ["'a/b' is no label"]),
    "a seed twice": ({"seeds": {"search": [0], "confirm": [0]}}, ["seeds: 0 is there twice"]),
    "a setting of nobody": (
        {"settings": [{"label": "k", "set": {"expand.k": 1}, "methods": ["lora"]}]},
        ["'k' is for 'lora'", "choose of full, adept"],
    ),
    "an unknown reference": ({"reference": "lora"}, ["reference: 'lora'", "full, adept"]),
    "a mistake in the base": ({"base": {"model": "m", "train": {"lrr": 1}}}, ["method 'full'", "train.lrr"]),
    "a mistake in a change": (
        {"methods": [{"method": "adept", "set": {"expand.kk": 1}}]},
        ["method 'adept'", "unknown key 'expand.kk'"],
    ),
    "a change without effect": (
        {"settings": [{"label": "two", "set": {"expand.k": 1}}]},
        ["method 'full', setting 'two'", "expand.k: has no effect"],
    ),
    "a learning rate in the base": (
        {"base": {"model": "m", "train": {"lr": 1e-3}}},
        ["base: train.lr", "learning_rates"],
    ),
    "steps in a change": (
        {"methods": [{"method": "full", "set": {"train": {"steps": 5}}}]},
        ["train.steps", "'budget'"],
    ),
    "held-out text in a change": (
        {"settings": [{"label": "x", "set": {"data.general_eval": ["a"]}}]},
        ["settings: 'x'", "data.general_eval", "'general'"],
    ),
    "no such file": ({"domain": {"sources": ["nowhere.jsonl"]}}, ["domain.sources: 'nowhere.jsonl' does not exist"]),
    "nothing to probe": (
        {"general": {"train": []}, "methods": ["adept"]},
        ["method 'adept'", "list files in general.train"],
    ),
    "nothing to replay": (
        {"general": {"train": []}, "methods": ["replay"]},
        ["method 'replay'", "list files in general.train"],
    ),
    "half of the texts": ({"domain": {"sources": ["a"], "test": 0.5}}, ["domain.test: 0.5"]),
    "an option that is none": ({"slurm": {"options": ["-p gpu"]}}, ["slurm", "'-p gpu' is no option", "--name=value"]),
    "too many ranks": ({"ranks": 3}, ["method 'full'", "train.global_batch_size", "number of ranks (3)"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_in_one_line_before_anything_is_written(
    name: str, study: TinyStudy, tmp_path: Path
) -> None:
    changes, words = REFUSED[name]
    tree = study.tree() | changes
    tree["general"] = study.tree()["general"] | tree["general"]
    with pytest.raises(InputError) as refusal:
        check(study, tmp_path, tree)
    for word in words:
        assert word in str(refusal.value), refusal.value
    assert not study.study_dir.exists()


def test_a_study_may_not_lie_where_it_reads(study: TinyStudy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lies in model"):
        check(study, tmp_path, study.tree(study_dir=str(study.model / "inside")))
