"""Places that one run of a study has weighed are not weighed again by another that chooses by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import RunDirectory
from adept_ds.probing.places import PlaceScores, TextRecord
from adept_ds.study.shared import SharedWork, probe_seconds


def inputs(choose: str, domain: str = "d", **expand: Any) -> dict[str, Any]:
    """Of a cell, as far as what is shared looks at them (see `cells.inputs_of`)."""
    data = dict.fromkeys(
        ("format", "text_key", "question_template", "max_bad_records", "bos", "special_tokens_in_text", "packing")
    )
    held_out = dict.fromkeys(("general_eval", "domain_eval", "eval_sequences", "seq_len"))
    probe = {"corpus": "g", "sequences": 8} | ({} if choose == "gain" else {"method": "mask"})
    return {
        "model": "m",
        "data": data | held_out | {"domain": domain},
        "train": {"precision": "fp32"},
        "probe": probe,
        "expand": {"choose": choose} | expand,
        "eval": {"tasks": [], "lm_eval": []},
    }


def weighed(root: Path) -> RunDirectory:
    """A run that has weighed its places, and evaluated its base."""
    run, text = RunDirectory(root), TextRecord(loss=2.0, tokens=10, sequences=2, sources=())
    PlaceScores(domain=text, general=text, gains=(1.0, 2.0), harms=(0.0, 0.5), seconds=12.5).save(run.place_scores)
    run.base_evaluation.write_text("{}")
    write_json(run.ledger, {"places": {"of": "these"}, "eval_base": {"of": "those"}, "export": {}})
    return run


def test_another_choice_by_gain_takes_over_what_was_weighed(tmp_path: Path) -> None:
    shared, first, second = SharedWork(tmp_path / "shared"), weighed(tmp_path / "a"), RunDirectory(tmp_path / "b")
    assert not shared.has(inputs("gain"))
    shared.keep(first, inputs("gain"))
    other = inputs("gain", min_distance=3)
    assert shared.has(other), "no probe of deltas is missed"
    shared.take_over(second, other)
    assert second.place_scores.read_bytes() == first.place_scores.read_bytes()
    assert read_json(second.ledger) == {"places": {"of": "these"}, "eval_base": {"of": "those"}}
    assert probe_seconds(second) == 12.5


def test_what_is_chosen_by_deltas_or_on_another_domain_does_not(tmp_path: Path) -> None:
    shared = SharedWork(tmp_path / "shared")
    shared.keep(weighed(tmp_path / "a"), inputs("gain"))
    assert not shared.has(inputs("lowest")), "its probe is missing"
    assert not shared.has(inputs("gain", domain="another"))
    for name, other in (("b", inputs("lowest")), ("c", inputs("gain", domain="another"))):
        run = RunDirectory(tmp_path / name)
        shared.take_over(run, other)
        assert not run.place_scores.exists() and probe_seconds(run) == 0
