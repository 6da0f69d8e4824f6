"""`preset`: the defaults of a whole configuration, under the keys that the user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adept_ds.base.errors import InputError
from adept_ds.config.known_methods import known_methods
from adept_ds.config.loading import dump_config, load_config, parse_config
from adept_ds.config.presets import PRESETS

BASE = {"model": "m", "run_dir": "r", "data": {"replay": ["g.jsonl"]}}
PAPER = BASE | {"preset": "paper"}
HELD_OUT = {"general_eval": ["h.jsonl"], "domain_eval": ["d.jsonl"]}
RECOMMENDED = BASE | {"preset": "recommended", "data": HELD_OUT}


def dumped(tree: dict[str, Any]) -> dict[str, Any]:
    found = yaml.safe_load(dump_config(parse_config(tree)))
    assert isinstance(found, dict)
    return found


def test_the_paper_is_as_it_was_published() -> None:
    """arXiv 2510.10071: sections 3.1 and 3.2."""
    config = parse_config(PAPER)
    assert config.method.name == "adept"
    assert (config.probe.method, config.expand.k, config.expand.choose) == ("mask", 4, "lowest")
    assert (config.importance.every, config.importance.granularity) == (500, "matrix")
    assert (config.importance.source, config.importance.initial) == ("corpus", "source")
    policy = config.lr_policy
    assert (policy.map, policy.scope, policy.preserve_mean, policy.smoothing) == ("linear", "norms_apart", False, 0.0)
    assert (policy.min_multiplier, policy.max_multiplier) == (0.0, None)


def test_what_is_recommended_is_what_was_ahead() -> None:
    """docs/evidence.md"""
    config = parse_config(RECOMMENDED)
    assert (config.method.name, config.lr_policy.map) == ("adept", "constant")
    assert (config.expand.k, config.expand.choose, config.expand.spare_top) == (8, "uniform", 2)
    assert config.anchor is not None and config.anchor.kind == "kl"
    assert config.dial is not None and config.dial.max_general_rise == 0.0


@pytest.mark.parametrize("tree", [PAPER, RECOMMENDED], ids=["paper", "recommended"])
def test_every_key_of_a_preset_stands_in_the_dump_which_names_it(tree: dict[str, Any]) -> None:
    found = dumped(tree)
    assert found["preset"] == tree["preset"]
    for section, values in PRESETS[tree["preset"]].items():
        if section != "method":
            assert values.items() <= found[section].items(), section
    assert "preset" not in dumped(BASE)


@pytest.mark.parametrize("section", ["dial", "anchor"])
def test_null_switches_off_what_a_preset_switches_on_and_stays_in_the_dump(section: str) -> None:
    config = parse_config(RECOMMENDED | {section: None})
    assert getattr(config, section) is None
    assert yaml.safe_load(dump_config(config))[section] is None
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert section not in dumped(BASE)


@pytest.mark.parametrize(
    ("mine", "section", "rest"),
    [
        pytest.param({"importance": {"every": 7}}, "importance", {"granularity": "matrix"}, id="a number"),
        pytest.param({"expand": {"k": 8}}, "expand", {"choose": "lowest"}, id="more copies"),
        pytest.param({"expand": {"k": None}}, "expand", {"choose": "lowest"}, id="null is a value"),
        pytest.param({"expand": {"k": "auto", "rule": "threshold"}}, "expand", {"choose": "lowest"}, id="auto"),
        pytest.param({"expand": {"layers": [3, 1]}}, "expand", {"k": None}, id="a list of layers"),
        pytest.param({"lr_policy": {"map": "constant"}}, "lr_policy", {"map": "constant"}, id="another map"),
        pytest.param(
            {"lr_policy": {"map": "ratio"}}, "lr_policy", {"max_multiplier": 4.0}, id="with limits of its own"
        ),
        pytest.param({"lr_policy": {"preserve_mean": True}}, "lr_policy", {"map": "linear"}, id="the same map"),
        pytest.param({"importance": {"source": "online"}}, "importance", {"every": 500}, id="online"),
        pytest.param({"probe": {"method": "fisher"}}, "probe", {"method": "fisher"}, id="another estimator"),
        pytest.param(
            {"lr_policy": {"preset": "official"}, "importance": {"initial": "ones"}},
            "lr_policy",
            {"preset": "official"},
            id="the published code",
        ),
    ],
)
def test_the_users_own_keys_win_and_the_rest_stays(mine: dict[str, Any], section: str, rest: dict[str, Any]) -> None:
    found = dumped(PAPER | mine)
    for name, values in mine.items():
        assert values.items() <= found[name].items()
    assert rest.items() <= found[section].items()


def test_a_list_to_choose_is_a_list_of_layers() -> None:
    assert dumped(PAPER | {"expand": {"choose": [3, 1]}})["expand"] == {"k": None, "layers": [3, 1]}


def test_overrides_are_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    config = load_config(path, ["preset=paper", "expand.k=2", "lr_policy.map=rank"])
    assert (config.preset, config.expand.k, config.lr_policy.map, config.importance.every) == ("paper", 2, "rank", 500)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", known_methods())
@pytest.mark.parametrize(
    "mine",
    [{}, {"expand": {"layers": [1]}}, {"lr_policy": {"map": "step", "low": 0.5}}, {"train": {"steps": 3}}],
    ids=lambda mine: next(iter(mine), "nothing"),
)
def test_a_dumped_configuration_is_read_back_the_same_whatever_the_method(
    preset: str, method: str, mine: dict[str, Any]
) -> None:
    """Sections that a method does not look at have nothing of the preset, or they would be refused."""
    data = HELD_OUT | ({"replay": ["g.jsonl"]} if method in ("adept", "replay") else {})
    sections = known_methods()[method].sections
    tree = {"model": "m", "run_dir": "r", "preset": preset, "method": method, "data": data}
    tree |= {section: keys for section, keys in mine.items() if section == "train" or section in sections}
    config = parse_config(tree)
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert (again, dump_config(again)) == (config, dump_config(config))


def test_what_a_method_decides_itself_stays() -> None:
    found = parse_config(PAPER | {"method": "llama_pro"})
    assert (found.expand.choose, found.expand.k, found.lr_policy.map) == ("uniform", 4, "constant")


def test_another_preset_is_another_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": {"name": "lora", "rank": 3}, "train": {"schedule": "linear", "lr": 0.5}}
    monkeypatch.setitem(PRESETS, "other", entry)
    config = parse_config(BASE | {"preset": "other", "data": {}, "train": {"lr": 0.25}})
    assert config.method.model_dump()["rank"] == 3
    assert (config.train.schedule, config.train.lr) == ("linear", 0.25)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert parse_config(BASE | {"preset": "other", "method": "adept"}).method.name == "adept"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        pytest.param({"preset": "best"}, ["preset: 'best' is no preset", "paper or recommended"], id="no such word"),
        pytest.param({"preset": "recommended"}, ["data.general_eval is empty", "dial: null"], id="nothing held out"),
        pytest.param({"preset": "official"}, ["preset: 'official' is no preset", "paper"], id="a word of lr_policy"),
        pytest.param({"preset": ["paper"]}, ["preset: ['paper']", "a text"], id="a list"),
        pytest.param({"preset": {"name": "paper"}}, ["preset: {'name': 'paper'}", "a text"], id="a section"),
        pytest.param({"preset": "paper", "method": "papr"}, ["method: 'papr' is no method"], id="no such method"),
        pytest.param({"preset": "paper", "expand": 5}, ["expand: 5 is no section"], id="no section"),
        pytest.param({"preset": "paper", "expand": False}, ["expand: False is no section"], id="nor that"),
        pytest.param(
            {"preset": "paper", "lr_policy": {"power": 3}},
            ["lr_policy: power: 3", "map is linear"],
            id="another map's key",
        ),
        pytest.param(
            {"preset": "paper", "method": "full", "importance": {"every": 5}},
            ["importance.every", "method: full"],
            id="a key without effect",
        ),
    ],
)
def test_a_mistake_is_one_line(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r"} | tree)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
