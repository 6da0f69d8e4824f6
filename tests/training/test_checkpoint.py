"""Which checkpoints there are, which fit a run, and whether they are what was written."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from adept_ds.base.digests import json_digest
from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint import (
    CheckpointManifest,
    WrittenFile,
    change_of_shape,
    check_same_training,
    check_whole,
    load_checkpoint,
    verify,
)
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.random_states import save_random_state

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
    make_checkpoint(tmp_path, 20)
    assert CheckpointManifest.load(manifest_of(tmp_path / "step_20")) == MANIFEST
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


# --- random numbers -------------------------------------------------------------------------------------------------


def seed(rank: int) -> None:
    torch.manual_seed(rank)
    random.seed(rank)
    random.gauss(0, 1)  # half of a pair: the other half is part of the state


def draw() -> list[float]:
    return [*torch.rand(3).tolist(), random.gauss(0, 1), random.random()]


def draws_after_loading(directory: Path, rank: int, world_size: int) -> list[float]:
    """What a rank draws next where training goes on, on a device without random numbers of its own."""
    client: dict[str, Any] = {"state": {"rank": 0}}
    saved = SimpleNamespace(client={"adept_ds": client})
    module = "adept_ds.training.checkpoint"
    ranks = mock.Mock(rank=rank, world_size=world_size, on_each=lambda action, _: action())
    with mock.patch(f"{module}.resume"), mock.patch(f"{module}.read_saved_state", return_value=saved):
        assert load_checkpoint(cast(Any, None), directory, MANIFEST, ranks)["rank"] == 0
    return draw()


def test_ranks_that_were_there_draw_on_and_others_draw_something_of_their_own(tmp_path: Path) -> None:
    """Of two ranks that wrote, on two, one and five; the same each time."""
    following, before = [], (torch.get_rng_state(), random.getstate())
    for rank in range(2):
        seed(rank)
        files = CheckpointFiles(copied=False)
        save_random_state(files, rank)
        (tmp_path / "step_20").mkdir(exist_ok=True)
        files.write(tmp_path / "step_20")
        following.append(draw())
    for world_size in (1, 2, 5):
        found, again = (
            [draws_after_loading(tmp_path, rank, world_size) for rank in range(world_size)] for _ in range(2)
        )
        assert found[:2] == following[:world_size]
        assert found == again
        assert len({draws[0] for draws in found}) == world_size
    torch.set_rng_state(before[0])
    random.setstate(before[1])


# --- what its files are ---------------------------------------------------------------------------------------------


CONTENT = {"states.pt": b"states", "more/rank_1.safetensors": b"of another rank"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of two files, as two ranks wrote it."""
    place = tmp_path / "step_20"
    files = {}
    for rank, (name, content) in enumerate(CONTENT.items()):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        files[name] = WrittenFile(size=len(content), sha256=sha256(content).hexdigest(), rank=rank)
    MANIFEST.model_copy(update={"files": files}).sealed().save(manifest_of(place))
    return place


def test_a_checkpoint_as_it_was_written_is_whole(checkpoint: Path) -> None:
    assert verify(checkpoint, Ranks()) == check_whole(checkpoint) == CheckpointManifest.load(manifest_of(checkpoint))


@pytest.mark.parametrize("name", CONTENT)
def test_one_flipped_bit_of_any_file_is_found_and_the_file_named(checkpoint: Path, name: str) -> None:
    for bit in range(8 * len(CONTENT[name])):
        content = bytearray(CONTENT[name])
        content[bit // 8] ^= 1 << bit % 8
        (checkpoint / name).write_bytes(content)
        with pytest.raises(DamagedError, match=f"{name}' is not as it was written"):
            verify(checkpoint, Ranks())


class OneOfTwo(Ranks):
    """The other one has nothing to complain of, unless it is told to."""

    complaint: DamagedError | None = None

    def on_main(self, action: Callable[[], Any]) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        return [value, self.complaint] if self.rank == 0 else [self.complaint, value]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_file_is_read_by_one_rank_and_all_end_alike(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    read: list[Path] = []
    monkeypatch.setattr("adept_ds.training.checkpoint.check_file", lambda place, name, file: read.append(place / name))
    ranks = OneOfTwo(rank, 2)
    verify(checkpoint, ranks)
    assert read == [checkpoint / list(CONTENT)[rank]]
    object.__setattr__(ranks, "complaint", DamagedError("what the other one found"))
    with pytest.raises(DamagedError, match="what the other one found"):
        verify(checkpoint, ranks)


def test_one_flipped_bit_of_the_manifest_is_found_or_says_the_same(checkpoint: Path) -> None:
    path = manifest_of(checkpoint)
    before, content = CheckpointManifest.load(path), path.read_bytes()
    seen = 0
    for byte in range(len(content)):
        changed = bytearray(content)
        changed[byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        try:
            assert CheckpointManifest.load(path) == before  # another blank
        except DamagedError:
            seen += 1
    assert seen > 0.9 * len(content)


@pytest.mark.parametrize(("content", "words"), [(b"sta", "has 3 bytes of 6"), (None, "cannot be read (No such file")])
def test_a_checkpoint_that_was_copied_in_part_is_found_without_reading_it(
    checkpoint: Path, content: bytes | None, words: str
) -> None:
    (checkpoint / "states.pt").unlink()
    if content is not None:
        (checkpoint / "states.pt").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"^'.*step_20/states\.pt' {re.escape(words)}"):
        check_whole(checkpoint)


def test_a_file_that_is_a_link_is_none_of_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    for name in CONTENT:
        path = checkpoint / name
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DamagedError, match=f"{name}' is a link"):
            check_whole(checkpoint)
        path.unlink()
        (tmp_path / "elsewhere").rename(path)
    (checkpoint / "more").rename(tmp_path / "more")
    (checkpoint / "more").symlink_to(tmp_path / "more")
    with pytest.raises(DamagedError, match=r"rank_1\.safetensors' is a link"):
        check_whole(checkpoint)


@pytest.mark.parametrize("name", ["/etc/passwd", "../step_19/states.pt", "more/../../x", "", ".", "a\0b"])
def test_no_path_in_a_manifest_leaves_its_directory(checkpoint: Path, name: str) -> None:
    tree = read_json(manifest_of(checkpoint))
    tree["files"][name] = tree["files"].pop("states.pt")
    tree["check"] = json_digest({key: value for key, value in tree.items() if key != "check"} | {"check": None})
    write_json(manifest_of(checkpoint), tree)
    with pytest.raises(DamagedError, match="is no name of a file in this directory"):
        check_whole(checkpoint)


def test_a_pickle_that_came_later_is_not_opened_with_the_others(checkpoint: Path) -> None:
    (checkpoint / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"rank_7.*came to this checkpoint after it was written; move it away"):
        verify(checkpoint, Ranks())


def test_a_checkpoint_of_an_older_program_is_known_by_sizes(checkpoint: Path) -> None:
    sizes: Any = {name: len(content) for name, content in CONTENT.items()}
    without: Any = {}
    for files in (sizes, without):
        MANIFEST.model_copy(update={"files": files}).save(manifest_of(checkpoint))
        assert verify(checkpoint, Ranks()).files == files
    MANIFEST.model_copy(update={"files": sizes | {"states.pt": 5}}).save(manifest_of(checkpoint))
    with pytest.raises(DamagedError, match="has 6 bytes of 5"):
        verify(checkpoint, Ranks())


def test_checkpoints_that_say_the_same_are_told_apart_wherever_they_are_copied() -> None:
    assert MANIFEST.sealed() != MANIFEST.sealed()
