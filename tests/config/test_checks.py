"""What cannot work together is refused, and the number that a refusal names is one that works."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.checks import accumulation_steps, check_files, check_layers, check_num_copies, check_replay
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.config.train_sections import TrainSection
from adept_ds.models.directory import ModelDirectory

BATCHES = list(itertools.product((1, 2, 3, 4, 7, 8, 12, 16), (1, 2, 3), (1, 2, 3, 8)))
"""Sequences of a global batch, of a micro-batch, and ranks."""


def test_a_batch_falls_evenly_on_ranks_or_the_nearest_size_that_does_is_named() -> None:
    def steps(size: int, micro: int, ranks: int) -> int:
        return accumulation_steps(TrainSection(global_batch_size=size, micro_batch_size=micro), ranks)

    for size, micro, ranks in BATCHES:
        if size % (micro * ranks) == 0:
            assert steps(size, micro, ranks) * micro * ranks == size
            continue
        with pytest.raises(InputError, match=r"^train\.global_batch_size: ") as refusal:
            steps(size, micro, ranks)
        (named,) = map(int, re.findall(r"(?:use|at least) (\d+)", str(refusal.value)))
        if size < ranks:
            assert named == ranks, "one sequence for each rank at least"
        else:
            assert steps(named, micro, ranks) > 0, (size, micro, ranks)
            assert abs(named - size) <= micro * ranks / 2 or named == micro * ranks, "the nearest, but not none"


def replaying(size: int, micro: int, share: float, source: str) -> Config:
    return parse_config(
        {
            "model": "m",
            "run_dir": "r",
            "data": {"replay": ["g.jsonl"], "replay_share": share},
            "importance": {"source": source},
            "train": {"global_batch_size": size, "micro_batch_size": micro},
        }
    )


@pytest.mark.parametrize("source", ["corpus", "online"])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.4, 0.5, 0.99])
def test_a_share_of_replay_fills_what_it_must_or_one_that_does_is_named(share: float, source: str) -> None:
    """Both texts are in every batch; with online importance, the micro-batches of all ranks hold one text only."""
    seen = set()
    for size, micro, ranks in BATCHES:
        if size % (micro * ranks):
            continue  # refused already, see above
        unit = micro * ranks if source == "online" else 1
        config = replaying(size, micro, share, source)
        if 0 < config.replayed < size and config.replayed % unit == 0:
            check_replay(config, ranks)
            continue
        with pytest.raises(InputError, match=r"^data\.replay_share: ") as refusal:
            check_replay(config, ranks)
        remedy = re.search(r"use ([\d.]+), which replays (\d+)$", str(refusal.value))
        seen.add(remedy is None)
        if remedy is None:
            assert size < 2 * unit
            assert f"raise train.global_batch_size to at least {2 * unit}," in str(refusal.value)
        else:
            named = replaying(size, micro, float(remedy[1]), source)
            check_replay(named, ranks)
            assert named.replayed == int(remedy[2]), (size, micro, ranks)
    assert any(seen), "some batches have no room for both texts"
    assert not all(seen) or source == "corpus", "some have, but not for this share"


def test_without_replay_there_is_nothing_to_share() -> None:
    check_replay(parse_config({"model": "m", "run_dir": "r", "train": {"global_batch_size": 1}}), 3)


@pytest.mark.parametrize(
    ("expand", "words"),
    [
        ({"k": 6}, r"^expand\.k: 6 is more than the 5 layers of .*at most 5$"),
        (
            {"k": 4, "spare_top": 2},
            r"^expand\.k: 4 is more than the 3 layers of .* without the 2 of expand\.spare_top; ",
        ),
        ({"k": "auto", "spare_top": 5}, r"^expand\.spare_top: 5 leaves none of the 5 layers of .*; lower it$"),
        (
            {"k": 2, "choose": "gain", "min_distance": 3, "spare_top": 2},
            r"^expand\.min_distance: 3 leaves room for 1 of ",
        ),
        ({"layers": [4, 5]}, r"^expand\.layers: 5 is no layer of .*; it has 0 to 4$"),
        ({"layers": [-1]}, r"^expand\.layers: -1 is no layer of .*; it has 0 to 4$"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(
    workspace: Workspace, tmp_path: Path, expand: dict[str, Any], words: str
) -> None:
    model = ModelDirectory.read(workspace.model)
    with pytest.raises(InputError, match=words):
        check_num_copies(parse_config(workspace.tree(tmp_path / "run") | {"expand": expand}), model)


def test_every_layer_of_the_model_may_be_copied(workspace: Workspace, tmp_path: Path) -> None:
    model = ModelDirectory.read(workspace.model)
    check_layers(range(5), model)
    for expand in ({"k": 5}, {"k": 3, "spare_top": 2}, {"k": "auto"}, {"layers": [0, 4]}):
        check_num_copies(parse_config(workspace.tree(tmp_path / "run") | {"expand": expand}), model)


def test_a_corpus_has_files_and_each_of_them_says_something(tmp_path: Path) -> None:
    good, empty, missing = (tmp_path / name for name in ("good.txt", "empty.txt", "missing.txt"))
    good.write_text("text")
    empty.touch()
    check_files("data.domain", [good])
    refused: dict[str, list[Path]] = {
        r"^data\.domain: no corpus given; list": [],
        r"^data\.domain: '.*empty\.txt' is empty; leave it out": [good, empty],
        r"^data\.domain: '.*missing\.txt' does not exist; give": [good, missing],
    }
    for words, files in refused.items():
        with pytest.raises(InputError, match=words):
            check_files("data.domain", files)
