"""What a run is trained on: several sources, whole documents, streamed; the same on every number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.workspace import Workspace, write_corpus

RANKS = (1, 2)


def sections(workspace: Workspace, **data: Any) -> dict[str, Any]:
    """Two domain sources, 2 to 1, and whole documents; less of everything else."""
    domain = [
        {"files": [str(workspace.root / "domain.jsonl")], "weight": 2, "name": "first"},
        {"files": [str(workspace.root / "second" / "part-*")], "name": "second"},
    ]
    return {
        "data": {"domain": domain, "packing": "documents"} | data,
        "train": {"steps": 5, "global_batch_size": 6, "micro_batch_size": 3, "checkpoint_every": 2, "eval_every": 9},
        "importance": {"every": 3},
    }


@pytest.fixture(scope="module")
def two_sources(workspace: Workspace) -> Workspace:
    """The second in two parts without a suffix."""
    folder = workspace.root / "second"
    folder.mkdir(exist_ok=True)
    for part in range(2):
        write_corpus(folder / f"part-{part:05d}", seed=20 + part, documents=20)
    return workspace


@pytest.fixture(scope="module", params=[slow(False), True], ids=["cached", "streamed"])
def runs(
    request: pytest.FixtureRequest, two_sources: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Finished]:
    root, found = tmp_path_factory.mktemp("runs"), {}
    for ranks in RANKS:
        config = two_sources.config(root / f"run{ranks}", **sections(two_sources, streaming=request.param))
        result = adept(ranks, "run", config)
        assert result.returncode == 0, result.stderr
        found[ranks] = Finished(root / f"run{ranks}")
    return found


def test_losses_do_not_depend_on_the_number_of_ranks(runs: dict[int, Finished]) -> None:
    """1e-5, as for one source: fp32, sums in another order."""
    assert runs[1].losses() == pytest.approx(runs[2].losses(), abs=1e-5)
    tokens = [[record["tokens"] for record in runs[ranks].steps()] for ranks in RANKS]
    assert tokens[0] == tokens[1]
    assert all(later - earlier < 6 * 32 for earlier, later in zip(tokens[0], tokens[0][1:], strict=False)), "no padding"


@pytest.mark.parametrize("cache", [slow("kept"), "lost"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    two_sources: Workspace, runs: dict[int, Finished], tmp_path: Path, cache: str
) -> None:
    whole, cut = runs[2], Finished(tmp_path / "cut")
    lost = ["step_4", "step_5", "export", "*.html", "summary.json", *(["cache"] if cache == "lost" else [])]
    shutil.copytree(whole.directory, cut.directory, ignore=shutil.ignore_patterns(*lost))
    (cut.directory / "checkpoints" / "latest").write_text("step_2")
    streaming = bool(list((whole.directory / "cache" / "tokens").glob("stream_*")))
    result = adept(2, "run", two_sources.config(cut.directory, **sections(two_sources, streaming=streaming)))
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stdout
    assert cut.losses() == whole.losses()
    assert [record["tokens"] for record in cut.steps()] == [record["tokens"] for record in whole.steps()]
    expected = whole.weights()
    for name, tensor in cut.weights().items():
        assert torch.equal(tensor, expected[name]), name
