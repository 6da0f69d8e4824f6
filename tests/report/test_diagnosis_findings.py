"""What a diagnosis says: the cause that was built in, with its numbers, and a change that the configuration takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.made_up_diagnosis import (
    copied_layers,
    diagnosis,
    effects,
    gradients,
    losses,
    overlaps,
    setting,
    unit,
    writes,
)

from adept_ds.config.loading import load_config
from adept_ds.report.diagnosis import written

ROSE, STAYED, WORSE = losses(general=0.22), losses(domain=-0.001), losses(domain=0.4)
WORST = effects([0.002, 0.21, 0.01], [-0.1, -0.05, -0.1])
DEARER = effects([0.002, 0.21, 0.01], [-0.1, -0.9, -0.1])
CONFLICT = (unit("layers.13.mlp.up_proj", against=0.1), unit("layers.19.self_attn.v_proj", against=0.8, multiplier=1.6))
HELD = (unit("layers.13.mlp.up_proj", multiplier=0.1, numel=9000), unit("layers.19.mlp.up_proj", multiplier=1.0))

CASES: dict[str, tuple[str, dict[str, Any], list[str], dict[str, Any]]] = {
    "a copy does harm": (
        "harmful_copy",
        {"losses": ROSE, "effects": WORST},
        ["layer 19 (of layer 17)", "2.5100 instead of 2.7200 (-0.2100 ± 0.0010", "by +0.0500 ± 0.0010"],
        {"expand": {"layers": [12, 20]}},
    ),
    "a copy does harm, and more good": (
        "harmful_copy",
        {"losses": ROSE, "effects": DEARER},
        ["layer 19", "by +0.9000"],
        {"train.lr": 1e-4},
    ),
    "the only copy does harm": (
        "harmful_copy",
        {"losses": ROSE, "effects": WORST[1:2], "setting": setting(copied=(17,))},
        ["layer 19"],
        {"train.lr": 1e-4},
    ),
    "no copy does harm alone": (
        "harmful_copy",
        {"losses": ROSE},
        ["No copy does harm by itself", "layer 13"],
        {"train.lr": 1e-4},
    ),
    "an important layer was copied": (
        "important_layer",
        {"losses": ROSE, "layers": copied_layers(0.001, 0.31, 0.01)},
        ["Layer 17", "delta of 0.31, rank 25 of 30", "median of all layers is 0.05"],
        {"expand": {"choose": "lowest", "k": 3}},
    ),
    "the lowest layers are important": (
        "important_layer",
        {"losses": ROSE, "layers": copied_layers(0.001, 0.004, 0.06, ranks=(1, 2, 3))},
        ["Layer 20", "delta of 0.06, rank 3 of 30"],
        {"expand": {"k": 2}},
    ),
    "one important unit takes the range of multipliers": (
        "unit_against_importance",
        {"losses": ROSE, "units": CONFLICT},
        ["layers.19.self_attn.v_proj", "+0.80", "mean multiplier 1.60"],
        {"lr_policy": {"map": "rank"}},
    ),
    "the domain needed it more": (
        "unit_against_importance",
        {"losses": ROSE, "units": CONFLICT, "setting": setting(map="ratio")},
        ["layers.19.self_attn.v_proj"],
        {"lr_policy": {"map": "linear", "preserve_mean": True}},
    ),
    "importance had no effect": (
        "unit_against_importance",
        {"losses": ROSE, "units": CONFLICT, "setting": setting(map="constant", method="llama_pro")},
        ["layers.19.self_attn.v_proj"],
        {"method": "adept", "lr_policy": {"map": "linear"}},
    ),
    "importance changed between refreshes": (
        "unit_against_importance",
        {"losses": ROSE, "units": CONFLICT, "setting": setting(map="rank")},
        ["layers.19.self_attn.v_proj"],
        {"importance.every": 10},
    ),
    "copies write next to nothing": (
        "silent_projections",
        {"losses": STAYED, "writes": writes(copy=0.001, below=0.1)},
        ["0.10% at layer 13 (the layer below: 10.00%)"],
        {"train.lr": 2e-4 * 16},  # 1% of the source's share is to become 10%: the next power of two
    ),
    "copies write more than their sources, to no good": (
        "silent_projections",
        {"losses": WORSE, "writes": writes(copy=0.4, below=0.1)},
        ["40.00% at layer 13"],
        {"train.lr": 5e-5},
    ),
    "too few copies": ("few_copies", {"losses": STAYED}, ["3 of 30 layers have copies"], {"expand": {"k": 6}}),
    "multipliers hold back": (
        "held_back",
        {"losses": STAYED, "units": HELD},
        ["0.19 on average", "90.0% of all parameters have one below 0.25"],
        {"lr_policy.preserve_mean": True},
    ),
    "the limits of a ratio hold back": (
        "held_back",
        {"losses": STAYED, "units": HELD, "setting": setting(map="ratio")},
        ["0.19 on average"],
        {"lr_policy.min_multiplier": 0.25},
    ),
    "a preset's multipliers hold back": (
        "held_back",
        {"losses": STAYED, "units": HELD, "setting": setting(preset=True)},
        ["0.19 on average"],
        {"lr_policy": {"preserve_mean": True}},
    ),
    "gradients do not come through": (
        "starved_units",
        {"losses": STAYED, "gradients": gradients(behind=1e-6)},
        ["layers.13.self_attn.q_proj: 1e-6", "0.10% of what", "6 of 6 units"],
        {"train.lr": 4e-4},
    ),
    "both texts pass alike": (
        "entangled",
        {"losses": ROSE, "overlaps": overlaps(accuracy=0.62), "writes": writes(copy=0.05, on_general=0.045)},
        ["accuracy of 0.62", "the layer below: 0.97", "90% of what it writes on domain text"],
        {"data.replay": ["GENERAL.jsonl"], "data.replay_share": 0.25},
    ),
    "both texts pass alike in spite of replay": (
        "entangled",
        {"losses": ROSE, "overlaps": overlaps(accuracy=0.62), "setting": setting(replays=True)},
        ["accuracy of 0.62"],
        {"data.replay_share": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_named_with_its_numbers_and_the_key_to_change(case: str) -> None:
    name, parts, words, settings = CASES[case]
    found = {finding.name: finding for finding in diagnosis(**parts).findings}
    assert found[name].problem
    assert found[name].settings == settings
    for word in words:
        assert word in found[name].saw, found[name].saw


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_advised_together_is_a_configuration(case: str, tmp_path: Path) -> None:
    """As overrides on the command line of a run that says what the advice replaces."""
    parts = CASES[case][1]
    config: dict[str, Any] = {"model": "m", "run_dir": "r", "expand": {"k": 3}}
    if parts.get("setting") and parts["setting"].preset:
        config |= {"lr_policy": {"preset": "official"}, "importance": {"initial": "ones"}}
    if parts.get("setting") and parts["setting"].replays:
        config |= {"data": {"replay": ["general.jsonl"]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    advice = diagnosis(**parts).advice
    load_config(path, [f"{key}={written(value)}" for key, value in advice.items()])


def test_where_nothing_went_wrong_everything_was_looked_at_and_nothing_is_advised() -> None:
    found = diagnosis()
    assert len(found.findings) == 8
    assert not any(finding.problem or finding.settings or finding.change for finding in found.findings)
    assert found.advice == {}


def test_a_cause_is_no_problem_where_its_effect_is_missing() -> None:
    """A harmful copy in a run whose general loss has not risen; faint copies in one whose domain improved."""
    found = diagnosis(effects=WORST, layers=copied_layers(0.3, 0.3, 0.3), writes=writes(copy=0.001), units=HELD)
    assert not any(finding.problem for finding in found.findings)


def test_the_first_problem_decides_about_a_key() -> None:
    """Faint copies explain starved units: one change of the learning rate, and no second one."""
    found = diagnosis(losses=STAYED, writes=writes(copy=0.001), gradients=gradients(behind=1e-9))
    problems = [finding.name for finding in found.findings if finding.problem]
    assert problems == ["silent_projections"]
    assert found.advice == {"train.lr": 2e-4 * 16}


def test_without_copies_only_units_are_spoken_of() -> None:
    bare: dict[str, Any] = dict.fromkeys(("effects", "layers", "writes", "gradients", "overlaps"), ())
    found = diagnosis(losses=ROSE, units=CONFLICT, setting=setting(copied=(), method="full"), **bare)
    assert [finding.name for finding in found.findings] == ["unit_against_importance"]


def test_of_one_text_alone_what_can_be_said_is_said() -> None:
    only_domain = {"domain": STAYED["domain"]}
    shares = tuple(w.model_copy(update={"on": {"domain": w.on["domain"]}}) for w in writes(copy=0.001))
    without = tuple(effect.model_copy(update={"general": None}) for effect in WORST)
    found = diagnosis(losses=only_domain, writes=shares, effects=without, overlaps=())
    names = [finding.name for finding in found.findings]
    assert "harmful_copy" not in names and "silent_projections" in names
