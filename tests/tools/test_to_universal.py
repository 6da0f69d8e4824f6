"""Universal checkpoints: plain DeepSpeed loads them at other stages, on other numbers of ranks, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import launch
from harness.marks import slow
from harness.models import save_tiny_model
from harness.plain_worker import STEPS
from harness.tool_runs import run_tool
from harness.trained_run import train_two_steps
from harness.workspace import Workspace

AT_EVERY_COMMIT = [(3, "some-zero3=some-zero1"), (3, "some-zero2=some-zero3"), (3, "all-zero2=all-zero3")]
SLOW = [
    (3, "some-groups3=some-zero2"),
    *((1, cell) for cell in ("some-zero1=some-groups3", "some-zero3=some-zero3", "some-zero2=some-zero1")),
    *((1, cell) for cell in ("all-groups3=all-zero3", "some-zero3=some-zero2-full")),
]
"""Numbers of ranks, and the engine that loads = who saved, which were two ranks."""


class Outcomes:
    """What those that saved had, and what those that loaded have, found when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._saved, self._loaded = folder, dict[str, Any](), dict[tuple[int, str], Any]()

    def saved(self, source: str) -> Any:
        return self._saved[source]

    def loaded(self, ranks: int, cell: str) -> Any:
        if (ranks, cell) not in self._loaded:
            self._find(AT_EVERY_COMMIT if (ranks, cell) in AT_EVERY_COMMIT else SLOW)
        return self._loaded[ranks, cell]

    def _find(self, loads: list[tuple[int, str]]) -> None:
        sources = sorted({cell.partition("=")[2] for _, cell in loads} - self._saved.keys())
        result = launch(2, ["-m", "harness.plain_worker", str(self.folder), "train", *sources])
        assert result.returncode == 0, result.stderr[-4000:]
        self._saved |= torch.load(self.folder / "train_2.pt", weights_only=False)
        for source in sources:
            result = run_tool("tools/to_universal.py", self.folder / source, self.folder / f"universal-{source}")
            assert result.returncode == 0, result.stderr
        for ranks in {ranks for ranks, _ in loads}:
            cells = [cell for size, cell in loads if size == ranks]
            arguments = [cell.replace("=", "=universal-") for cell in cells]
            result = launch(ranks, ["-m", "harness.plain_worker", str(self.folder), "load", *arguments])
            assert result.returncode == 0, result.stderr[-4000:]
            of_ranks = torch.load(self.folder / f"load_{ranks}.pt", weights_only=False)
            self._loaded |= {(ranks, cell): of_ranks[given] for cell, given in zip(cells, arguments, strict=True)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("universal")
    save_tiny_model(folder / "model")
    return Outcomes(folder)


@pytest.fixture
def folder(outcomes: Outcomes) -> Path:
    """With what was saved and converted for the cells of every commit."""
    assert outcomes.loaded(*AT_EVERY_COMMIT[0])
    return outcomes.folder


@pytest.mark.parametrize(("ranks", "cell"), [*AT_EVERY_COMMIT, *(slow(*case) for case in SLOW)])
def test_plain_deepspeed_has_what_was_saved_to_the_last_bit(outcomes: Outcomes, ranks: int, cell: str) -> None:
    """Masters, moments, steps and settings; and the whole model as the next forward pass sees it."""
    found, saved = outcomes.loaded(ranks, cell), outcomes.saved(cell.partition("=")[2])
    for what in ("weights", "vectors"):
        assert found[what].keys() == saved[what].keys()
        for name, value in saved[what].items():
            assert torch.equal(found[what][name], value), name
    assert found["steps"] == saved["steps"] == {STEPS}
    assert found["groups"][0] == saved["groups"][0]
    assert (found["counted"], found["mine"]) == (STEPS, 7)


def test_what_is_compared_is_not_all_alike(outcomes: Outcomes) -> None:
    assert outcomes.loaded(*AT_EVERY_COMMIT[0])
    vectors = outcomes.saved("some-zero3")["vectors"]
    assert len(vectors) == 3 * 18
    assert all(bool(vector.any()) for vector in vectors.values())
    assert any(vector.numel() % 3 for vector in vectors.values())


def test_a_runs_checkpoint_becomes_one(workspace: Workspace, tmp_path: Path) -> None:
    """Its copies train; what is written is what the run exports, with the moments of its optimizer."""
    run = train_two_steps(workspace, tmp_path / "run")
    result = run_tool("tools/to_universal.py", run.root, tmp_path / "universal")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("18 tensors with their moments, written by 2 ranks under ZeRO-3, in ")
    assert (tmp_path / "universal" / "latest_universal").read_text() == "step_2"
    from adept_ds.weights.hf_directory import stored_tensors

    root = tmp_path / "universal" / "step_2" / "zero"
    exported = stored_tensors(run.export)
    names = {folder.name for folder in root.iterdir() if folder.is_dir()}
    assert len(names) == 18
    for name in names:
        states = {file.stem: torch.load(file) for file in (root / name).iterdir()}
        assert states.keys() == {"fp32", "exp_avg", "exp_avg_sq", "step"}
        assert b"".join(exported[name].chunks()) == states["fp32"]["param"].numpy().tobytes()
        assert float(states["step"]) == 2
        assert states["exp_avg"]["param"].shape == exported[name].shape


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["{folder}/universal-some-zero1/step_2", "new"],
            "is a universal checkpoint ('zero'); give the one that",
        ),
        (["{folder}/model", "new"], "holds no DeepSpeed checkpoint"),
        (["{folder}/some-zero1", "{folder}/model"], "'{folder}/model' holds something that adept did not write"),
        (["{folder}/some-zero1", "{folder}/some-zero1/step_2/new"], "lies in CHECKPOINT"),
        (["{folder}/some-zero1", "{folder}/universal-some-zero1"], "was written by `python tools/to_universal.py` be"),
    ],
)
def test_mistakes_are_one_line_and_replace_nothing(folder: Path, arguments: list[str], words: str) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    result = run_tool("tools/to_universal.py", *(argument.format(folder=folder) for argument in arguments))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert words.format(folder=folder) in result.stderr
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_without_moments_there_is_no_universal_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Of an optimizer that is not Adam: DeepSpeed would not load it at stage 3."""
    import shutil

    shutil.copytree(folder / "some-zero1", tmp_path / "sgd")
    for file in (tmp_path / "sgd" / "step_2").glob("*optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        saved["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}
        torch.save(saved, file)
    result = run_tool("tools/to_universal.py", tmp_path / "sgd", tmp_path / "new")
    assert result.returncode == 2
    assert "has no exp_avg of 'model.layers.1." in result.stderr
    assert not (tmp_path / "new").exists()
