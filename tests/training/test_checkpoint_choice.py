"""The newest checkpoint that is whole is taken; one that is not is named, and stays."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint import CheckpointManifest, WrittenFile, check_whole, verify
from adept_ds.training.checkpoint_choice import adopt_checkpoint, choose, set_aside


def make(directory: Path, *steps: int) -> Path:
    for step in steps:
        place, content = directory / checkpoint_tag(step), b"states of %d" % step
        place.mkdir(parents=True)
        (place / "states.pt").write_bytes(content)
        file = WrittenFile(size=len(content), sha256=sha256(content).hexdigest(), rank=0)
        manifest = CheckpointManifest(step=step, world_size=1, zero_stage=3, fingerprint="f", settings={})
        manifest.model_copy(update={"files": {"states.pt": file}}).sealed().save(manifest_of(place))
    (directory / "latest").write_text(checkpoint_tag(steps[-1]))
    return directory


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def chosen(directory: Path) -> int:
    return choose(directory, checkpoint_steps(directory), lambda place: verify(place, Ranks())).step


def test_the_newest_is_taken_by_number(tmp_path: Path) -> None:
    assert chosen(make(tmp_path, 9, 20, 100)) == 100
    assert choose(tmp_path, [], check_whole).manifest is None


@pytest.mark.parametrize("name", ["states.pt", "manifest.json"])
def test_a_damaged_one_is_named_and_put_aside_and_the_one_before_it_is_taken(tmp_path: Path, name: str) -> None:
    flip(make(tmp_path, 9, 20) / "step_20" / name)
    before = (tmp_path / "step_20" / name).read_bytes()
    choice = choose(tmp_path, [9, 20], lambda place: verify(place, Ranks()))
    assert choice.step == 9
    assert checkpoint_steps(tmp_path) == [9, 20], "choosing changes nothing"
    lines: list[str] = []
    set_aside(tmp_path, choice, lines.append)
    (line,) = lines
    for word in (f"step_20/{name}' is ", "kept as 'step_20.damaged1', going on from step 9"):
        assert word in line
    assert checkpoint_steps(tmp_path) == [9]
    assert (tmp_path / "latest").read_text() == "step_9"
    assert (tmp_path / "step_20.damaged1" / name).read_bytes() == before


def test_if_none_is_whole_that_is_one_line(tmp_path: Path) -> None:
    for step in (9, 20):
        flip(make(tmp_path / str(step), step) / checkpoint_tag(step) / "states.pt")
        (tmp_path / str(step) / checkpoint_tag(step)).rename(tmp_path / checkpoint_tag(step))
    with pytest.raises(InputError) as refusal:
        chosen(tmp_path)
    for word in ("none of the checkpoints of steps [9, 20] is whole: ", "step_20/states.pt' is not", "put '"):
        assert word in str(refusal.value)
    assert checkpoint_steps(tmp_path) == [9, 20]


def test_a_checkpoint_under_the_name_of_another_is_not_that_one(tmp_path: Path) -> None:
    (make(tmp_path, 9, 20) / "step_20").rename(tmp_path / "step_30")
    choice = choose(tmp_path, checkpoint_steps(tmp_path), check_whole)
    assert choice.step == 9 and "holds a checkpoint of step 20" in str(choice.damaged[30])


def test_the_second_of_two_damaged_ones_of_a_step_has_a_name_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        flip(make(tmp_path, *({9, 20} - set(checkpoint_steps(tmp_path)))) / "step_20" / "states.pt")
        set_aside(tmp_path, choose(tmp_path, [9, 20], lambda place: verify(place, Ranks())), lambda line: None)
    assert sorted(path.name for path in tmp_path.glob("step_20*")) == ["step_20.damaged1", "step_20.damaged2"]


@pytest.mark.parametrize("older", [False, True])
def test_an_adopted_checkpoint_is_proved_by_a_manifest_of_its_own(tmp_path: Path, older: bool) -> None:
    source = make(tmp_path / "trunk", 9) / "step_9"
    manifest = CheckpointManifest.load(manifest_of(source))
    if older:
        manifest.model_copy(update={"files": {"states.pt": 11}, "check": None}).save(manifest_of(source))
    branch = {"settings": {"train.steps": 12}, "world_size": 4, "zero_stage": 1}
    adopt_checkpoint(source, tmp_path / "branch", manifest.model_copy(update=branch))
    taken = verify(tmp_path / "branch" / "step_9", Ranks())
    assert taken.files == manifest.files and taken.settings == {"train.steps": 12} and taken.id != manifest.id
    assert (taken.world_size, taken.zero_stage) == (1, 3), "of those that wrote it"
    assert (tmp_path / "branch" / "latest").read_text() == "step_9"
    flip(tmp_path / "branch" / "step_9" / "states.pt")
    with pytest.raises(InputError, match="not as it was written"):
        chosen(tmp_path / "branch")
