"""What a run wrote about itself is read back strictly; of a log, only a line that a crash cut short is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.run_records import (
    Evaluation,
    GivenUp,
    LogLine,
    MetricsLine,
    RunSummary,
    log_line,
    read_log,
)

STEP = {"step": 1, "loss": 2.5, "tokens": 64, "seconds": 0.5, "tokens_per_second": 128.0, "mfu": 0.5, "lr": 1e-4}
LOSS = {"loss": 2.5, "tokens": 31}


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_log_says_what_its_lines_say(tmp_path: Path) -> None:
    log = write_lines(tmp_path / "metrics.jsonl", STEP, {"step": 1, "eval": {}}, {"step": 2, "refresh_seconds": 1.5})
    lines = [line for _, line in read_log(log, MetricsLine)]
    assert [line.is_step for line in lines] == [True, False, False]
    assert (lines[0].tokens, lines[2].refresh_seconds) == (64, 1.5)
    raw, _ = next(read_log(log, LogLine))
    assert json.loads(raw) == STEP, "as it stands there"
    assert list(read_log(tmp_path / "none.jsonl", LogLine)) == []


def test_the_last_line_may_be_cut_short_and_no_other(tmp_path: Path) -> None:
    log = write_lines(tmp_path / "metrics.jsonl", STEP, '{"step": 2, "lo')
    assert [line.step for _, line in read_log(log, MetricsLine)] == [1]
    log = write_lines(tmp_path / "metrics.jsonl", STEP, '{"step": 2, "lo\n', STEP)
    with pytest.raises(InputError, match=r"metrics\.jsonl' line 2 is damaged"):
        list(read_log(log, MetricsLine))


def test_no_bit_of_a_line_can_change_what_is_read(tmp_path: Path) -> None:
    """Of what a line says; its checksum, the last 22 bytes, may be lost without it."""
    written = log_line(STEP | {"note": "µ"}).encode()
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(written * 2)
    said = [line for _, line in read_log(log, MetricsLine)]
    assert [line.loss for line in said] == [2.5, 2.5]
    assert json.loads(written) == STEP | {"note": "µ", "crc32": json.loads(written)["crc32"]}
    for bit in range(8 * (len(written) - 1)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        log.write_bytes(bytes(changed) + written)
        try:
            assert [line for _, line in read_log(log, MetricsLine)] == said
            assert bit // 8 >= len(written) - 23
        except InputError as error:
            assert "line 1 is damaged" in str(error)


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": "1"}, {"loss": "low"}, {"tokens": 1.5}, {"mfu": None}],
    ids=lambda change: str(change),
)
def test_a_step_of_other_values_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    log = write_lines(tmp_path / "metrics.jsonl", STEP | change, STEP)
    with pytest.raises(InputError, match=r"line 1 is damaged"):
        list(read_log(log, MetricsLine))


def test_a_step_has_all_that_sums_are_formed_of(tmp_path: Path) -> None:
    log = write_lines(tmp_path / "metrics.jsonl", {key: value for key, value in STEP.items() if key != "mfu"}, STEP)
    with pytest.raises(InputError, match=r"a step without mfu"):
        list(read_log(log, MetricsLine))


def test_an_evaluation_is_of_the_same_corpora(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"base": {"general": LOSS}, "adapted": {"general": LOSS}}))
    assert Evaluation.load(file).base["general"].loss == 2.5
    file.write_text(json.dumps({"base": {"general": LOSS}, "adapted": {"domain": LOSS}}))
    with pytest.raises(InputError, match=r"evaluation\.json' is damaged .*different corpora.*`adept eval CONFIG`"):
        Evaluation.load(file)


def test_an_evaluation_says_what_it_knows_and_nothing_else(tmp_path: Path) -> None:
    """As it is written, so that one from before there were sources stays as it was."""
    file, old = tmp_path / "evaluation.json", {"base": {"general": LOSS}, "adapted": {"general": LOSS}}
    asked = LOSS | {"documents": 3, "questions": 1, "accuracy": 0.0, "accuracy_norm": 1.0}
    new = LOSS | {"documents": 4, "sources": {"one": LOSS, "two": asked}}
    for tree in (old, old | {"adapted": {"general": new}, "dial": [{"alpha": 0.5, "corpora": {"general": new}}]}):
        file.write_text(json.dumps(tree))
        assert Evaluation.load(file).to_json() == tree
    file.write_text(json.dumps(old | {"dial": [{"alpha": 0.5, "corpora": {"domain": LOSS}}]}))
    with pytest.raises(InputError, match="different corpora"):
        Evaluation.load(file)


def test_a_summary_may_be_half_finished_and_have_more(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"trainable_parameters": 12, "precision": "float32"}))
    assert RunSummary.load(file).tokens is None
    file.write_text(json.dumps({"trainable_parameters": -12}))
    with pytest.raises(InputError, match=r"summary\.json' is damaged"):
        RunSummary.load(file)


@pytest.mark.parametrize(
    ("given_up", "before", "now", "may"),
    [
        pytest.param((0.01,), 0.01, 0.001, True, id="lower"),
        pytest.param((0.01,), 0.01, 0.02, False, id="higher"),
        pytest.param((0.01,), 0.01, 0.01, False, id="the same is no other"),
        pytest.param((0.01, 0.003), 0.01, 0.005, False, id="above one that broke down later"),
        pytest.param((0.01, 0.003), 0.01, 0.001, True, id="below both, from before the first change"),
        pytest.param((0.01,), 0.001, 0.0001, False, id="of training that has not broken down"),
        pytest.param((), 0.01, 0.001, False, id="of a run that never has"),
    ],
)
def test_a_rate_may_be_lowered_where_training_broke_down_with_it(
    tmp_path: Path, given_up: tuple[float, ...], before: float, now: float, may: bool
) -> None:
    if given_up:
        GivenUp(lr=given_up).save(tmp_path / "given_up.json")
    assert GivenUp.of(tmp_path / "given_up.json").may_lower(before, now) == may
