"""A mistake in a configuration is one line: the key, the value and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.config.loading import load_config, parse_config

BASE = {"model": "m", "run_dir": "r"}
WEIGHTED = {"files": ["q.jsonl", "r.txt"], "weight": 2.5, "name": "questions"}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\nrun_dir: r\ntrain:\n  steps: 10\n  betas: [0.8, 0.99]\n", encoding="utf-8")
    return path


NO_NUMBERS = ["true", "'5'", "five", "[5]", "{a: 5}", "2020-13-45", "0x10", "1:30", ".nan", ".inf", "-.inf"]
NO_COUNTS = [*NO_NUMBERS, "1.5", "5.0", "5e0", "-1", "1000000001", "9" * 30]
NO_SEEDS = [*NO_NUMBERS, "1.0", "-1", "4294967296", "12345678901234567890"]
NO_TEXTS = ["5", "1e5", "true", "no", "[a]", "{a: b}"]

WRONG_KINDS = {
    "train.lr": [*NO_NUMBERS, "0", "1e999", "11"],
    "train.weight_decay": [*NO_NUMBERS, "-1", "1e300"],
    "train.clip_grad_norm": [*NO_NUMBERS, "1e300"],
    "train.keep_gathered_gib": [*NO_NUMBERS, "-1", "1e300", "most"],
    "train.steps": [*NO_COUNTS, "0"],
    "train.seed": NO_SEEDS,
    "train.betas": ["5", "x", "[true, 0.9]", "['0.9', 0.9]", "[0.9]", "[0.9, 0.9, 0.9]", "[0.9, 1.0]"],
    "train.activation_checkpointing": ["1", "0", "1.0", "'true'", "maybe", "[true]"],
    "train.schedule": [*NO_TEXTS, "Cosine"],
    "data.seq_len": [*NO_COUNTS, "7", "1000000000000"],
    "data.workers": [*NO_COUNTS, "5000"],
    "data.streaming": ["1", "'yes'", "streaming"],
    "data.text_key": [*NO_TEXTS, "''"],
    "data.domain": ["5", "a.txt", "{files: [a]}", "[5]", "[no]", "[[a]]", "[{files: a}]", "[{files: [1e5]}]"],
    "data.question_template": NO_TEXTS,
    "probe.seed": NO_SEEDS,
    "probe.stability": ["5", "true", "[halves]", "{corpus: a}", "{model: 5}"],
    "expand.k": [*NO_NUMBERS, "1.5", "0", "-1"],
    "expand.layers": ["5", "[true]", "[1.0]", "['1']", "[x]"],
    "expand.choose": ["5", "[true]", "[x]"],
    "dist_timeout_minutes": [*NO_NUMBERS, "1e300"],
    "model": NO_TEXTS,
    "run_dir": [*NO_TEXTS, "~"],
    "deepspeed": NO_TEXTS,
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in WRONG_KINDS.items() for text in texts])
def test_a_value_of_another_kind_or_size_is_refused_and_never_converted(config_file: Path, key: str, text: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_config(config_file, [f"{key}={text}"])
    message = str(refusal.value)
    assert message.startswith(f"override '{key}={text}': {key.split('.')[0]}"), message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.steps='5'", "write it without quotes"),
        ("train.lr='1e-4'", "write it without quotes"),
        ("data.streaming='yes'", "write it without quotes"),
        ("data.text_key=no", "needs quotes"),
        ("data.domain=[2024]", "needs quotes"),
        ("train.steps=1.5", "should be an integer"),
        ("expand.k=true", "should be an integer, or 'auto'"),
        ("train.keep_gathered_gib=most", "should be a number, or 'auto'"),
        ("data.domain=a.txt", "should be a list, [...]"),
    ],
)
def test_the_remedy_says_what_to_write(config_file: Path, override: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)):
        load_config(config_file, [override])


@pytest.mark.parametrize("key", ["model", "probe.method", "data", "expand.k"])
def test_a_message_is_short_however_large_the_value_is(config_file: Path, key: str) -> None:
    for value in ("[" + "x, " * 10_000 + "]", "x" * 100_000, "{a: " + "[" * 20 + "]" * 20 + "}"):
        with pytest.raises(InputError) as refusal:
            load_config(config_file, [f"{key}={value}"])
        assert len(str(refusal.value)) < 700


@pytest.mark.parametrize(
    ("override", "words"),
    [
        pytest.param("train.stpes=1", ["train.stpes", "did you mean 'train.steps'"], id="nearest in its section"),
        pytest.param("learning.lr=1", ["learning", "valid keys here", "train"], id="unknown section"),
        pytest.param("seq_len=9", ["seq_len", "did you mean '", ".seq_len'"], id="in the wrong section"),
        pytest.param("data.steps=1", ["data.steps", "did you mean 'train.steps'"], id="another section's key"),
        pytest.param("train.steps=many", ["train.steps", "many", "integer"], id="wrong type"),
        pytest.param("train.steps=0", ["train.steps", "0", "greater than or equal to 1"], id="out of range"),
        pytest.param("train.steps=1.5", ["train.steps", "1.5", "integer"], id="fraction"),
        pytest.param("train.schedule=cos", ["train.schedule", "cos", "'cosine'"], id="unknown choice"),
        pytest.param("train.betas=[0.9]", ["train.betas", "0.9"], id="too few betas"),
        pytest.param("train.betas=[2,5]", ["train.betas", "2"], id="betas outside [0, 1)"),
        pytest.param("train.lr=.inf", ["train.lr", "inf"], id="infinite learning rate"),
        pytest.param("train.lr=.nan", ["train.lr", "nan"], id="learning rate that is no number"),
        pytest.param("train=3", ["train", "3"], id="a number for a section"),
        pytest.param("data.domain=d.jsonl", ["data.domain", "d.jsonl", "list"], id="a file for a list"),
        pytest.param("expand={k: 2, layers: [1]}", ["expand", "k and layers", "remove one"], id="k and layers"),
        pytest.param("expand.layers=[2,2]", ["expand", "twice"], id="a layer twice"),
        pytest.param("expand.layers=[]", ["expand.layers", "[]"], id="no layer"),
        pytest.param("lr_policy.map=cubic", ["lr_policy.map", "cubic", "'linear'"], id="unknown map"),
        pytest.param("lr_policy.power=0", ["lr_policy.power", "0", "greater than 0"], id="power that is not positive"),
        pytest.param("lr_policy.temperature=-1", ["lr_policy.temperature", "-1"], id="negative temperature"),
        pytest.param("lr_policy.threshold=1.1", ["lr_policy.threshold", "1.1"], id="threshold above 1"),
        pytest.param("lr_policy.smoothing=1", ["lr_policy.smoothing", "1", "less than 1"], id="nothing new is learnt"),
        pytest.param(
            "lr_policy.power=3",
            ["lr_policy: power: 3.0", "map is linear", "remove power"],
            id="another map's parameter",
        ),
        pytest.param(
            "lr_policy={map: power, low: 0.5}", ["low: 0.5", "map: step", "map is power", "remove low"], id="step's low"
        ),
        pytest.param(
            "lr_policy={map: step, low: 3}", ["low: 3.0", "high: 2.0", "lower low or raise high"], id="low above high"
        ),
        pytest.param(
            "lr_policy={min_multiplier: 2, max_multiplier: 1}",
            ["min_multiplier: 2.0", "max_multiplier: 1.0", "lower min_multiplier"],
            id="limits in the wrong order",
        ),
        pytest.param(
            "lr_policy={map: constant, smoothing: 0.5}",
            ["smoothing: 0.5", "map: constant", "remove smoothing"],
            id="smoothing of nothing",
        ),
        pytest.param(
            "lr_policy={map: constant, preserve_mean: true}",
            ["preserve_mean: True", "map: constant", "remove preserve_mean"],
            id="a constant's mean",
        ),
        pytest.param(
            "lr_policy={map: constant, max_multiplier: 1}",
            ["max_multiplier: 1.0", "map: constant", "remove max_multiplier"],
            id="limits of a constant",
        ),
        pytest.param(
            "lr_policy={map: ratio, preserve_mean: false}",
            ["preserve_mean: False", "map: ratio", "remove it"],
            id="a ratio without its mean",
        ),
        pytest.param(
            "lr_policy={map: ratio, min_multiplier: 1.5}",
            ["min_multiplier: 1.5", "map: ratio", "lower it to 1"],
            id="a ratio's mean below its limits",
        ),
        pytest.param(
            "lr_policy={map: ratio, max_multiplier: 0.5}",
            ["max_multiplier: 0.5", "map: ratio", "raise it to 1"],
            id="a ratio's mean above its limits",
        ),
        pytest.param(
            "lr_policy={map: ratio, max_multiplier: 0}", ["max_multiplier: 0.0", "map: ratio"], id="a ratio at rest"
        ),
        pytest.param(
            "lr_policy.ratio_power=0.5", ["ratio_power: 0.5", "map: ratio", "map is linear"], id="a ratio's power"
        ),
        pytest.param(
            "lr_policy={map: ratio, power: 0.5}", ["power: 0.5", "map: power", "map is ratio"], id="the other"
        ),
        pytest.param("lr_policy.map=[ratio]", ["lr_policy.map", "['ratio']"], id="a list of maps"),
        pytest.param(
            "lr_policy={preset: official, map: linear, smoothing: 0}",
            ["preset: official", "map: linear", "smoothing: 0.0", "remove one or the other"],
            id="preset and more",
        ),
        pytest.param(
            "data.replay_share=0.5",
            ["data.replay_share: 0.5", "list files in data.replay", "remove data.replay_share"],
            id="a share of no replay",
        ),
        pytest.param(
            "importance.source=online",
            ["importance.source: online", "list files in data.replay"],
            id="online of nothing",
        ),
        pytest.param("data.replay_share=1", ["data.replay_share", "less than 1"], id="replay alone"),
        pytest.param(
            "lr_policy.preset=official", ["lr_policy.preset: official", "importance.initial to ones"], id="preset alone"
        ),
        pytest.param("lr_policy.preset=paper", ["lr_policy.preset", "paper", "'official'"], id="unknown preset"),
    ],
)
def test_a_mistake_is_one_line_naming_key_value_and_remedy(config_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(config_file, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert " is missing; add it" not in message, "the key is there"
    assert "Section" not in message, "names of classes mean nothing to a user"


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\n")
    with pytest.raises(InputError, match="'run_dir' is missing; add it"):
        load_config(path)


def test_a_misspelt_required_key_is_shown_as_it_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("modle: m\nrun_dir: r\n")
    with pytest.raises(InputError, match="unknown key 'modle'; did you mean 'model'"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"corpus": [{"files": ["a"], "wieght": 1}]}, ["probe.corpus.wieght", "did you mean 'probe.corpus.weight'"]),
        ({"corpus": [{"files": ["a"], "weight": 0}]}, ["probe.corpus.weight", "0", "greater than 0"]),
        ({"corpus": [{"files": []}]}, ["probe.corpus.files", "at least 1"]),
        ({"corpus": [{"weight": 1}]}, ["probe.corpus.files", "missing"]),
        ({"corpus": [3]}, ["probe.corpus", "3", "path"]),
        ({"corpus": ["a", {"files": ["x/a.txt"]}]}, ["corpus", "two sources are named 'a'", "a name of its own"]),
        ({"corpus": ["a", {"files": ["b"]}], "sequences": 1}, ["sequences: 1", "2 sources", "at least 2"]),
        ({"stability": "thirds"}, ["probe.stability", "'thirds'", "'halves'"]),
        ({"stability": {}}, ["probe.stability", "give one of both"]),
        ({"stability": {"corpus": ["a"], "model": "b"}}, ["probe.stability", "give one of both"]),
        ({"stability": {"modle": "b"}}, ["probe.stability.modle", "did you mean 'probe.stability.model'"]),
        ({"method": "maks"}, ["probe.method", "'maks'", "'taylor'"]),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_mistake_in_the_probe_section_names_key_value_and_remedy(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(BASE | {"probe": section})
    message = str(caught.value)
    assert "\n" not in message
    assert not {"<file>", "<source>", "<word>"} & set(message.replace(":", ".").split(".")), "not part of the key"
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rule": "knee"}, ["rule: knee", "k: auto"]),
        ({"k": 4, "threshold": 0.3}, ["threshold: 0.3", "k: auto"]),
        ({"k": "auto", "threshold": 0.3}, ["threshold: 0.3", "rule: threshold", "rule is knee"]),
        ({"k": "auto", "rule": "budget"}, ["no limit", "max_trainable_share", "max_added_latency"]),
        ({"k": 3, "max_added_latency": 0.2}, ["max_added_latency: 0.2", "k: auto"]),
        ({"k": 0}, ["k: 0", "1 or more"]),
        ({"k": "many"}, ["expand.k", "'many'"]),
        ({"choose": [1], "layers": [2]}, ["choose and layers"]),
        ({"choose": "uniform", "layers": [2]}, ["choose and layers exclude"]),
        ({"k": "auto", "layers": [2]}, ["k and layers exclude"]),
        ({"choose": "middle"}, ["expand.choose", "'middle'"]),
        ({"choose": [1, 1]}, ["layer twice"]),
        ({"harm_weight": 2.0}, ["harm_weight: 2.0", "choose: gain only"]),
        ({"choose": "uniform", "min_distance": 3}, ["min_distance: 3", "choose: gain only"]),
        ({"layers": [1], "min_distance": 3}, ["min_distance: 3", "choose: gain only"]),
        ({"choose": "gain", "min_distance": 0}, ["expand.min_distance", "0"]),
        ({"choose": "gain", "harm_weight": -1.0}, ["expand.harm_weight", "-1"]),
        ({"choose": "gain", "k": "auto"}, ["k: auto", "choose: gain", "number"]),
        ({"choose": "highest", "tie_break": "cost"}, ["tie_break: cost", "choose: lowest only", "highest"]),
        ({"choose": "gain", "tie_break": "cost"}, ["tie_break: cost", "choose is gain"]),
        ({"layers": [1], "tie_break": "cost"}, ["tie_break: cost", "layers are listed"]),
        ({"tie_break": "speed"}, ["expand.tie_break", "'speed'"]),
    ],
)
def test_settings_without_effect_or_against_each_other_are_refused(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse_config({"model": "m", "run_dir": "r", "expand": section})
    assert all(word in str(error.value) for word in ["expand", *words]), str(error.value)


def test_a_refresh_must_see_every_source() -> None:
    tree = BASE | {"probe": {"corpus": ["a", WEIGHTED]}, "importance": {"sequences": 1, "batch_sequences": 1}}
    with pytest.raises(InputError, match=r"importance\.sequences: 1 leaves none .* at least 2"):
        parse_config(tree)
    parse_config(tree | {"data": {"replay": ["c"]}, "importance": {"sequences": 1, "source": "online"}})


def test_importances_before_the_first_step_see_every_source_that_is_replayed() -> None:
    """Where nothing is estimated before it, or on the probe's text, they need not."""
    data, online = {"replay": ["c", WEIGHTED]}, {"sequences": 1, "source": "online"}
    with pytest.raises(InputError, match=r"importance\.sequences: 1 leaves none .* of data\.replay, .* at least 2"):
        parse_config(BASE | {"data": data, "importance": online})
    parse_config(BASE | {"data": data, "importance": online | {"sequences": 2}})
    parse_config(BASE | {"data": data, "importance": online | {"initial": "ones"}})
    parse_config(BASE | {"data": data, "importance": {"sequences": 1}})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"probe": {"stability": "halves"}}, ["probe.stability: halves", "choose: gain", "remove"]),
        ({"probe": {"stability": {"model": "x"}}}, ["probe.stability: a comparison", "choose: gain", "remove"]),
        ({"data": {"streaming": True}}, ["data.streaming", "sample of the whole domain corpus", "remove"]),
        (
            {"data": {"domain": ["a", WEIGHTED]}, "probe": {"sequences": 1}},
            ["probe.sequences: 1", "2 sources of data.domain", "at least 2"],
        ),
        ({"method": "freeze"}, ["choose: gain", "method: freeze makes none"]),
        ({"method": "llama_pro"}, ["expand.choose", "llama_pro"]),
        ({"method": "full"}, ["expand", "method: full"]),
    ],
    ids=str,
)
def test_what_places_cannot_be_weighed_beside_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    parse_config(BASE | {"expand": {"choose": "gain"}})
    with pytest.raises(InputError) as error:
        parse_config(BASE | {"expand": {"choose": "gain"}} | sections)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_keys_without_effect_are_not_in_the_resolved_configuration() -> None:
    """So that it can be given again, whatever chooses."""
    for expand, there, absent in (
        ({"choose": "gain"}, {"harm_weight", "min_distance"}, {"tie_break"}),
        ({"choose": "uniform"}, set(), {"tie_break", "harm_weight", "min_distance"}),
        ({"k": 2}, {"tie_break"}, {"harm_weight", "min_distance"}),
        ({"layers": [1]}, set(), {"tie_break", "harm_weight", "min_distance"}),
    ):
        tree = parse_config(BASE | {"expand": expand}).model_dump(mode="json")
        assert there <= tree["expand"].keys() and not absent & tree["expand"].keys()
        assert (
            ("method" in tree["probe"])
            == ("stability" in tree["probe"])
            == ("choose" not in expand or expand["choose"] != "gain")
        )
        assert parse_config(tree).model_dump(mode="json") == tree
