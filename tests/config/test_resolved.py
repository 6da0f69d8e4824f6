"""A configuration with everything looked up: what must be there, for what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.models import save_tiny_model
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.config.loading import parse_config
from adept_ds.config.resolved import Purpose, resolve
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.context import Context
from adept_ds.zero.build import StepShape, training_ds_config


def test_files_of_sources_must_exist(workspace: Workspace, tmp_path: Path) -> None:
    general, missing = str(workspace.root / "general.jsonl"), {"files": [str(tmp_path / "no.jsonl")], "name": "x"}
    for key, section in {
        "probe.corpus": {"corpus": [general, missing]},
        "probe.stability.corpus": {"corpus": [general], "stability": {"corpus": [missing]}},
    }.items():
        config = parse_config(workspace.tree(tmp_path / "run", probe=section))
        with pytest.raises(InputError, match=rf"^{key}: '.*no\.jsonl' does not exist; give"):
            resolve(config, "probe")


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "mistral"), ("num_hidden_layers", 6), ("vocab_size", 300)], ids=str
)
def test_another_model_must_have_the_same_architecture(
    workspace: Workspace, tmp_path: Path, key: str, value: Any
) -> None:
    same, other = shutil.copytree(workspace.model, tmp_path / "same"), tmp_path / "other"
    resolve(parse_config(workspace.tree(tmp_path / "run", probe={"stability": {"model": str(same)}})), "probe")
    options: dict[str, Any] = {key: value}
    save_tiny_model(other, **options)
    config = parse_config(workspace.tree(tmp_path / "run", probe={"stability": {"model": str(other)}}))
    with pytest.raises(InputError, match=rf"^probe\.stability\.model: .* has {key} .*{value}.*; give another"):
        resolve(config, "probe")


NEEDS: dict[Purpose, set[str]] = {
    "run": {"data.domain", "probe.corpus", "deepspeed"},
    "train": {"data.domain", "probe.corpus", "deepspeed"},
    "probe": {"probe.corpus", "deepspeed"},
    "eval": {"data.domain_eval", "deepspeed"},
    "expand": set(),
    "export": set(),
}


@pytest.mark.parametrize("purpose", list(NEEDS))
def test_each_purpose_asks_for_what_it_needs_and_for_nothing_else(
    workspace: Workspace, tmp_path: Path, purpose: Purpose
) -> None:
    """Everything else is missing; then each thing that is needed is taken away in turn."""
    deepspeed = tmp_path / "ds.json"
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    text = str(workspace.root / "general.jsonl")
    given = {
        "data": {"domain": [text], "general_eval": [], "domain_eval": [text]},
        "probe": {"corpus": [text]},
        "deepspeed": str(deepspeed),
    }
    absent = {
        "data": {"domain": [], "general_eval": [], "domain_eval": []},
        "probe": {"corpus": []},
        "deepspeed": str(tmp_path / "missing.json"),
    }

    def tree(needed: set[str]) -> Any:
        sections: dict[str, Any] = {"data": {}, "probe": {}}
        for key in ("data.domain", "data.domain_eval", "data.general_eval", "probe.corpus"):
            section, leaf = key.split(".")
            sections[section][leaf] = (given if key in needed else absent)[section][leaf]  # type: ignore[index]
        sections["deepspeed"] = (given if "deepspeed" in needed else absent)["deepspeed"]
        return parse_config(workspace.tree(tmp_path / "run", **sections))

    resolved = resolve(tree(NEEDS[purpose]), purpose, num_ranks=2)
    assert (resolved.deepspeed is None) == (purpose in ("expand", "export"))
    assert (resolved.accumulation_steps is None) == (purpose not in ("run", "train"))
    for key in NEEDS[purpose]:
        with pytest.raises(InputError, match=rf"^{key}: "):
            resolve(tree(NEEDS[purpose] - {key}), purpose)


@pytest.mark.parametrize("key", ["domain_eval", "general_eval"])
def test_one_held_out_corpus_is_enough_to_evaluate(workspace: Workspace, tmp_path: Path, key: str) -> None:
    held_out: dict[str, list[str]] = {"domain_eval": [], "general_eval": []}
    given = {key: [str(workspace.root / "general.jsonl")]}
    resolve(parse_config(workspace.tree(tmp_path / "run", data=held_out | given)), "eval")
    missing = {key: [str(tmp_path / "no.jsonl")]}
    with pytest.raises(InputError, match=rf"^data\.{key}: '.*no\.jsonl' does not exist; give"):
        resolve(parse_config(workspace.tree(tmp_path / "run", data=held_out | missing)), "eval")
    with pytest.raises(InputError, match=r"^data\.domain_eval: no corpus given; list"):
        resolve(parse_config(workspace.tree(tmp_path / "run", data=held_out)), "eval")


@pytest.mark.parametrize(
    ("purpose", "expand", "looks"),
    [
        ("probe", {"k": 2}, True),
        ("probe", {"layers": [1]}, True),
        ("run", {"k": 2}, True),
        ("train", {"k": "auto"}, True),
        ("run", {"layers": [1]}, False),
        ("train", {"k": 2, "choose": "uniform"}, False),
        ("eval", {"k": 2}, False),
        ("expand", {"k": 2}, False),
        ("export", {"k": 2}, False),
    ],
    ids=str,
)
def test_the_model_to_compare_with_is_looked_up_only_where_layers_are_probed(
    workspace: Workspace, tmp_path: Path, purpose: Purpose, expand: dict[str, Any], looks: bool
) -> None:
    def settings(model: Path) -> Any:
        tree = workspace.tree(tmp_path / "run", probe={"stability": {"model": str(model)}})
        return resolve(parse_config(tree | {"expand": expand}), purpose)

    other = shutil.copytree(workspace.model, tmp_path / "other")
    reference = settings(other).reference_model
    assert (reference and reference.path) == (other if looks else None)
    if looks:
        with pytest.raises(InputError, match=r"^probe\.stability\.model: .* does not exist; give"):
            settings(tmp_path / "missing")
    else:
        assert settings(tmp_path / "missing").reference_model is None


@pytest.mark.parametrize(
    ("lr_policy", "importance", "reads"),
    [({}, {}, True), ({"map": "constant"}, {}, False), ({}, {"source": "online"}, False)],
    ids=str,
)
def test_listed_layers_need_the_corpus_only_for_what_importance_is_estimated_on(
    workspace: Workspace, tmp_path: Path, lr_policy: dict[str, Any], importance: dict[str, Any], reads: bool
) -> None:
    sections = {"expand": {"layers": [1]}, "lr_policy": lr_policy, "probe": {"corpus": []}}
    data = {"replay": [str(workspace.root / "general.jsonl")], "replay_share": 0.5}
    tree = workspace.tree(tmp_path / "run", data=data, importance=importance) | sections
    if reads:
        with pytest.raises(InputError, match=r"^probe\.corpus: no corpus given"):
            resolve(parse_config(tree), "run")
    else:
        resolve(parse_config(tree), "run")


def test_everything_is_looked_up_once(workspace: Workspace, tmp_path: Path) -> None:
    """What a stage gets does not change when files do, and nothing that is built of it reads them again."""
    deepspeed, model = tmp_path / "ds.json", shutil.copytree(workspace.model, tmp_path / "model")
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 77}}))
    tree = workspace.tree(tmp_path / "run", deepspeed=str(deepspeed), train={"global_batch_size": 12})
    resolved = resolve(parse_config(tree | {"model": str(model)}), "run", num_ranks=3)
    engines = Context.of(resolved, Ranks(), Terminal(None), StopRequest()).engines
    deepspeed.unlink()
    shutil.rmtree(model)
    assert resolved.zero_stage == 1
    assert resolved.accumulation_steps == 2  # twelve sequences on three ranks, two at a time
    assert resolved.model.num_layers == 5
    assert resolved.reference_model is None
    assert resolved.run_dir.root == tmp_path / "run"
    shape = StepShape(12, 2, resolved.accumulation_steps)
    zero = training_ds_config(engines, shape)["zero_optimization"]
    assert zero == {"stage": 1, "reduce_bucket_size": 77}


@pytest.mark.parametrize(("purpose", "asks"), [("eval", False), ("export", False), ("probe", True), ("expand", True)])
def test_how_many_layers_there_are_matters_where_layers_are_chosen(
    workspace: Workspace, tmp_path: Path, purpose: Purpose, asks: bool
) -> None:
    """`adept eval MODEL` on two layers is no complaint about the four that other commands would copy."""
    config = parse_config(workspace.tree(tmp_path / "run", expand={"k": 6}))
    if not asks:
        resolve(config, purpose)
        return
    with pytest.raises(InputError, match=r"^expand\.k: 6 is more than the 5 layers"):
        resolve(config, purpose)


@pytest.mark.parametrize("purpose", ["probe", "run", "train"])
def test_places_are_weighed_on_both_texts(workspace: Workspace, tmp_path: Path, purpose: Purpose) -> None:
    text = str(workspace.root / "general.jsonl")
    for missing in (None, "data.domain", "probe.corpus"):
        data = {"domain": [] if missing == "data.domain" else [text]}
        probe = {"corpus": [] if missing == "probe.corpus" else [text]}
        config = parse_config(
            workspace.tree(tmp_path / "run", data=data, probe=probe, expand={"k": 2, "choose": "gain"})
        )
        if missing is None:
            resolve(config, purpose)
        else:
            with pytest.raises(InputError, match=rf"^{missing}: no corpus given"):
                resolve(config, purpose)


def test_copies_must_have_room_at_their_distance(workspace: Workspace, tmp_path: Path) -> None:
    for distance, fits in ((2, True), (3, False)):
        expand = {"k": 3, "choose": "gain", "min_distance": distance}
        config = parse_config(workspace.tree(tmp_path / "run", expand=expand))
        if fits:
            resolve(config, "probe")
        else:
            with pytest.raises(InputError, match=r"^expand\.min_distance: 3 leaves room for 2 of the 3 copies"):
                resolve(config, "probe")
