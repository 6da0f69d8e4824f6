"""The page of a diagnosis: self-contained, complete, and whatever names are in it, text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_diagnosis import copied_layers, diagnosis, effects, losses, overlaps, setting, unit, writes
from harness.made_up_run import make_run, words
from harness.page_structure import HOSTILE, Structure

from adept_ds.report.diagnosis import Diagnosis
from adept_ds.report.diagnosis_figures import FIGURES
from adept_ds.report.diagnosis_page import write_page

WRONG: dict[str, Any] = {
    "losses": losses(general=0.22, domain=-0.001),
    "effects": effects([0.002, 0.21, 0.01], [-0.1, -0.05, -0.1]),
    "layers": copied_layers(0.001, 0.31, 0.01),
    "units": tuple(unit(f"layers.{n}.mlp.up_proj", against=0.9 - n / 10, multiplier=n / 5) for n in range(10)),
    "writes": writes(copy=0.001, on_general=0.002),
    "overlaps": overlaps(accuracy=0.6),
}


def page_of(run_dir: Path, found: Diagnosis) -> str:
    return write_page(run_dir, found).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make_run(tmp_path_factory.mktemp("wrong") / "run"), diagnosis(**WRONG))


def test_it_needs_nothing_from_elsewhere(page: str) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "img"} & {tag for tag, _ in Structure(page).elements}
    assert not re.search(r"@import|url\((?!#)|(src|href)=\"(?!#|data:)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_finding_has_its_section_its_sentence_and_its_figure(page: str) -> None:
    sections = {part.split('"', 1)[0]: part for part in page.split('<section id="')[1:]}
    found = diagnosis(**WRONG).findings
    assert sections.keys() == {"advice", *(finding.name for finding in found)}
    assert FIGURES.keys() | {"important_layer", "few_copies"} == {finding.name for finding in found}
    for finding in found:
        assert finding.saw in words(sections[finding.name]).replace("&#39;", "'")
        assert ("to blame" in sections[finding.name]) and ("not to blame" in sections[finding.name]) != finding.problem
        assert ("<svg" in sections[finding.name]) == (finding.name != "few_copies")


def test_what_to_change_stands_at_the_top_as_it_is_typed(page: str) -> None:
    text = words(page.partition('<section id="harmful_copy"')[0])
    assert "General text got worse, and the domain did not improve." in text
    assert "General loss 2.5000 → 2.7200 (+0.2200 ± 0.0020 nats)." in text
    assert "expand: {&#34;layers&#34;: [12, 20]}" in text
    assert "data.replay: [&#34;GENERAL.jsonl&#34;]" in text


@pytest.mark.usefixtures("no_figures")
def test_a_run_in_which_nothing_went_wrong_is_not_blamed(tmp_path: Path) -> None:
    text = words(page_of(make_run(tmp_path / "run"), diagnosis()))
    assert "No known failure shows." in text
    assert "What to change" not in text and "to blame" not in text


@pytest.mark.usefixtures("no_figures")
def test_methods_without_copies_have_a_page_too(tmp_path: Path) -> None:
    bare: dict[str, Any] = dict.fromkeys(("effects", "layers", "writes", "gradients", "overlaps"), ())
    found = diagnosis(**(WRONG | bare), setting=setting(copied=(), method="full"))
    text = words(page_of(make_run(tmp_path / "run"), found))
    assert "Method full makes no copies, so only the movement of its units is looked at." in text
    assert "Which unit moved most against its importance?" in text


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_text(tmp_path: Path, page: str) -> None:
    """The same elements as of the page with harmless names."""
    spellings = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in HOSTILE.values()]
    assert len(spellings) == len(WRONG["units"])
    units = tuple(
        course.model_copy(update={"unit": f"{hostile}{course.unit}"})
        for hostile, course in zip(spellings, WRONG["units"], strict=True)
    )
    spoiled = page_of(make_run(tmp_path / "run"), diagnosis(**(WRONG | {"units": units})))
    assert Structure(spoiled).elements == Structure(page).elements
