"""A checkpoint is there when it is whole; written beside training it is that of the moment when it was begun."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from harness.one_tensor import OneTensor
from safetensors.torch import load_file

from adept_ds.base.errors import InputError, MachineError
from adept_ds.base.files import read_json
from adept_ds.base.run_dir import checkpoint_steps
from adept_ds.ranks.collectives import Ranks
from adept_ds.training import checkpoint_files
from adept_ds.training.checkpoint import CheckpointManifest, WrittenFile, verify
from adept_ds.training.checkpoint_files import CheckpointFiles, on_host
from adept_ds.training.checkpoint_writer import CheckpointWriter, Retention

RANDOM = "random_state_rank_0.safetensors"
SCRIPTS = ["zero_to_fp32.py", "zero_to_torch.py"]


def writer(directory: Path, engine: OneTensor, keep: Retention = Retention(2), **options: Any) -> CheckpointWriter:
    return CheckpointWriter(cast(Any, engine), directory, Ranks(), keep, **options)


def save(
    of: CheckpointWriter, step: int, more: Callable[[CheckpointFiles], None] = lambda files: None, **state: Any
) -> None:
    of.save(CheckpointManifest(step=step, world_size=1, zero_stage=3, fingerprint="f", settings={}), state, more)


def stored(directory: Path, step: int) -> dict[str, Any]:
    return dict(torch.load(directory / f"step_{step}" / "states.pt", weights_only=False))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a disk that is full: no file grows beyond so many bytes."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_is_there_when_it_is_whole_and_the_oldest_go(tmp_path: Path) -> None:
    engine = OneTensor()
    of = writer(tmp_path, engine)
    for step in (1, 2, 3):
        engine.weight += 1
        save(of, step, tokens=step)
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert (tmp_path / "latest").read_text() == "step_3"
    assert names(tmp_path) == ["latest", "step_2", "step_3", *SCRIPTS]
    assert names(tmp_path / "step_3") == ["manifest.json", RANDOM, "states.pt"]
    assert torch.equal(stored(tmp_path, 3)["weight"], torch.full((1000,), 3.0))
    assert stored(tmp_path, 3)["adept_ds"] == {"step": 3, "state": {"tokens": 3}}
    assert engine.checkpoint_engine is None, "the engine's own is back"


@pytest.mark.parametrize(
    ("steps", "newest", "every", "stay"),
    [
        pytest.param([10, 20, 30, 40], 2, 0, [30, 40], id="the newest"),
        pytest.param([10, 20, 30, 40, 50], 1, 20, [20, 40, 50], id="every second besides"),
        pytest.param([10, 15, 20], 1, 20, [20], id="one is both"),
        pytest.param([7], 3, 0, [7], id="fewer than may stay"),
    ],
)
def test_the_newest_stay_and_every_so_many_th(steps: list[int], newest: int, every: int, stay: list[int]) -> None:
    goes = Retention(newest, every).goes(steps)
    assert [step for step in steps if step not in goes] == stay


def test_a_manifest_says_what_every_file_is_and_who_wrote_it(tmp_path: Path) -> None:
    save(writer(tmp_path, OneTensor()), 1, lambda files: files.add_tensors("more.safetensors", {"a": torch.ones(3)}))
    manifest = verify(tmp_path / "step_1", Ranks())
    assert (
        set(manifest.files)
        == {"states.pt", "more.safetensors", RANDOM}
        == {*names(tmp_path / "step_1")} - {"manifest.json"}
    )
    for name, file in manifest.files.items():
        assert isinstance(file, WrittenFile) and file.rank == 0
        assert file.size == (tmp_path / "step_1" / name).stat().st_size
    assert manifest.check is not None


def test_files_may_be_read_by_whoever_may_read_the_directory(tmp_path: Path) -> None:
    save(writer(tmp_path, OneTensor()), 1, lambda files: files.add_tensors("more.safetensors", {"a": torch.ones(3)}))
    place = tmp_path / "step_1"
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {place.stat().st_mode & 0o666}


def test_every_file_is_on_the_disk_before_the_directory_has_its_name(tmp_path: Path) -> None:
    """In the order: files, manifest, the directory's name, `latest`; each synced."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    with mock.patch.object(os, "fsync", fsync):
        save(writer(tmp_path, OneTensor()), 1)
    order = [name.split(".")[1] if name.startswith(".") else name for name in synced]  # without what makes it temporary
    places = [order.index(name) for name in ("states.pt", "manifest", tmp_path.name, "latest")]
    assert places == sorted(places)


def test_saving_that_fails_leaves_the_checkpoints_as_they_were(tmp_path: Path) -> None:
    save(writer(tmp_path, OneTensor()), 1)
    with pytest.raises(RuntimeError, match="a gather failed"):
        save(writer(tmp_path, OneTensor(RuntimeError("a gather failed"))), 2)
    assert names(tmp_path) == ["latest", "step_1", *SCRIPTS]
    assert (tmp_path / "latest").read_text() == "step_1"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["state", "tensors", "json", "manifest"])
def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(tmp_path: Path, background: bool, kind: str) -> None:
    engine = OneTensor()
    save(writer(tmp_path, engine), 1)
    of = writer(tmp_path, engine, background=background)
    if kind == "state":
        engine.weight = torch.zeros(100_000)

    def more(files: CheckpointFiles) -> None:
        if kind == "tensors":
            files.add_tensors("more.safetensors", {"a": torch.zeros(100_000)})
        if kind == "json":
            files.add_json("more.json", list(range(10_000)))

    with file_size_limit(30_000 if kind != "manifest" else 0), pytest.raises(MachineError) as refusal:
        if kind == "manifest":  # the files themselves are written elsewhere
            with mock.patch.object(CheckpointFiles, "write", return_value={}):
                save(of, 2, more)
                of.finish()
        save(of, 2, more)
        of.finish()
    file = {"state": "states.pt", "tensors": "more.safetensors", "json": "more.json"}.get(kind, "manifest.json")
    assert str(refusal.value).startswith(f"file size limit reached by '{tmp_path}/step_2/{file}'; ")
    assert names(tmp_path) == ["latest", "step_1", *SCRIPTS]


def test_what_is_left_of_an_old_checkpoint_does_not_stop_a_new_one_but_a_whole_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "states.pt").write_bytes(b"half removed")
    save(writer(tmp_path, OneTensor()), 1)
    first = read_json(tmp_path / "step_1" / "manifest.json")
    with pytest.raises(InputError, match=r"'.*step_1' is a whole checkpoint already; put it aside"):
        save(writer(tmp_path, OneTensor()), 1)
    assert read_json(tmp_path / "step_1" / "manifest.json") == first


# --- in the background ----------------------------------------------------------------------------------------------


@contextmanager
def writing_held_up() -> Iterator[threading.Event]:
    """No file is written until the event is set."""
    may_write, whole = threading.Event(), checkpoint_files._written

    def held_up(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return whole(*arguments)

    with mock.patch.object(checkpoint_files, "_written", held_up):
        yield may_write


def test_training_goes_on_meanwhile_and_what_is_written_is_of_the_moment_before(tmp_path: Path) -> None:
    engine, kept = OneTensor(), torch.ones(3)
    of = writer(tmp_path, engine, background=True)
    with writing_held_up() as may_write:
        save(of, 1, lambda files: files.add_tensors("more.safetensors", {"a": kept}), tokens=1)
        engine.weight += 7
        kept += 7
        assert not of.is_written and checkpoint_steps(tmp_path) == []
        may_write.set()
        of.finish()
    assert checkpoint_steps(tmp_path) == [1]
    assert verify(tmp_path / "step_1", Ranks()).step == 1
    assert not stored(tmp_path, 1)["weight"].any()
    assert torch.equal(load_file(tmp_path / "step_1" / "more.safetensors")["a"], torch.ones(3))


def test_there_are_never_two_at_once(tmp_path: Path) -> None:
    of = writer(tmp_path, OneTensor(), background=True)
    with writing_held_up() as may_write:
        save(of, 1)
        threading.Timer(0.2, may_write.set).start()
        save(of, 2)  # waits
        assert checkpoint_steps(tmp_path) == [1]
        of.finish()
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_what_is_being_written_when_training_ends_badly_is_no_checkpoint(tmp_path: Path) -> None:
    of = writer(tmp_path, OneTensor(), background=True)
    save(of, 1)
    of.finish()
    with writing_held_up() as may_write:
        save(of, 2)
        of.discard()
        may_write.set()
        of.finish()
    assert checkpoint_steps(tmp_path) == [1]


def test_an_error_in_the_background_ends_the_next_save_and_not_none(tmp_path: Path) -> None:
    engine = OneTensor()
    of = writer(tmp_path, engine, background=True)
    engine.weight = torch.zeros(100_000)
    with file_size_limit(10_000):
        save(of, 1)
        while not of.is_written:
            pass
    with pytest.raises(MachineError, match="file size limit reached by"):
        save(of, 2)
    assert checkpoint_steps(tmp_path) == []


def test_a_copy_on_the_host_shares_nothing_with_what_it_was_made_of() -> None:
    """But what is one tensor, or one object, stays one."""

    class Scaler:
        def __init__(self) -> None:
            self.scale = [2.0]

    tensor, scaler = torch.ones(4), Scaler()
    value: dict[str, Any] = {"a": tensor, "nested": [(tensor, tensor[1:])], "scaler": scaler, "again": scaler}
    copied = on_host(value)
    tensor += 1
    scaler.scale[0] = 3.0
    assert copied["a"] is copied["nested"][0][0]
    assert torch.equal(copied["a"], torch.ones(4)) and torch.equal(copied["nested"][0][1], torch.ones(3))
    assert copied["nested"][0][1].untyped_storage().nbytes() == 12, "a part of a tensor is copied without the rest"
    assert copied["scaler"] is copied["again"] and copied["scaler"].scale == [2.0]
