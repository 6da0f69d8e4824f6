"""The probe's corpora and templates: what may be written, and what is refused before anything heavy starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Workspace, save_byte_tokenizer

from adept_ds.base.errors import InputError
from adept_ds.config.checks import check_probe
from adept_ds.config.loading import dump_config, parse_config
from adept_ds.config.question_template import DEFAULT_TEMPLATE
from adept_ds.config.schema import corpus_files
from adept_ds.data.documents import read_documents
from adept_ds.data.packing import build_blocks

BASE = {"model": "m", "run_dir": "r"}
QUESTION = {"question": "2 + 2?", "choices": ["3", 4.5, "4"], "answer": "C"}
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


# --- templates ------------------------------------------------------------------------------------------------------


def read_question(tmp_path: Path, template: str = DEFAULT_TEMPLATE) -> str:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")
    (text,) = read_documents("probe.corpus", path, None, template)
    return text


def test_a_template_sees_question_choices_letters_and_the_right_answer(tmp_path: Path) -> None:
    assert read_question(tmp_path) == "Question: 2 + 2?\nA. 3\nB. 4.5\nC. 4\nAnswer: C. 4"
    template = "{{ question }}|{{ choices[1] + 1 }}|{{ letters | join(',') }}|{{ answer }}|{{ answer_letter }}\n"
    assert read_question(tmp_path, template) == "2 + 2?|5.5|A,B,C|4|C\n"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ question", "does not parse"),
        ("{{ question | shuot }}", "shuot"),
        ("{{ questoin }}", "'questoin'; variables are question, choices"),
        ("{question}", "every question the same"),
    ],
)
def test_a_template_with_a_mistake_is_refused_with_the_configuration(template: str, word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(BASE | {"data": {"question_template": template}})
    assert str(caught.value).startswith("config: data.question_template: ")
    assert word in str(caught.value)


@pytest.mark.parametrize("template", ["{{ choices[7] }}", "{{ question.__class__ }}", "{{ choices.append(1) }}"])
def test_a_template_that_fails_on_a_record_names_its_line_and_reaches_nothing_else(
    tmp_path: Path, template: str
) -> None:
    parse_config(BASE | {"data": {"question_template": template}})
    with pytest.raises(InputError, match=r"^probe\.corpus: .*q\.jsonl' line 1: data\.question_template fails on it"):
        read_question(tmp_path, template)


def test_another_template_packs_the_corpus_again(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")

    def tokens(**options: str) -> int:
        cache = tmp_path / "cache"
        blocks = build_blocks("probe.corpus", [path], tmp_path / "tokenizer", 6, cache, keep_tail=True, **options)
        return sum(len(row["input_ids"]) for row in blocks.dataset)

    assert tokens() == len("Question: 2 + 2?\nA. 3\nB. 4.5\nC. 4\nAnswer: C. 4") + 1
    assert tokens(question_template="{{ question }} {{ answer }}") == len("2 + 2? 4") + 1


# --- what must exist ------------------------------------------------------------------------------------------------


def test_files_of_sources_must_exist(workspace: Workspace, tmp_path: Path) -> None:
    general, missing = str(workspace.root / "general.jsonl"), {"files": [str(tmp_path / "no.jsonl")], "name": "x"}
    for key, section in {
        "probe.corpus": {"corpus": [general, missing]},
        "probe.stability.corpus": {"corpus": [general], "stability": {"corpus": [missing]}},
    }.items():
        config = parse_config(workspace.tree(tmp_path / "run", probe=section))
        with pytest.raises(InputError, match=rf"^{key}: '.*no\.jsonl' does not exist; give"):
            check_probe(config)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "mistral"), ("num_hidden_layers", 6), ("vocab_size", 300)], ids=str
)
def test_another_model_must_have_the_same_architecture(
    workspace: Workspace, tmp_path: Path, key: str, value: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(workspace.model, other)
    config = parse_config(workspace.tree(tmp_path / "run", probe={"stability": {"model": str(other)}}))
    check_probe(config)
    record = json.loads((other / "config.json").read_text()) | {key: value}
    (other / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"^probe\.stability\.model: .* has {key} .*{value}.*; give another"):
        check_probe(config)
