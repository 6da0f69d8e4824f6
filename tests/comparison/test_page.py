"""compare.html stands alone and shows all; compare.json says everything that it is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from harness.made_up_run import words
from harness.made_up_study import METHODS, description, make_study, write_small
from harness.marks import slow
from harness.page_structure import HOSTILE, Structure, mostly_slow

from adept_ds.comparison.page import write_comparison
from adept_ds.comparison.record import Comparison
from adept_ds.comparison.trials import Trial

FIGURES = ("fronts", "hypervolumes", "reached", "differences", "progress")


@pytest.fixture(scope="module")
def page(study_dir: Path) -> str:
    return (study_dir / "compare.html").read_text()


def test_the_page_asks_for_nothing_else(page: str) -> None:
    assert not re.search(r"<(script|link|img|iframe|object)|@import|url\(h|src=", page)
    targets = {value for _, value in re.findall(r'(href|xlink:href)="([^"]*)"', page)}
    assert all(target.startswith("#") for target in targets)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)


def test_the_page_shows_every_figure_and_names_are_unique(page: str) -> None:
    assert [name for name in FIGURES if f'<figure id="{name}"><div class="paper"><svg' in page] == list(FIGURES)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_says_what_was_compared_and_found(study_dir: Path, page: str) -> None:
    text = words(page)
    found = Comparison.load(study_dir / "compare.json")
    told = [found.description.title, found.description.budget, "6 methods on SmolLM2-135M, 30 trials, 3 seeds"]
    told += ["A cell is missing.", *found.warnings, *found.description.commands, *found.description.texts.values()]
    told += [sentence for criterion in found.arms[0].chosen for sentence in found.claims(criterion)]
    assert found.warnings
    assert [sentence for sentence in told if sentence not in text] == []


def test_a_page_is_the_same_when_it_is_made_again(tmp_path: Path) -> None:
    for folder in (tmp_path / "1", tmp_path / "2"):
        write_comparison(folder, description(), make_study(folder, {"full": METHODS["full"], "lora": METHODS["lora"]}))
    for name in ("compare.html", "compare.json", "tables.md", "tables.tex", "figures/fronts.svg"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_every_figure_of_the_page_is_a_file_that_can_be_read_by_itself(study_dir: Path, page: str) -> None:
    files = {file.stem: file for file in (study_dir / "figures").iterdir()}
    assert files.keys() == set(re.findall(r'<figure id="(.+?)">', page))
    for name, file in files.items():
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.attrib["viewBox"] in page.partition(f'<figure id="{name}">')[2][:300]


def test_runs_are_named_from_the_study_on(study_dir: Path) -> None:
    """So that a study can be moved as a whole."""
    record = json.loads((study_dir / "compare.json").read_text())
    assert all((study_dir / trial["run_dir"] / "summary.json").is_file() for trial in record["trials"])
    assert not any(Path(trial["run_dir"]).is_absolute() for trial in record["trials"])


def page_with(folder: Path, more: str) -> Structure:
    """Every text that comes from outside has `more` around it."""

    def around(text: str) -> str:
        return f"{more}{text}{more}"

    sources = [f"{corpus}/{role}/{around('s')}" for corpus in ("general", "domain") for role in ("validation", "test")]
    trials = []
    for label, gain in (("a", 0.2), ("b", 0.1)):
        losses = {"base": {source: [3.0] for source in sources}, "adapted": {source: [3 - gain] for source in sources}}
        written = write_small(folder, label, 1e-4, 0, losses, dict.fromkeys(sources, (3,)))
        trials.append(Trial(label=around(label), setting=around("s"), lr=1e-4, seed=0, run_dir=written.run_dir))
    facts = {"title": around("t"), "model": around("m"), "budget": around("b"), "commands": [around("c")],
             "texts": {around("use"): around("text")}, "notes": [around("n")], "facts": [around("f")]}  # fmt: skip
    write_comparison(folder, description(**facts), trials)
    return Structure((folder / "compare.html").read_bytes().decode())


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    return page_with(tmp_path_factory.mktemp("harmless"), "harmless")


@pytest.mark.parametrize("kind", mostly_slow(kind for kind in HOSTILE if kind != "half a character"))
def test_strings_are_text_and_nothing_else(tmp_path: Path, harmless: Structure, kind: str) -> None:
    """The page has the very elements and attributes that it has with harmless strings in the same places."""
    found = page_with(tmp_path, HOSTILE[kind])
    assert found.elements == harmless.elements
    assert found.in_figures == harmless.in_figures


@pytest.mark.parametrize("kind", ["quotes", slow("comment"), slow("entity"), slow("template"), "mathematics"])
def test_a_string_is_shown_as_it_stands(tmp_path: Path, harmless: Structure, kind: str) -> None:
    shown = "".join(page_with(tmp_path, HOSTILE[kind]).text)
    assert shown.count(HOSTILE[kind]) == "".join(harmless.text).count("harmless") > 40
