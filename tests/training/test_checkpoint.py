"""Which checkpoints there are, and which fit a run."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint import (
    CheckpointManifest,
    adopt_checkpoint,
    change_of_shape,
    check_same_training,
    check_whole,
    load_checkpoint,
    newest_manifest,
    save_checkpoint,
)

TEXTS = {"data.domain": [{"texts": ["0" * 64], "share": 1.0}], "data.replay": []}
OTHER_TEXTS = {"data.domain": [{"texts": ["1" * 64], "share": 1.0}]}
MANIFEST = CheckpointManifest(
    step=20, world_size=2, zero_stage=3, fingerprint="f", settings={"train.lr": 0.1, "train.steps": 50} | TEXTS
)


def make_checkpoint(directory: Path, step: int) -> None:
    MANIFEST.model_copy(update={"step": step}).save(manifest_of(directory / checkpoint_tag(step)))


def test_only_complete_checkpoints_are_listed_and_in_numerical_order(tmp_path: Path) -> None:
    for step in (100, 20, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_200").mkdir()  # without a manifest: never finished
    (tmp_path / "step_200" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"half")
    write_json(tmp_path / ".step_300.tmp" / "manifest.json", {})  # killed just before it took its name
    write_json(tmp_path / "step_best" / "manifest.json", {})  # a copy that the user made
    assert checkpoint_steps(tmp_path) == [9, 20, 100]


def test_without_a_directory_there_are_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "nothing") == []


def test_a_manifest_is_read_back_the_same(tmp_path: Path) -> None:
    assert newest_manifest(tmp_path) is None
    for step in (9, 20):
        make_checkpoint(tmp_path, step)
    assert newest_manifest(tmp_path) == MANIFEST
    check_same_training(tmp_path, MANIFEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"fingerprint": "g"}, ["model: ", "another model", "give the model"], id="expansion"),
        pytest.param({"settings": {"train.lr": 0.2}}, ["train.lr: ", "with 0.1, not 0.2; set it back"], id="setting"),
        pytest.param({"settings": {}}, ["train.lr: ", "with 0.1, not None"], id="setting gone"),
        pytest.param({"settings": OTHER_TEXTS}, ["data.domain: ", "was trained on other texts; set it"], id="texts"),
        pytest.param(
            {"settings": {"data.replay": TEXTS["data.domain"]}},
            ["data.replay: ", "was trained on other texts; set it"],
            id="more texts",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_a_remedy_that_harms_nothing(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    make_checkpoint(tmp_path, 20)
    if change.get("settings"):
        change = {"settings": MANIFEST.settings | change["settings"]}
    with pytest.raises(InputError) as caught:
        check_same_training(tmp_path, MANIFEST.model_copy(update=change))
    for word in [*words, "step_20"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search(r"\b(delete|remove|rm)\b", str(caught.value))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"world_size": 1}, ", written by 2 ranks under ZeRO-3, on 1 rank under ZeRO-3"),
        ({"zero_stage": 1}, ", written by 2 ranks under ZeRO-3, on 2 ranks under ZeRO-1"),
        ({"world_size": 4, "zero_stage": 2}, ", written by 2 ranks under ZeRO-3, on 4 ranks under ZeRO-2"),
    ],
)
def test_ranks_and_stage_may_change_and_that_is_said(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    make_checkpoint(tmp_path, 20)
    now = MANIFEST.model_copy(update=change)
    check_same_training(tmp_path, now)
    assert change_of_shape(tmp_path, now) == said


def test_a_checkpoint_that_is_adopted_still_says_who_wrote_it(tmp_path: Path) -> None:
    save(tmp_path / "trunk", 20, WritingEngine())
    branch = MANIFEST.model_copy(update={"world_size": 1, "zero_stage": 2, "settings": {"train.steps": 25}})
    adopt_checkpoint(tmp_path / "trunk" / "step_20", tmp_path / "branch", branch)
    found = newest_manifest(tmp_path / "branch")
    assert found is not None
    assert (found.world_size, found.zero_stage, found.settings) == (2, 3, {"train.steps": 25})
    assert check_whole(tmp_path / "branch" / "step_20").files == {"states.pt": 6}


# --- random numbers -------------------------------------------------------------------------------------------------


def draws_after_loading(directory: Path, written: list[Any], rank: int, world_size: int) -> list[float]:
    """What a rank draws next where training goes on, on a device without random numbers of its own."""
    saved = SimpleNamespace(client={"adept_ds": {"ranks": written}})
    module = "adept_ds.training.checkpoint"
    ranks = mock.Mock(rank=rank, world_size=world_size, on_each=lambda *_: saved)
    with mock.patch(f"{module}.resume"), mock.patch(f"{module}.read_saved_state"), torch.random.fork_rng(devices=[]):
        states = load_checkpoint(cast(Any, None), directory, MANIFEST, ranks)
        assert states == [{"rank": writer} for writer in range(len(written))]
        return [*torch.rand(3).tolist(), random.random()]


def test_ranks_that_were_there_draw_on_and_others_draw_something_of_their_own(tmp_path: Path) -> None:
    """Of two ranks that wrote, on two, one and five; the same each time."""
    written, following = [], []
    for rank in range(2):
        state = torch.Generator().manual_seed(rank)
        python = random.Random(rank)
        written.append(({"torch": state.get_state(), "python": python.getstate(), "cuda": None}, {"rank": rank}))
        following.append([*torch.rand(3, generator=state).tolist(), python.random()])
    for world_size in (1, 2, 5):
        found = [draws_after_loading(tmp_path, written, rank, world_size) for rank in range(world_size)]
        assert found[:2] == following[:world_size]
        assert found == [draws_after_loading(tmp_path, written, rank, world_size) for rank in range(world_size)]
        assert len({draws[0] for draws in found}) == world_size


# --- saving ---------------------------------------------------------------------------------------------------------


class WritingEngine:
    """Writes one file where DeepSpeed would; or fails after it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_checkpoint(self, save_dir: str, tag: str, **options: Any) -> None:
        (Path(save_dir) / tag / "states.pt").write_bytes(b"states")
        if self.error:
            raise self.error


def save(directory: Path, step: int, engine: WritingEngine, *, keep: int = 2) -> None:
    manifest = MANIFEST.model_copy(update={"step": step})
    save_checkpoint(cast(Any, engine), directory, manifest, Ranks(), keep, {}, lambda folder: None)


def test_a_checkpoint_is_there_when_it_is_whole_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, WritingEngine())
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert (tmp_path / "latest").read_text() == "step_3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_2", "step_3"]
    assert sorted(path.name for path in (tmp_path / "step_3").iterdir()) == ["manifest.json", "states.pt"]


def test_saving_that_fails_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    save(tmp_path, 1, WritingEngine())
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2, WritingEngine(OSError("no space left on device")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    assert (tmp_path / "latest").read_text() == "step_1"


def test_what_is_left_of_an_old_checkpoint_does_not_stop_a_new_one_but_a_whole_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "states.pt").write_bytes(b"half removed")
    save(tmp_path, 1, WritingEngine())
    first = newest_manifest(tmp_path)
    with pytest.raises(InputError, match=r"'.*step_1' is a whole checkpoint already; put it aside"):
        save(tmp_path, 1, WritingEngine())
    assert newest_manifest(tmp_path) == first


def test_checkpoints_that_say_the_same_are_told_apart_wherever_they_are_copied(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save(tmp_path / name, 1, WritingEngine())
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    one, other, copy = (newest_manifest(tmp_path / name) for name in ("one", "other", "copy"))
    assert one == copy != other


@pytest.mark.parametrize(("content", "words"), [(b"sta", "has 3 bytes of 6"), (None, "has no bytes of 6")])
def test_a_checkpoint_that_was_copied_in_part_is_refused_by_the_file_that_lacks(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    save(tmp_path, 1, WritingEngine())
    checkpoint = tmp_path / "step_1"
    assert check_whole(checkpoint).files == {"states.pt": 6}
    (checkpoint / "states.pt").unlink()
    if content is not None:
        (checkpoint / "states.pt").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^'.*step_1/states\.pt' {words}; copy it again, or put this checkpoint aside"
    ):
        check_whole(checkpoint)
