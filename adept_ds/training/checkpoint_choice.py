"""Which checkpoint training goes on from: the newest that is whole. One that is not stays, under another name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.files import aside, link_tree, new_directory, write_text
from adept_ds.base.proofs import FileProof
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.training.checkpoint import CheckpointManifest, WrittenFile
from adept_ds.training.checkpoint_writer import refuse_if_whole


@dataclass(frozen=True)
class Choice:
    """Among the checkpoints of a run."""

    manifest: CheckpointManifest | None = None
    """Of the one that is taken; None: there is none at all."""
    damaged: dict[int, DamagedError] = field(default_factory=dict)
    """Those that are newer, by step, and what is wrong with each."""

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest else 0


def choose(directory: Path, steps: Sequence[int], check: Callable[[Path], CheckpointManifest]) -> Choice:
    """The newest checkpoint that `check` finds whole; nothing is changed.

    Args:
        steps: of those that there are, ascending.
        check: `check_whole`, or `verify` on all ranks alike.

    Raises:
        InputError: there are some, and none is whole.
    """
    damaged = dict[int, DamagedError]()
    for step in reversed(steps):
        place = directory / checkpoint_tag(step)
        try:
            manifest = check(place)
            if manifest.step != step:
                raise DamagedError(f"'{place}' holds a checkpoint of step {manifest.step}")
            return Choice(manifest, damaged)
        except DamagedError as error:
            damaged[step] = error
    if damaged:
        raise InputError(
            f"none of the checkpoints of steps {list(steps)} is whole: {damaged[steps[-1]].reason}; copy one of them "
            f"again, or put '{directory}' aside to train from the start"
        )
    return Choice()


def set_aside(directory: Path, choice: Choice, say: Callable[[str], None]) -> None:
    """Make room for new checkpoints of the steps of damaged ones; on rank 0 alone.

    Args:
        say: is told of each.
    """
    for step, error in choice.damaged.items():
        kept = put_aside(directory, step, "damaged")
        say(f"{error.reason}: kept as '{kept}', going on from step {choice.step}")


def put_aside(directory: Path, step: int, why: str) -> str | None:
    """Let the checkpoint of step `step` count no more.

    Args:
        why: a word for the name that it gets.

    Returns:
        That name; None: there is no such checkpoint.
    """
    place = directory / checkpoint_tag(step)
    if not manifest_of(place).exists():
        return None
    kept = aside(place, why)
    place.rename(kept)
    left, latest = checkpoint_steps(directory), directory / "latest"
    if left:
        write_text(latest, checkpoint_tag(left[-1]))
    else:
        latest.unlink(missing_ok=True)
    return kept.name


def adopt_checkpoint(checkpoint: Path, directory: Path, manifest: CheckpointManifest) -> None:
    """Make the checkpoint of another run one of those in `directory`, under a manifest of its own; on rank 0 alone.

    Its files get second names and are not copied, where the file system can do that; the manifest still says which
    ranks wrote them.
    """
    tag, found = checkpoint_tag(manifest.step), CheckpointManifest.load(manifest_of(checkpoint))
    with new_directory(directory / tag, refuse_if_whole) as folder:
        link_tree(checkpoint, folder, leave_out={manifest_of(checkpoint).name})
        files = {}
        for path in filter(Path.is_file, sorted(folder.rglob("*"))):
            name = path.relative_to(folder).as_posix()
            files[name] = _proof(path, found.files.get(name))
        own = found.model_dump(include={"world_size", "zero_stage"}) | {"files": files}
        manifest.model_copy(update=own).sealed().save(manifest_of(folder))
    write_text(directory / "latest", tag)


def _proof(path: Path, known: WrittenFile | int | None) -> WrittenFile:
    if isinstance(known, WrittenFile):
        return known
    found = FileProof.of(path)
    return WrittenFile(size=found.size, sha256=found.sha256, rank=0)
