"""Sections of a configuration: what they read, and that a dump of them may be written in a file."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from harness.launching import ROOT

from adept_ds.base.errors import InputError
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.config.loading import dump_config, parse_config
from adept_ds.config.rate_sections import LrPolicySection

BASE = {"model": "m", "run_dir": "r"}
WEIGHTED = {"files": ["q.jsonl", "r.txt"], "weight": 2.5, "name": "questions"}


# --- probe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpus", "sources"),
    [
        pytest.param(["a.jsonl", "b.txt"], [("a", 1.0, 2)], id="plain files are one source"),
        pytest.param([WEIGHTED], [("questions", 2.5, 2)], id="a source with a weight"),
        pytest.param(["x/a.jsonl", WEIGHTED, "b.txt"], [("a", 1.0, 2), ("questions", 2.5, 2)], id="mixed"),
        pytest.param([{"files": ["x/q.jsonl"]}, {"files": ["r"]}], [("q", 1.0, 1), ("r", 1.0, 1)], id="two sources"),
    ],
)
def test_a_corpus_of_files_and_sources_is_read_back_the_same(corpus: list[Any], sources: list[Any]) -> None:
    config = parse_config(BASE | {"probe": {"corpus": corpus}})
    assert [(source.title, source.weight, len(source.files)) for source in config.probe.sources] == sources
    dumped = yaml.safe_load(dump_config(config))
    assert [entry for entry in dumped["probe"]["corpus"] if isinstance(entry, str)] == [
        entry for entry in corpus if isinstance(entry, str)
    ]
    assert parse_config(dumped) == config


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\t", "x" * 101])
def test_a_source_is_called_by_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"^config: probe\.corpus\.name: .* is no name; write one line"):
        parse_config(BASE | {"probe": {"corpus": [WEIGHTED | {"name": name}]}})


@pytest.mark.parametrize("stability", [None, "halves", {"corpus": ["a", WEIGHTED]}, {"model": "dir"}])
def test_stability_is_read_back_the_same(stability: Any) -> None:
    config = parse_config(BASE | {"probe": {"stability": stability}})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


# --- expand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "needs"),
    [
        ({}, True),
        ({"k": 3, "choose": "highest"}, True),
        ({"k": 3, "choose": "uniform"}, False),
        ({"k": 3, "choose": "random"}, False),
        ({"choose": "uniform"}, False),
        ({"k": "auto", "choose": "uniform"}, True),
        ({"layers": [1]}, False),
    ],
)
def test_only_what_deltas_decide_needs_a_probe(section: dict[str, Any], needs: bool) -> None:
    assert ExpandSection(**section).needs_probe == needs


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"k": 3},
        {"choose": [3, 1]},
        {"k": "auto"},
        {"k": "auto", "rule": "threshold", "threshold": 0.25},
        {"k": "auto", "rule": "budget", "max_added_latency": 0.2, "choose": "random"},
        {"k": "auto", "max_trainable_share": 0.15},
        {"choose": "uniform"},
    ],
)
def test_a_dumped_section_is_one_that_may_be_written(section: dict[str, Any]) -> None:
    config = parse_config({"model": "m", "run_dir": "r", "expand": section})
    assert parse_config(config.model_dump(mode="json")).expand == config.expand


# --- lr_policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"preset": "official"},
        {"map": "constant"},
        {"map": "power", "power": 3},
        {"map": "exponential", "scope": "per_kind"},
        {"map": "step", "threshold": 0.3, "low": 0.1},
        {"map": "rank", "preserve_mean": True, "max_multiplier": 4, "smoothing": 0.9},
        {"map": "ratio", "ratio_power": 1, "max_multiplier": 3},
        {"map": "ratio", "preserve_mean": True, "max_multiplier": None},
    ],
    ids=lambda policy: policy.get("preset") or policy.get("map", "default"),
)
def test_a_dumped_lr_policy_has_what_takes_effect_and_is_read_back_the_same(policy: dict[str, Any]) -> None:
    initial = "ones" if policy.get("preset") == "official" else "source"
    config = parse_config({"model": "m", "run_dir": "r", "lr_policy": policy, "importance": {"initial": initial}})
    tree = yaml.safe_load(dump_config(config))
    assert policy.items() <= tree["lr_policy"].items()
    again = parse_config(tree)
    assert (again, dump_config(again)) == (config, dump_config(config))


def test_a_dumped_lr_policy_has_its_own_parameters_only() -> None:
    def dumped(**policy: str) -> set[str]:
        return set(LrPolicySection.model_validate(policy).model_dump())

    common = dumped(map="linear")
    assert common >= {"map", "scope", "preserve_mean", "min_multiplier", "max_multiplier", "smoothing"}
    assert dumped(map="power") - common == {"power"}
    assert dumped(map="exponential") - common == {"temperature"}
    assert dumped(map="step") - common == {"threshold", "low", "high"}
    assert dumped(map="rank") == dumped(map="constant") == common
    assert dumped(map="ratio") - common == {"ratio_power"}
    assert dumped(preset="official") == {"preset"}


def test_the_map_ratio_has_limits_of_its_own_and_always_keeps_the_mean() -> None:
    policy = LrPolicySection(map="ratio")
    assert (policy.min_multiplier, policy.max_multiplier, policy.preserve_mean) == (0.25, 4.0, True)
    assert LrPolicySection(map="ratio", max_multiplier=None).max_multiplier is None


def test_every_key_of_the_lr_policy_is_described() -> None:
    assert all(field.description for field in LrPolicySection.model_fields.values())


def test_the_examples_of_the_lr_policy_page_are_accepted() -> None:
    page = (ROOT / "docs" / "lr_policy.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert examples
    for example in examples:
        parse_config(BASE | yaml.safe_load(example))


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [{}, {"replay": ["g.jsonl"]}, {"replay": ["g.jsonl"], "replay_share": 0.5}])
def test_a_dumped_data_section_has_what_takes_effect_and_is_read_back_the_same(data: dict[str, Any]) -> None:
    config = parse_config({"model": "m", "run_dir": "r", "data": data})
    tree = yaml.safe_load(dump_config(config))
    assert ("replay_share" in tree["data"]) == bool(data)
    assert parse_config(tree) == config


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "there"),
    [
        ({}, {"warmup_ratio"}),
        ({"warmup_steps": 0}, {"warmup_steps"}),
        ({"schedule": "wsd"}, {"warmup_ratio", "decay_ratio"}),
        ({"schedule": "wsd", "decay_ratio": 0.5, "warmup_steps": 7}, {"warmup_steps", "decay_ratio"}),
    ],
)
def test_a_dumped_train_section_has_what_takes_effect_and_is_read_back_the_same(
    train: dict[str, Any], there: set[str]
) -> None:
    config = parse_config({"model": "m", "run_dir": "r", "train": train})
    tree = yaml.safe_load(dump_config(config))
    assert tree["train"].keys() & {"warmup_ratio", "warmup_steps", "decay_ratio"} == there
    again = parse_config(tree)
    assert yaml.safe_load(dump_config(again)) == tree
    assert again.train.num_warmup_steps == config.train.num_warmup_steps


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"decay_ratio": 0.2}, ["train: decay_ratio: 0.2", "schedule: wsd"]),
        ({"schedule": "linear", "decay_ratio": 0.3}, ["train: decay_ratio: 0.3", "schedule is linear"]),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, ["train: warmup_steps and warmup_ratio exclude each other"]),
        ({"schedule": "wsd", "decay_ratio": 1}, ["train.decay_ratio: 1"]),
        ({"copy_dropout": 1}, ["train.copy_dropout: 1"]),
        ({"writer_lr_ratio": -1}, ["train.writer_lr_ratio: -1"]),
    ],
)
def test_a_train_section_with_a_key_without_effect_is_refused(train: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r", "train": train})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_examples_of_the_training_page_are_accepted() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert examples
    for example in examples:
        parse_config(BASE | yaml.safe_load(example))
