"""The section of the probe: corpora of weighted sources, and what the choice of layers is compared with."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from adept_ds.base.errors import InputError
from adept_ds.config.loading import dump_config, parse_config
from adept_ds.config.schema import corpus_files

BASE = {"model": "m", "run_dir": "r"}
WEIGHTED = {"files": ["q.jsonl", "r.txt"], "weight": 2.5, "name": "questions"}


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
    assert len(corpus_files(config.probe.corpus)) == sum(count for _, _, count in sources)
    dumped = yaml.safe_load(dump_config(config))
    assert [entry for entry in dumped["probe"]["corpus"] if isinstance(entry, str)] == [
        entry for entry in corpus if isinstance(entry, str)
    ]
    assert parse_config(dumped) == config


@pytest.mark.parametrize("stability", [None, "halves", {"corpus": ["a", WEIGHTED]}, {"model": "dir"}])
def test_stability_is_read_back_the_same(stability: Any) -> None:
    config = parse_config(BASE | {"probe": {"stability": stability}})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


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


def test_a_refresh_must_see_every_source() -> None:
    tree = BASE | {"probe": {"corpus": ["a", WEIGHTED]}, "importance": {"sequences": 1, "batch_sequences": 1}}
    with pytest.raises(InputError, match=r"importance\.sequences: 1 leaves none .* at least 2"):
        parse_config(tree)
    parse_config(tree | {"data": {"replay": ["c"]}, "importance": {"sequences": 1, "source": "online"}})
