"""Corpora and models are known by content: what is the same, and what makes another one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from harness.models import save_tiny_model
from harness.workspace import Workspace

from adept_ds.base.digests import FileDigests
from adept_ds.base.terminal import Terminal
from adept_ds.config.corpus_entries import CorpusSource
from adept_ds.config.data_section import DataSection
from adept_ds.config.loading import load_config
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.going_on import training_settings
from adept_ds.run.identity import Identity, reading_settings
from adept_ds.run.progress import StageProgress
from adept_ds.weights.expansion import Expansion, expand_checkpoint


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(FileDigests(tmp_path / "digests.json"), StageProgress(Terminal(None), StopRequest(), Ranks()))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name * 50}) + "\n")
    return folder


def sources(folder: Path, **changes: Any) -> list[CorpusSource]:
    first: dict[str, Any] = {
        "files": [folder / "a.jsonl", folder / "b.jsonl"],
        "weight": 2.0,
        "name": "first",
    } | changes
    return [CorpusSource(**first), CorpusSource(files=[folder / "c.jsonl"], weight=1.0)]


def test_a_corpus_is_its_texts_in_their_order_and_how_they_are_read_and_weighed(
    identity: Identity, texts: Path, tmp_path: Path
) -> None:
    def of(entries: Any) -> Any:
        return identity.corpus("data.domain", entries)

    original, moved = of(sources(texts)), tmp_path / "moved"
    shutil.copytree(texts, moved, copy_function=shutil.copy)
    assert of(sources(moved)) == original
    assert of(sources(texts, name="other name")) == original, "names are for messages"
    doubled = [source.model_copy(update={"weight": 2 * source.weight}) for source in sources(texts)]
    assert of(doubled) == original, "only shares count"
    others = {
        "order of files": sources(texts, files=[texts / "b.jsonl", texts / "a.jsonl"]),
        "order of sources": sources(texts)[::-1],
        "fewer": sources(texts, files=[texts / "a.jsonl"]),
        "weight": sources(texts, weight=3.0),
        "format": sources(texts, format="text"),
        "key": sources(texts, text_key="body"),
        "one source": [texts / "a.jsonl", texts / "b.jsonl", texts / "c.jsonl"],
    }
    assert [name for name, entries in others.items() if of(entries) == original] == []


def test_a_directory_and_a_pattern_are_the_files_that_they_stand_for(identity: Identity, texts: Path) -> None:
    listed = identity.corpus("data.domain", [texts / f"{name}.jsonl" for name in "abc"])
    assert identity.corpus("data.domain", [texts]) == listed
    assert identity.corpus("data.domain", [texts / "*.jsonl"]) == listed


def test_a_data_set_on_disk_is_what_it_holds(identity: Identity, tmp_path: Path) -> None:
    for name, text in (("one", "x"), ("other", "y")):
        Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "copy", copy_function=shutil.copy)
    one, other, copy = (identity.corpus("data.domain", [tmp_path / name]) for name in ("one", "other", "copy"))
    assert one == copy != other


def test_every_key_that_decides_about_tokens_counts_and_no_other() -> None:
    """A new key of the section counts until somebody decides otherwise."""
    assert set(reading_settings(DataSection())) == {
        *("format", "text_key", "max_bad_records", "question_template"),
        *("bos", "special_tokens_in_text", "packing", "streaming"),
    }


def spoil_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: save_tiny_model(model, rms_norm_eps=1e-4), "config.json"),
        (lambda model: save_tiny_model(model, num_hidden_layers=4), "weights"),
        (spoil_tokenizer, "tokenizer"),
    ],
    ids=["config", "weights", "tokenizer"],
)
def test_a_model_is_its_weights_its_configuration_and_its_tokenizer(
    identity: Identity, tmp_path: Path, change: Callable[[Path], object], what: str
) -> None:
    model = save_tiny_model(tmp_path / "model")
    before = identity.model(ModelDirectory.read(model))
    change(model)
    after = identity.model(ModelDirectory.read(model))
    assert what in {key for key, value in after.items() if before[key] != value}


def test_an_expansion_says_the_same_of_its_base(identity: Identity, tmp_path: Path) -> None:
    """The oracle of what a run finds unchanged: the weights' fingerprint, computed on the way from file to file."""
    model = save_tiny_model(tmp_path / "model")
    expand_checkpoint(model, tmp_path / "expanded", [1])
    found = identity.model(ModelDirectory.read(model))
    assert found["weights"] == Expansion.read(tmp_path / "expanded").base_fingerprint
    assert found["tokenizer"] == identity.model(ModelDirectory.read(tmp_path / "expanded"))["tokenizer"]


# --- the settings of training ---------------------------------------------------------------------------------------

ONLINE, SLOW = "importance.source=online", "guard={action: slow}"


@pytest.mark.parametrize(
    ("given", "change", "key"),
    [
        ([], "train.spike_sigma=6", "train.spike_sigma"),
        (["train.spike_sigma=6"], "train.spike_window=64", "train.spike_window"),
        ([ONLINE], "probe.seed=7", "probe.seed"),
        ([ONLINE, "importance.initial=ones"], "probe.seed=7", None),
        ([SLOW], "data.eval_sequences=5", "data.eval_sequences"),
        ([], "data.eval_sequences=5", None),
        (["guard={action: warn}"], "data.eval_sequences=5", None),
    ],
    ids=str,
)
def test_a_key_that_changes_the_course_of_training_is_among_its_settings(
    identity: Identity, workspace: Workspace, tmp_path: Path, given: list[str], change: str, key: str | None
) -> None:
    """Whichever of both was there first: a checkpoint is asked for what it says itself. First importances of `online`
    are of a sample by `probe.seed`, and a guard that slows does so by what it measures; without either it is no
    matter."""
    config = workspace.config(tmp_path / "run", data={"replay": [str(workspace.root / "general.jsonl")]})
    model = ModelDirectory.read(workspace.model)
    first, second = (
        training_settings(load_config(config, overrides), identity, model) for overrides in (given, [*given, change])
    )
    for before, now in ((first, second), (second, first)):
        differ = [name for name, value in before.items() if now.get(name) != value]
        assert (key in differ) if key else not differ, differ
