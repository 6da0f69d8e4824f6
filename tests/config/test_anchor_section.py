"""The section `anchor`: what it says by default, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.complaints import assert_one_line
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.checks import anchor_shape
from adept_ds.config.loading import dump_config, parse_config
from adept_ds.config.resolved import corpora_read, resolve
from adept_ds.config.yaml_text import read_yaml

SOURCES = [{"name": name, "files": [f"{name}.jsonl"]} for name in ("a", "b")]


def parsed(anchor: Any, **sections: Any) -> Any:
    return parse_config({"model": "m", "run_dir": "r", "anchor": anchor} | sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        pytest.param({"anchor": {}}, ["'anchor.kind' is missing"], id="no kind"),
        pytest.param({"anchor": {"kind": "kk"}}, ["anchor.kind: 'kk'", "'kl'", "'neutral'"], id="no such kind"),
        pytest.param({"anchor": {"kind": "replay"}}, ["anchor.kind: ", "data.replay"], id="replay"),
        pytest.param({"anchor": {"kind": "kl", "weight": 0}}, ["anchor.weight: 0"], id="no weight"),
        pytest.param({"anchor": {"kind": "kl", "share": 0}}, ["anchor.share: 0"], id="no share"),
        pytest.param({"anchor": {"kind": "kl", "sequence": 8}}, ["'anchor.sequences'"], id="misspelt"),
        pytest.param(
            {"anchor": {"kind": "kl", "text": "sampled", "corpus": ["a.jsonl"]}},
            ["anchor: corpus: ", "text: sampled", "remove"],
            id="two texts",
        ),
        pytest.param(
            {"anchor": {"kind": "kl", "corpus": SOURCES, "sequences": 1}}, ["sequences: 1", "at least 2"], id="own"
        ),
        pytest.param(
            {"anchor": {"kind": "kl", "sequences": 1}, "probe": {"corpus": SOURCES}},
            ["anchor.sequences: 1", "probe.corpus", "at least 2"],
            id="a source unseen",
        ),
        pytest.param(
            {"anchor": {"kind": "kl"}, "method": "full"},
            ["anchor.kind: ", "method: full", "remove it"],
            id="nothing to bypass",
        ),
        pytest.param({"anchor": {"kind": "kl"}, "method": "lora"}, ["anchor.kind: ", "method: lora"], id="adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r"} | sections)
    assert_one_line(f"adept: {caught.value}", words)


def test_without_it_a_dump_says_nothing_of_it() -> None:
    assert "anchor" not in dump_config(parse_config({"model": "m", "run_dir": "r"}))


def test_what_is_dumped_is_the_same_section() -> None:
    config = parsed({"kind": "neutral", "weight": 3.0, "corpus": SOURCES})
    assert parse_config(read_yaml(dump_config(config))) == config
    sampled = parsed({"kind": "kl", "text": "sampled"})
    assert parse_config(read_yaml(dump_config(sampled))) == sampled


@pytest.mark.parametrize(
    ("share", "size", "sequences"),
    [(0.1, 64, 6), (0.1, 4, 1), (0.001, 64, 1), (0.5, 5, 2), (0.5, 7, 4), (2.0, 8, 16)],
)
def test_a_share_is_of_the_domains_sequences_and_one_at_least(share: float, size: int, sequences: int) -> None:
    """To the nearest whole number, a half to the even one."""
    assert parsed({"kind": "kl", "share": share}, train={"global_batch_size": size}).anchored == sequences


def test_a_share_is_not_of_what_is_replayed() -> None:
    data = {"replay": ["g.jsonl"], "replay_share": 0.5}
    assert parsed({"kind": "kl", "share": 0.25}, data=data, train={"global_batch_size": 16}).anchored == 2


@pytest.mark.parametrize(
    ("sequences", "micro", "ranks", "shape"),
    [(1, 4, 1, (1, 1)), (1, 4, 3, (1, 1)), (5, 4, 1, (2, 3)), (6, 2, 2, (2, 2)), (7, 4, 2, (1, 4)), (9, 1, 2, (5, 1))],
)
def test_micro_batches_are_few_and_hold_little_that_counts_nothing(
    sequences: int, micro: int, ranks: int, shape: tuple[int, int]
) -> None:
    train = {"global_batch_size": 10, "micro_batch_size": micro}
    config = parsed({"kind": "kl", "share": sequences / 10}, train=train)
    assert config.anchored == sequences
    assert anchor_shape(config, ranks) == shape


def test_its_micro_batches_are_among_the_accumulation_steps(workspace: Workspace, tmp_path: Path) -> None:
    plain = parse_config(workspace.tree(tmp_path / "run"))
    anchored = parse_config(workspace.tree(tmp_path / "run", anchor={"kind": "kl", "share": 0.4}))
    assert resolve(plain, "run", 2).accumulation_steps == 3
    assert resolve(anchored, "run", 2).accumulation_steps == 5  # five sequences, two of two ranks at a time


@pytest.mark.parametrize(
    ("anchor", "read"),
    [({}, {"probe.corpus"}), ({"corpus": ["own.jsonl"]}, {"anchor.corpus"}), ({"text": "sampled"}, set())],
)
def test_it_reads_the_probes_corpus_its_own_or_none(anchor: dict[str, Any], read: set[str]) -> None:
    config = parsed({"kind": "kl"} | anchor, method="llama_pro", expand={"layers": [1]})
    assert corpora_read(config, "train").keys() == read | {"data.domain"}


def test_without_text_nothing_begins(workspace: Workspace, tmp_path: Path) -> None:
    tree = workspace.tree(tmp_path / "run", method="llama_pro", probe={"corpus": []}, anchor={"kind": "neutral"})
    del tree["importance"]
    with pytest.raises(InputError, match=r"probe\.corpus: no corpus given"):
        resolve(parse_config(tree), "run")


def test_a_tokenizer_must_know_where_a_text_begins(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = workspace.tree(tmp_path / "run", anchor={"kind": "kl", "text": "sampled"})
    resolve(parse_config(tree), "run")
    monkeypatch.setattr("adept_ds.config.checks.first_token", lambda _: None)
    with pytest.raises(InputError) as caught:
        resolve(parse_config(tree), "run")
    assert_one_line(f"adept: {caught.value}", ["anchor.text: sampled", "text: corpus"])
