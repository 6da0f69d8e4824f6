"""What the page says about how the layers were chosen, and how sure the choice is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import SELECTED, figures, make_run, page_of, words, write_importance
from harness.marks import slow

from adept_ds.config.layer_sections import ExpandSection
from adept_ds.probing.places import PlaceBenefits, PlaceScores, TextRecord, choose_places
from adept_ds.probing.result import LayerImportance


def write_choice(run_dir: Path, **changes: Any) -> None:
    """What a probe with k: auto says beside the deltas."""
    path = run_dir / "layer_importance.json"
    record = json.loads(path.read_text())
    for layer in record["layers"]:
        layer["standard_error"] = 0.01
    record["selection"] = {"choose": "lowest", "k": 4, "rule": "knee", "reason": "k = 4: <why>",
                           "rules": {"knee": 4, "threshold": 9}, "within_noise": [21, 3]}  # fmt: skip
    halves = [[12, 17, 20, 21], [3, 12, 17, 20]]
    record["stability"] = {"against": "halves", "name": "", "selected": halves, "jaccard": 0.6, "kendall_tau": 0.875}
    record["selection"] |= changes
    path.write_text(json.dumps(record))


def write_methods(run_dir: Path) -> None:
    deltas = [layer["delta"] for layer in json.loads((run_dir / "layer_importance.json").read_text())["layers"]]
    methods = {name: {"deltas": [scale * d for d in deltas], "selected": SELECTED, "seconds": 7.5}
               for name, scale in (("mask", 1.0), ("fisher", 1e-7))}  # fmt: skip
    found = {"methods": methods, "spearman": {"fisher": 0.8125}}
    (run_dir / "layer_methods.json").write_text(json.dumps(found))


def test_the_page_says_how_many_layers_were_chosen_why_and_how_sure_that_is(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    write_choice(run_dir)
    LayerImportance.load(run_dir / "layer_importance.json")  # as a probe writes it
    page = page_of(run_dir)
    text = words(page)
    assert '<section id="choice"' in page
    assert "k = 4: &lt;why&gt;." in text
    assert "knee (in effect) 4" in text
    assert "threshold 9" in text
    assert "Within noise (\u00b1): layers 21, 3." in text
    assert "12, 17, 20, 21 and 3, 12, 17, 20 are chosen; Jaccard index 0.60, Kendall's tau of the deltas 0.88" in text
    write_choice(run_dir, rules={"knee": 9, "budget": 4})
    assert "budget (in effect) 4" in words(page_of(run_dir)), "the limit decided, not the rule"
    write_choice(run_dir, rule=None)
    assert "(in effect)" not in words(page_of(run_dir)), "k was given"


@pytest.mark.usefixtures("no_figures")
def test_the_page_gives_no_reason_that_does_not_hold_for_the_choice(tmp_path: Path) -> None:
    because = "a layer that matters little costs least"
    write_importance(tmp_path)
    write_choice(tmp_path)
    text = words(page_of(tmp_path))
    assert because in text and "Layers 12, 17, 20, 21 matter least" in text
    write_choice(tmp_path, choose="highest")
    text = words(page_of(tmp_path))
    assert because not in text and "Layers 12, 17, 20, 21 are chosen." in text
    write_choice(tmp_path, choose="lowest")
    (tmp_path / "expanded").mkdir()
    copies = {"source_layers": 30, "copies": [{"source": 3, "index": 4}], "zeroed": []}
    (tmp_path / "expanded/expansion.json").write_text(json.dumps(copies))
    text = words(page_of(tmp_path))
    assert because not in text and "The copies are other layers: 3. What stands here" in text


def test_the_page_compares_methods_of_probing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    write_methods(run_dir)
    page = page_of(run_dir)
    assert "<svg" in page.split('<section id="methods"')[1].split("</section>")[0]
    assert "fisher 0.81 12, 17, 20, 21 7.5 s" in words(page)


def test_a_probe_without_choice_or_methods_has_no_such_sections(page: str) -> None:
    assert '<section id="choice"' not in page
    assert '<section id="methods"' not in page


@pytest.mark.parametrize(
    "selection",
    [{}, slow({"rules": None}), slow({"within_noise": None}), slow({"rules": {"elbow": 3}}), {"reason": None}],
)
@pytest.mark.usefixtures("no_figures")
def test_a_choice_that_lacks_something_costs_only_that(tmp_path: Path, selection: dict[str, Any]) -> None:
    run_dir = make_run(tmp_path / "run")
    record = json.loads((run_dir / "layer_importance.json").read_text()) | {"stability": {"against": "moon"}}
    record["selection"] = {"k": 4} | selection
    (run_dir / "layer_importance.json").write_text(json.dumps(record))
    (run_dir / "layer_methods.json").write_text(json.dumps({"methods": {"mask": {}, "taylor": {"deltas": [1.0]}}}))
    assert figures(page_of(run_dir))["layers"]


@pytest.mark.parametrize(("method", "unit"), [slow("mask", True), ("taylor", True), ("gradient", False)])
@pytest.mark.usefixtures("no_figures")
def test_scores_that_are_no_nats_have_no_loss_beside_them(tmp_path: Path, method: str, unit: bool) -> None:
    run_dir = make_run(tmp_path / "run")
    path = run_dir / "layer_importance.json"
    record = json.loads(path.read_text()) | {"method": method}
    for layer in record["layers"]:
        layer["loss"] = layer["loss"] if unit else None
    path.write_text(json.dumps(record))
    row = re.search(r"<td>0</td>\s*<td>(.*?)</td>", page_of(run_dir))
    assert row is not None
    assert (row[1] != "") == unit


def write_places(run_dir: Path, selected: list[int]) -> PlaceBenefits:
    text = TextRecord(loss=2.5, tokens=8192, sequences=32, sources=())
    gains = tuple(10.0 + (7 * layer) % 30 for layer in range(30))
    scores = PlaceScores(domain=text, general=text, gains=gains, harms=tuple(g / 2 - 9 for g in gains), seconds=12.0)
    found = choose_places(ExpandSection(k=4, choose="gain"), scores)
    found = found.model_copy(update={"selected": tuple(selected)})
    found.save(run_dir / "place_benefits.json")
    return found


def test_the_page_shows_what_copies_would_do_at_each_place(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "layer_importance.json").unlink()
    found = write_places(run_dir, SELECTED)
    page = page_of(run_dir)
    text = words(page)
    assert "<svg" in page.split('<section id="places"')[1].split("</section>")[0]
    assert found.reason in text.replace("&gt;", ">")
    assert "12 (selected) " in text and "Base loss on domain text 2.5000 over 8,192 tokens." in text
    assert '<section id="layers"' not in page, "no deltas, and none are missed"
    assert "The copies are other layers" not in text
    write_places(run_dir, [1, 2, 3, 4])
    assert "The copies are other layers: 12, 17, 20, 21." in words(page_of(run_dir))


def test_numbers_that_no_gradient_can_be_cost_no_page(tmp_path: Path) -> None:
    found = write_places(make_run(tmp_path / "run"), SELECTED).to_json()
    found["places"][3] |= {"gain": 1.7e308, "harm": -1.7e308}
    found["places"][4]["score"] = -1.7e308
    (tmp_path / "run" / "place_benefits.json").write_text(json.dumps(found))
    assert '<section id="places"' in page_of(tmp_path / "run")


@pytest.mark.usefixtures("no_figures")
def test_before_anything_is_copied_the_configuration_says_whose_choice_counts(tmp_path: Path) -> None:
    write_importance(tmp_path)
    write_places(tmp_path, [5, 6])
    assert "Layers 12, 17, 20, 21 matter least" in words(page_of(tmp_path))
    (tmp_path / "config.yaml").write_text("expand: {choose: gain}\n")
    assert "Layers 5, 6 are chosen." in words(page_of(tmp_path))


@pytest.mark.usefixtures("no_figures")
def test_the_page_says_what_a_broken_tie_costs_and_saves(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    tie = {"lowest": [3, 12, 17, 20], "tied": [3, 12, 17, 20, 21], "rise": 0.001, "standard_error": 0.002}
    write_choice(run_dir, tie_break=tie | {"flops": 4.0e8, "flops_of_lowest": 5.0e8})
    LayerImportance.load(run_dir / "layer_importance.json")  # as a probe writes it
    text = words(page_of(run_dir))
    assert (
        "400 million operations per token, against 500 million with the layers of lowest delta (3, 12, 17, 20)" in text
    )
    write_choice(run_dir, tie_break=tie | {"flops": None, "flops_of_lowest": None})
    assert "Planned cost" not in words(page_of(run_dir))
