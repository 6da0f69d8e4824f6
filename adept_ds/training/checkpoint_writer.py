"""Writing checkpoints: whole or absent, one at a time, while training stands still or beside it.

    checkpoints/step_N/                 what DeepSpeed and the method have to keep, each rank its own files
    checkpoints/step_N/manifest.json    written last: what every file is, to the last bit
    checkpoints/latest                  the newest tag, as DeepSpeed's tools expect it, after that

Every rank brings its files to the disk and says what they are; only then does the directory take its real name. In the
background a rank copies what it has to write to the host's memory (12 bytes for each element that it steps, 16 where
movement is kept apart), and training goes on. Ranks speak with each other on the main thread alone: a checkpoint is
published at the first step after which all of them have written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adept_ds.base.background import at_once, in_background
from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.files import NewDirectory, write_text, writing
from adept_ds.base.proofs import FileProof
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint import CheckpointManifest, WrittenFile
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.random_states import save_random_state
from adept_ds.weights.deepspeed_files import write_scripts
from adept_ds.zero.checkpoint_states import checkpoint_states
from adept_ds.zero.engine import Engine


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    newest: int
    """So many."""
    every: int = 0
    """Optimizer steps: those of multiples stay too; 0: none besides the newest."""

    def goes(self, steps: list[int], stays: Collection[int] = ()) -> list[int]:
        """Those that are removed, of `steps`, ascending; none of `stays`."""
        old = [step for step in steps[: -self.newest] if step not in stays]
        return [step for step in old if not self.every or step % self.every]


@dataclass(frozen=True)
class _Pending:
    manifest: CheckpointManifest
    stays: Collection[int]
    """Steps whose checkpoints are not removed, however old."""
    proofs: Future[dict[str, FileProof]]
    """Of this rank's files."""


class CheckpointWriter:
    """Writes the checkpoints of one engine; every rank calls every method alike."""

    def __init__(
        self, engine: Engine, directory: Path, ranks: Ranks, retention: Retention, *, background: bool = False
    ) -> None:
        self._engine, self._directory, self._ranks = engine, directory, ranks
        self._retention, self._background = retention, background
        self._new: NewDirectory | None = None
        self._pending: _Pending | None = None

    def save(
        self,
        manifest: CheckpointManifest,
        state: dict[str, Any],
        more: Callable[[CheckpointFiles], None],
        stays: Collection[int] = (),
    ) -> None:
        """Begin a checkpoint, after the one before it; not in the background, it is there when this returns.

        Args:
            state: of the trainer: what goes on from it is that of rank 0.
            more: adds this rank's other files.
            stays: steps whose checkpoints are not removed for it.

        Raises:
            MachineError: this one, or the one before it, cannot be written.
        """
        self.finish()
        folder = self._ranks.on_main(lambda: self._begin(manifest.step))
        files = CheckpointFiles(copied=self._background)
        try:
            client_state = {"step": manifest.step, "state": state}
            for name, content in checkpoint_states(self._engine, {"adept_ds": client_state}).items():
                files.add_state(name, content)
            save_random_state(files, self._ranks.rank)
            more(files)
        except BaseException:
            self.discard()
            raise
        run = in_background if self._background else at_once
        self._pending = _Pending(manifest, stays, run(partial(files.write, folder)))
        if not self._background:
            self.finish()

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write of a checkpoint that is not published yet."""
        return self._pending is not None and self._pending.proofs.done()

    def finish(self) -> None:
        """Publish what has been begun, if anything, as soon as all ranks have written it. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            files = _agreed(pending.proofs, self._ranks)
            manifest = pending.manifest.model_copy(update={"files": files})
            self._ranks.on_main(lambda: self._publish(manifest, pending.stays))
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing of what is not published; the other ranks need not be there."""
        self._pending = None
        if self._new is not None:
            self._new.discard()
            self._new = None

    def _begin(self, step: int) -> Path:
        with writing(self._directory):
            self._new = NewDirectory(self._directory / checkpoint_tag(step), refuse_if_whole)
            return self._new.temporary

    def _publish(self, manifest: CheckpointManifest, stays: Collection[int]) -> None:
        assert self._new is not None
        with writing(self._directory):
            manifest.sealed().save(manifest_of(self._new.temporary))
            self._new.publish()
            write_text(self._directory / "latest", checkpoint_tag(manifest.step))
            write_scripts(self._directory)
            for step in self._retention.goes(checkpoint_steps(self._directory), stays):
                old = self._directory / checkpoint_tag(step)
                manifest_of(old).unlink()  # first: half of it is no checkpoint
                shutil.rmtree(old, ignore_errors=True)  # a network file system may hold on to a file


def refuse_if_whole(place: Path) -> None:
    """What is no checkpoint was left by a process that was killed while it removed an old one."""
    if manifest_of(place).exists():
        raise InputError(f"'{place}' is a whole checkpoint already; put it aside to train these steps again")


def _agreed(proofs: Future[dict[str, FileProof]], ranks: Ranks) -> dict[str, WrittenFile]:
    """The files of all ranks. Raises, on every rank, the error of the first one that could not write."""
    error = proofs.exception()
    unexpected = f"rank {ranks.rank} failed: {type(error).__name__}: {error}"
    told = error if error is None or isinstance(error, AdeptError) else AdeptError(unexpected)
    found = ranks.gather((None if told else proofs.result(), told))
    if error is not None:
        raise error
    for _, others in found:
        if others is not None:
            raise others
    return {
        name: WrittenFile(size=proof.size, sha256=proof.sha256, rank=rank)
        for rank, (of_rank, _) in enumerate(found)
        for name, proof in sorted((of_rank or {}).items())
    }
