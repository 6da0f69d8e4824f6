"""The report page: self-contained, escaped, and of use for half a run too."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harness.made_up_run import (
    FIGURES,
    eval_line,
    figures,
    moved,
    page_of,
    step_line,
    words,
    write_evaluation,
    write_importance,
    write_lines,
)

TITLES = {
    "evaluation": "Before and after",
    "layers": "Which layers matter least",
    "stack": "The expanded model",
    "training": "Training loss and learning rate",
    "evals": "Held-out loss during training",
    "units": "How fast each unit may learn",
    "movement": "What the multipliers did",
    "speed": "Throughput and gradient norm",
    "config": "Configuration",
}


class Tags(HTMLParser):
    """Every start tag with its attributes, as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_page_is_self_contained_and_small(page: str) -> None:
    for tag, attributes in Tags(page).seen:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page.encode()) < 1_500_000


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'xlink:href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_every_section_and_number_appears(page: str) -> None:
    assert all(f'<section id="{name}">' in page and title in page for name, title in TITLES.items())
    assert all(figures(page).values())
    text = words(page)
    assert "Left out" not in text
    assert "Domain loss 1.92 → 1.61 (\u22120.31 nats), general loss 2.20 → 2.21 (+0.01)." in text
    for shown in ("9.52%", "14.2 M of 149 M parameters", "base layers 12, 17, 20, 21", "205 k", "3,187", "75.4 s"):
        assert shown in text
    for shown in ("3 GiB", "2 ranks", "ZeRO stage 3, bf16", "+0.0100", "layers.13.self_attn.v_proj"):
        assert shown in text


@pytest.mark.parametrize(
    ("general", "domain", "headline"),
    [
        (2.21, 1.61, "Better on the domain; general text is practically unchanged."),
        (2.24, 1.61, "Better on the domain; general text is slightly worse."),
        (2.32, 1.61, "General text got worse; the domain improved."),
        (2.32, 1.92, "General text got worse; the domain did not improve."),
        (2.20, 1.99, "The domain got worse; general text is practically unchanged."),
        (2.20, 1.92, "No change on the domain; general text is practically unchanged."),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_verdict_follows_the_numbers(tmp_path: Path, general: float, domain: float, headline: str) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
    write_evaluation(tmp_path, general, domain)
    assert headline in words(page_of(tmp_path))


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    config = "model: x<script>alert(1)<script>&\nnote: '</pre><img src=https://example.invalid/x onerror=alert(2)>'\n"
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "metrics.jsonl").touch()
    name = "layers.13.$x_{<b>"
    unit = {"unit": name, "kind": "matrix", "importance": 0.5, "multiplier": 1.0}
    write_lines(tmp_path / "unit_importance.jsonl", [{"step": 0, "units": [unit]}])
    movement = {"step": 1, "since": 0, "units": [moved(name, 0.0, 1.0, 1.0)]}  # named in a warning
    write_lines(tmp_path / "unit_movement.jsonl", [movement])
    page = page_of(tmp_path)
    assert not {"script", "img", "b"} & {tag for tag, _ in Tags(page).seen}
    assert "ADEPT run: x&lt;script&gt;alert(1)" in page
    assert "layers.13.$x_{&lt;b&gt;" in page


def test_only_the_probe_has_run(tmp_path: Path) -> None:
    write_importance(tmp_path)
    page = page_of(tmp_path)
    assert figures(page) == {name: name == "layers" for name in FIGURES}
    assert "Layers probed; no training yet. Layers 12, 17, 20, 21 matter least for general text." in words(page)
    assert page.count("Left out") == 8


def test_what_the_configuration_does_without_is_not_missed(tmp_path: Path) -> None:
    """Places without a probe, and one rate for all units."""
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    (tmp_path / "config.yaml").write_text("method: adept\n")
    sections = {name: f'<section id="{name}">' in page_of(tmp_path) for name in TITLES}
    assert all(sections.values())
    (tmp_path / "config.yaml").write_text("expand: {k: 8, choose: uniform}\nlr_policy: {map: constant}\n")
    sections = {name: f'<section id="{name}">' in page_of(tmp_path) for name in TITLES}
    assert {name for name, there in sections.items() if not there} == {"layers", "units"}


def test_only_metrics(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3}])
    page = page_of(tmp_path)
    assert figures(page) == {name: name == "training" for name in FIGURES}
    assert "1 training step has a loss that is not a finite number" in words(page)


@pytest.mark.usefixtures("no_figures")
def test_evaluations_during_training_stand_in_for_the_final_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [eval_line(step) for step in (0, 50, 100)])
    text = words(page_of(tmp_path))
    assert "Domain loss 1.92 → 1.62 (\u22120.30 nats), general loss 2.20 → 2.21 (+0.01)." in text
    assert "First against last evaluation during training." in text


def test_long_runs_and_fine_units_stay_small(tmp_path: Path) -> None:
    noise = random.Random(3)
    write_lines(tmp_path / "metrics.jsonl", [step_line(step, noise) for step in range(1, 10_001)])
    units = [
        {"unit": f"layers.3.mlp.neuron.{i}", "kind": "neuron", "importance": 0.5, "multiplier": 1.0} for i in range(500)
    ]
    write_lines(tmp_path / "unit_importance.jsonl", [{"step": step, "units": units} for step in range(0, 9000, 100)])
    page = page_of(tmp_path)
    assert figures(page)["units"] and "The first 400 of 500 units" in page
    assert len(page.encode()) < 1_500_000


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.usefixtures("no_figures")
def test_importance_for_the_domain_stands_beside_the_other_where_it_is_known(tmp_path: Path, both: bool) -> None:
    unit = {"unit": "layers.3.mlp.up_proj", "kind": "matrix", "importance": 0.5, "multiplier": 1.25}
    unit |= {"domain_importance": 0.0625} if both else {}
    write_importance(tmp_path)
    write_lines(tmp_path / "unit_importance.jsonl", [{"step": 0, "units": [unit]}])
    text = words(page_of(tmp_path))
    assert ("importance for the domain" in text) == both
    assert ("0.0625" in text) == both


def test_same_input_gives_the_same_page(tmp_path: Path) -> None:
    write_importance(tmp_path, layers=24)
    assert page_of(tmp_path) == page_of(tmp_path)
