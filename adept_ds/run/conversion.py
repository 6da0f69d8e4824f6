"""What tools for conversion are given: the directory of a run, or what DeepSpeed or transformers wrote by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.outputs import check_as_written, check_output
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME, RunDirectory, checkpoint_tag, manifest_of
from adept_ds.config.checks import check_layers
from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config
from adept_ds.deltas.adapted import AdaptedModel
from adept_ds.deltas.operations import strip_copies
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory, check_model_dir
from adept_ds.ranks.collectives import Ranks
from adept_ds.run.prerequisites import exported_step
from adept_ds.training.checkpoint import CheckpointManifest, verify
from adept_ds.weights.deepspeed_files import tag_of
from adept_ds.weights.expansion import Expansion, expand_checkpoint
from adept_ds.weights.fingerprints import fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.saved_state import SavedState
from adept_ds.weights.saved_weights import read_saved_weights
from adept_ds.weights.universal import write_universal
from adept_ds.weights.verification import Verified, verify_expansion


def is_run(path: Path) -> bool:
    return RunDirectory(path).config.is_file()


def config_of(run: Path) -> Config:
    """The resolved configuration of a run, wherever the run was moved to. Raises `InputError`: it cannot be read."""
    return load_config(RunDirectory(run).config).model_copy(update={"run_dir": run})


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint to convert."""

    directory: Path
    """With its files."""
    run: Path | None
    """That it is of, where the run was given."""

    def start(self) -> Path:
        """The model that training started from.

        Raises:
            InputError: no run says which.
        """
        if self.run is None:
            held = read_saved_weights(self.directory)
            frozen = f"and {len(held.frozen)} frozen ones" if held.frozen else "and no frozen ones"
            raise InputError(
                f"--base is missing; '{self.directory}' holds {len(held.shapes)} trained tensors {frozen}, and is no "
                "model that could be loaded: --base DIR joins it to the model that training started from, "
                "--tensors-only writes what there is"
            )
        config = config_of(self.run)
        if method_of(config).makes_copies:
            return RunDirectory(self.run).expanded
        return ModelDirectory.resolve("model", str(config.model)).path


def find_checkpoint(path: Path, step: int | None = None) -> FoundCheckpoint:
    """That of a run (the newest, or the guard's best), or the one that `path` itself is or leads to.

    Args:
        step: of a run's checkpoint.

    Raises:
        InputError: there is none.
    """
    _check_there(path, "a run directory, or a checkpoint's such as run/checkpoints/step_100")
    if is_run(path):
        tag = checkpoint_tag(exported_step(config_of(path), step))
        return FoundCheckpoint(RunDirectory(path).checkpoints / tag, path)
    if step is not None:
        raise InputError(f"--step goes with a run directory, and '{path}' is none; give the checkpoint of that step")
    return FoundCheckpoint(tag_of(path), None)


def find_model(path: Path, layers: list[int] | None) -> tuple[Path, list[int]]:
    """A model and the layers to copy: those of a run, where `path` is one and `layers` does not say otherwise.

    Raises:
        InputError: there is none, it has no such layers, or nothing says which.
    """
    _check_there(path, "a run directory or a model's")
    expansion = RunDirectory(path).expansion
    if layers is None and is_run(path) and not expansion.is_file():
        raise InputError(f"--layers is missing; '{path}' has expanded nothing yet that would say which layers")
    if layers is None and not is_run(path):
        raise InputError(f"--layers is missing; say which layers of '{path}' are copied, for example --layers 12,17")
    model = ModelDirectory.resolve("MODEL", str(config_of(path).model if is_run(path) else path))
    selected = Expansion.load(expansion).source_indices if layers is None else layers
    check_layers(selected, model)
    return model.path, selected


def _check_there(path: Path, what: str) -> None:
    if not path.is_dir():
        raise InputError(f"'{path}' does not exist; give {what}")


def check_as_saved(checkpoint: Path) -> CheckpointManifest | None:
    """Every file is what it was when it was written, to the last bit; None: nothing says what it was.

    Raises:
        DamagedError: naming the first that is not.
    """
    if not manifest_of(checkpoint).is_file():
        return None
    try:
        return verify(checkpoint, Ranks())
    except DamagedError as error:
        raise DamagedError(error.reason, CheckpointManifest.remedy()) from None


def convert_to_universal(
    checkpoint: Path, destination: Path, progress: ProgressCallback | None = None, *, overwrite: bool = False
) -> SavedState:
    """As `write_universal`, of a checkpoint that is as it was saved."""
    check_output(destination, "to_universal.py", {"CHECKPOINT": checkpoint}, overwrite=overwrite)
    check_as_saved(checkpoint)
    return write_universal(checkpoint, destination, progress, overwrite=overwrite)


def expand_and_verify(
    model: Path,
    destination: Path,
    selected: list[int],
    progress: ProgressCallback | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Expansion, Verified]:
    """Write `model` with copies of layers to `destination`, and compare what was written, tensor by tensor."""
    expansion = expand_checkpoint(model, destination, selected, progress, overwrite=overwrite)
    return expansion, verify_expansion(model, destination, progress, logits=False)


def model_in(path: Path) -> Path:
    """The adapted model of a run, or `path` itself. Raises `InputError`: it holds none."""
    _check_there(path, "a run directory, or a model with copies of layers")
    run = RunDirectory(path)
    if is_run(path):
        path = next((place for place in (run.export, run.expanded) if (place / "config.json").is_file()), run.export)
    elif not (path / "config.json").is_file() and any(path.glob("**/*_states.pt")):
        raise InputError(f"'{path}' is a checkpoint, no model; make one of it with tools/zero_to_hf.py first")
    check_model_dir("ADAPTED", path)
    return path


@dataclass(frozen=True)
class GivenBack:
    """A base that was taken out of an adapted model."""

    fingerprint: str
    """Of what was written, read again."""
    copies: list[int]
    """Layers that were copied, by their indices in it."""
    proved_by: tuple[str, ...]
    """What knew the base, and found the same."""


def give_base_back(
    adapted: Path,
    destination: Path,
    progress: ProgressCallback | None = None,
    *,
    base: Path | None = None,
    overwrite: bool = False,
) -> GivenBack:
    """Remove the copies of `adapted`: its base, byte for byte, held against every proof that there is.

    Args:
        base: the model that it must be.

    Raises:
        DamagedError: a file of `adapted` is not as it was written.
        InputError: it has no copies, or its base is not the one that was expanded, or not `base`.
    """
    if not (adapted / EXPANSION_NAME).is_file():
        raise InputError(f"'{adapted}' has no {EXPANSION_NAME}, and so no copies to remove; give an expanded model")
    check_output(
        destination, "delta strip", {"ADAPTED": adapted} | ({"--base": base} if base else {}), overwrite=overwrite
    )
    check_as_written(adapted, remedy=Expansion.remedy())
    expansion = Expansion.read(adapted)
    if base is not None:
        check_model_dir("--base", base)
        inside = expansion.base_fingerprint or fingerprint_of(hash_tensors(AdaptedModel.load(adapted).base))
        if fingerprint_of(hash_tensors(stored_tensors(base))) != inside:
            raise InputError(f"--base: '{adapted}' does not stand on '{base}'; give the model that was expanded")
    written = strip_copies(adapted, destination, progress, overwrite=overwrite)
    if fingerprint_of(hash_tensors(stored_tensors(destination))) != written.fingerprint:
        raise DamagedError(
            f"'{destination}' was not written as it was read", "look at its file system, and run it again"
        )
    known = {EXPANSION_NAME: expansion.base_fingerprint is not None, "--base": base is not None}
    return GivenBack(
        written.fingerprint, expansion.source_indices, tuple(what for what, is_known in known.items() if is_known)
    )
