"""Which checkpoints there are, and which fit a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.run_dir import checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.checkpoint import CheckpointManifest, check_resumable, save_checkpoint

MANIFEST = CheckpointManifest(
    step=20, world_size=2, zero_stage=3, fingerprint="f", settings={"train.lr": 0.1, "train.steps": 50}
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
    assert CheckpointManifest.load(manifest_of(tmp_path / checkpoint_tag(20))) == MANIFEST
    check_resumable(tmp_path, MANIFEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"world_size": 4}, ["2 ranks", "has 4"], id="ranks"),
        pytest.param({"zero_stage": 1}, ["ZeRO stage 3", "deepspeed"], id="stage"),
        pytest.param({"fingerprint": "g"}, ["another expanded checkpoint"], id="expansion"),
        pytest.param({"settings": {"train.lr": 0.2, "train.steps": 50}}, ["train.lr", "0.1", "0.2"], id="setting"),
        pytest.param({"settings": {"train.steps": 50}}, ["train.lr", "0.1"], id="setting gone"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_a_remedy(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    make_checkpoint(tmp_path, 20)
    with pytest.raises(InputError, match="run_dir") as caught:
        check_resumable(tmp_path, MANIFEST.model_copy(update=change))
    for word in [*words, "step_20"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


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
