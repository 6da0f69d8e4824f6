"""A full disk, in every kind of write: one line that names the path, nothing half-written, and with room it works."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from harness.launching import ROOT
from harness.one_tensor import OneTensor
from harness.packing import text_source, tokenisation
from harness.small_disk import SmallDisk, small_disk, small_files
from harness.workspace import Workspace
from safetensors.torch import save_file

from adept_ds.base.errors import AdeptError, InputError, MachineError
from adept_ds.base.files import link_file, new_directory, write_all, write_json, write_text, writing
from adept_ds.base.outputs import new_output
from adept_ds.base.run_dir import RunDirectory
from adept_ds.data.tokens import tokens_of
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint import CheckpointManifest
from adept_ds.training.checkpoint_writer import CheckpointWriter, Retention
from adept_ds.training.run_log import RunLog
from adept_ds.units.registry import Unit
from adept_ds.weights.expansion import expand_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
"""TensorBoard's thread has its say in the log, and ours where it is asked next."""

ROOM, NEEDED = 48 << 10, 8 << 20
"""Bytes that there are, and more than any writer here wants."""

BIG = 256 << 10
TENSORS = {"a": torch.zeros(BIG // 4)}

Write = Callable[[Path, Workspace], None]


@pytest.fixture(scope="module", autouse=True)
def sources(workspace: Workspace) -> None:
    """What is copied, and what is tokenised."""
    (workspace.root / "big").write_bytes(bytes(BIG))
    (workspace.root / "long.txt").write_text("a word or two\n\n" * (BIG // 16))


def expand(folder: Path, workspace: Workspace) -> None:
    expand_checkpoint(workspace.model, folder / "expanded", [1, 3])


def write_directory(folder: Path, workspace: Workspace) -> None:
    with new_directory(folder / "out") as fresh:
        (fresh / "a").write_bytes(bytes(BIG))


def write_safetensors(folder: Path, workspace: Workspace) -> None:
    with new_directory(folder / "out") as fresh:
        save_file(TENSORS, fresh / "a.safetensors")


def write_output(folder: Path, workspace: Workspace) -> None:
    with new_output(folder / "out", "export") as fresh:
        (fresh / "a").write_bytes(bytes(BIG))


def copy_file(folder: Path, workspace: Workspace) -> None:
    link_file(workspace.root / "big", folder / "copy")


def tokenise(folder: Path, workspace: Workspace) -> None:
    tokens_of(text_source([workspace.root / "long.txt"]), tokenisation(workspace.model, folder / "tokens"), Ranks())


def save(folder: Path, big_state: bool) -> None:
    engine = OneTensor()
    engine.weight = torch.zeros(BIG // 4 if big_state else 1)
    manifest = CheckpointManifest(step=2, world_size=1, zero_stage=3, fingerprint="f", settings={})
    writer = CheckpointWriter(cast(Any, engine), folder / "checkpoints", Ranks(), Retention(2))
    writer.save(manifest, {}, lambda files: files.add_tensors("more.safetensors", {} if big_state else TENSORS))


def log_steps(folder: Path, workspace: Workspace) -> None:
    log = RunLog(RunDirectory(folder), 0, "model: m")
    for step in range(1, 400):
        log.step({"step": step, "loss": 2.0, "note": "x" * 500})
    log.close()


def log_units(folder: Path, workspace: Workspace) -> None:
    """Curves in TensorBoard, which fills the disk before the lines do."""
    units = [Unit(f"layers.{n}.a", "matrix", n, "a", 16) for n in range(40)]
    log = RunLog(RunDirectory(folder), 0, "model: m")
    for step in range(60):
        log._show_units("multiplier", step, units, [1.0] * 40)
    log.close()


WRITERS: dict[str, tuple[Write, str]] = {
    "a text": (lambda folder, _: write_text(folder / "a.txt", "x" * BIG), "a.txt"),
    "json": (lambda folder, _: write_json(folder / "deep" / "a.json", "x" * BIG), "deep/a.json"),
    "a directory": (write_directory, "out"),
    "safetensors": (write_safetensors, "out"),
    "an output": (write_output, "out"),
    "a copy": (copy_file, "copy"),
    "an expanded model": (expand, "expanded"),
    "tokens": (tokenise, "tokens/[0-9a-f]{32}"),
    "states of a checkpoint": (lambda folder, _: save(folder, True), "checkpoints/step_2/states.pt"),
    "tensors of a checkpoint": (lambda folder, _: save(folder, False), "checkpoints/step_2/more.safetensors"),
    "metrics": (log_steps, "(metrics.jsonl|tensorboard)"),
    "tensorboard": (log_units, "tensorboard"),
}
"""What is written -> how, below a folder, and what of it the message names."""


def leftovers(folder: Path) -> list[Path]:
    """But what a log had before it broke off, work that goes on from there, and what is a file of its own."""
    found = [path for path in folder.rglob("*") if path.is_file() and "unfinished" not in path.parts]
    kept = ("metrics.jsonl", "digests.json")
    return [path for path in found if path.name not in kept and path.parent.name != "tensorboard"]


def refused(write: Write, folder: Path, workspace: Workspace, words: str) -> None:
    with pytest.raises(MachineError) as caught:
        write(folder, workspace)
    line = str(caught.value)
    assert re.fullmatch(words, line), line
    assert leftovers(folder) == []


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files get no second names, as between file systems."""

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", link)


@contextmanager
def disk(folder: Path) -> Iterator[SmallDisk]:
    with small_disk(folder, ROOM) as found:
        yield found


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_written(
    what: str, workspace: Workspace, tmp_path: Path
) -> None:
    write, named = WRITERS[what]
    with disk(tmp_path / "disk") as small:
        path = f"{small.folder}/{named}"
        refused(
            write,
            small.folder,
            workspace,
            f"no space left on '{path}'; make room there, and run the same command again",
        )
        small.resize(NEEDED)
        write(small.folder, workspace)


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("what", WRITERS)
def test_so_is_a_limit_of_a_files_size(what: str, workspace: Workspace, tmp_path: Path) -> None:
    """As of a FAT file system or of `ulimit -f`: to every library another way for a write to fail."""
    write, named = WRITERS[what]
    (tmp_path / "run").mkdir()
    with small_files(ROOM):
        limit = f"file size limit reached by '{tmp_path}/run/{named}'"
        words = f"{limit}; look at its file system, and run the same command again"
        refused(write, tmp_path / "run", workspace, words)
    write(tmp_path / "run", workspace)


def test_however_much_room_there_is_a_file_is_whole_or_absent(workspace: Workspace, tmp_path: Path) -> None:
    """The last write may be taken in part, without an error; a page at a time, up to where all has room."""
    wanted = tmp_path / "wanted"
    expand_checkpoint(workspace.model, wanted, [1, 3])
    size, ends = sum(path.stat().st_size for path in wanted.iterdir()), set()
    for room in range(size // 4096 * 4096 - 8 * 4096, size + 24 * 4096, 4096):
        with small_files(room - size + (wanted / "model.safetensors").stat().st_size):
            try:
                expand_checkpoint(workspace.model, tmp_path / "out", [1, 3], overwrite=True)
            except MachineError:
                assert not (tmp_path / "out").exists()
                ends.add("absent")
            else:
                found = (tmp_path / "out" / "model.safetensors").read_bytes()
                assert found == (wanted / "model.safetensors").read_bytes()
                ends.add("whole")
                break
    assert ends == {"absent", "whole"}


class ShortFile:
    """Takes a part of what it is given, as a file without a buffer may."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, content: Any) -> int:
        taken = bytes(content[:3])
        self.content += taken
        return len(taken)


def test_what_a_file_takes_in_part_is_given_to_it_again() -> None:
    file = ShortFile()
    assert write_all(cast(Any, file), b"0123456789") == 10
    assert file.content == b"0123456789"


@pytest.mark.parametrize(
    "error", [InputError("a: b; c"), AdeptError("a"), ValueError("No such thing"), OSError(errno.ENOENT, "none")]
)
def test_other_errors_are_what_they_were(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error


def test_of_a_disk_that_fails_otherwise_the_file_system_is_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"^input/output error on '.*'; look at its file system, and run the same"):
        Ranks().on_main(lambda: fail(OSError(errno.EIO, "Input/output error", str(tmp_path / "a"))))


def fail(error: Exception) -> None:
    raise error


LOGGING = """
import sys
from pathlib import Path
from adept_ds.base.terminal import capture_output
with capture_output(Path(sys.argv[1]), is_main=True) as terminal:
    for _ in range(1000):
        print("a library " * 10)
        sys.stderr.write("and its complaint " * 10)
    terminal.say("it went on")
print("after")
"""


def test_no_run_ends_for_a_line_in_its_log(tmp_path: Path) -> None:
    """What libraries print when the disk is full is lost; what counts ends the run where it is written."""
    with small_disk(tmp_path / "disk", ROOM) as small:
        command = [sys.executable, "-c", LOGGING, str(small.folder / "logs" / "rank_0.log")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "it went on\nafter\n", "")
