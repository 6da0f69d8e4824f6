"""Every file of a run that is not finished, cut short, changed in a bit, emptied or taken away.

The same command ends as if nothing had happened, from the checkpoint before if the last is damaged; or it says in one
line what is wrong, and touches nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from harness.faults import CHECKPOINT_EVERY, STEPS, Fault, Run, Undisturbed, assert_same, mostly_slow
from harness.launching import adept
from harness.spoiling import flip_bit
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def changed(file: Path) -> None:
    size = file.stat().st_size
    flip_bit(file, size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": cut_short,
    "changed in a bit": changed,
    "emptied": emptied,
    "taken away": Path.unlink,
}

FILES = [
    "cache/digests.json",
    "cache/tokens/*/ends.bin",
    "cache/tokens/*/ids.bin",
    "cache/tokens/*/manifest.json",
    "cache/tokens/*/tokens.bin",
    "checkpoints/latest",
    "checkpoints/step_4/*model_states.pt",
    "checkpoints/step_4/*optim_states.pt",
    "checkpoints/step_4/manifest.json",
    "checkpoints/step_4/random_state_rank_*.safetensors",
    "checkpoints/step_4/unit_names.json",
    "checkpoints/zero_to_fp32.py",
    "checkpoints/zero_to_torch.py",
    "config.yaml",
    "document_losses_base.safetensors",
    "evaluation_base.json",
    "expanded/.adept_output.json",
    "expanded/base_files.json",
    "expanded/config.json",
    "expanded/expansion.json",
    "expanded/generation_config.json",
    "expanded/model.safetensors",
    "expanded/tokenizer.json",
    "expanded/tokenizer_config.json",
    "layer_importance.json",
    "layer_scores.safetensors",
    "metrics.jsonl",
    "stages.json",
    "summary.json",
    "tensorboard/*",
    "unit_importance.jsonl",
    "unit_movement.jsonl",
]

LOGS = {
    "metrics.jsonl": ("steps", "evaluations"),
    "unit_importance.jsonl": ("multipliers",),
    "unit_movement.jsonl": ("movement",),
}
"""What cannot be made again, and training does not need: that lines are lost is said."""


@pytest.mark.slow
def test_no_kind_of_file_is_left_out(on_one_rank: Undisturbed) -> None:
    root = cut(on_one_rank.run, on_one_rank.run.root.with_name("cut")).root
    shutil.rmtree(root / "checkpoints" / "step_2")  # holds what step_4 does
    known = {pattern: set(root.glob(pattern)) for pattern in FILES}
    assert all(known.values()), known
    assert files_of(root) == set().union(*known.values())


@pytest.mark.parametrize("case", mostly_slow([(file, damage) for file in FILES for damage in DAMAGES], 0), ids=" ".join)
def test_a_damaged_file_is_made_again_or_named(
    case: tuple[str, str], tmp_path: Path, on_one_rank: Undisturbed, fault: Fault
) -> None:
    pattern, damage = case
    run = cut(on_one_rank.run, tmp_path / "run")
    config = run.config()
    file = max(run.root.glob(pattern), key=lambda path: path.stat().st_size)
    DAMAGES[damage](file)
    fault.injected(f"a file is {damage}")
    before = contents(run.root)
    result = adept(1, "run", config)
    if result.returncode:
        assert result.returncode == 2, result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("adept: ") and str(file) in line, line
        assert contents(run.root) == before
        shutil.copy(on_one_rank.run.root / file.relative_to(run.root), file)
        assert adept(1, "run", config).returncode == 0
    lost = LOGS.get(pattern, ()) if f"{file}' has lost lines of step" in result.stdout else ()
    assert_same(run.results(), {key: value for key, value in on_one_rank.results.items() if key not in lost})
    came_back = max([4 if "resuming after step 4" in result.stdout else 2, 4 * (result.returncode != 0)])
    assert STEPS - came_back <= 2 * CHECKPOINT_EVERY
    fault.recovered(4 - came_back)


def cut(run: Run, root: Path) -> Run:
    """A copy as it was left after step 4, when step 5 was trained."""
    shutil.copytree(run.root, root, copy_function=shutil.copy)
    files = RunDirectory(root)
    shutil.rmtree(files.checkpoints / f"step_{STEPS}")
    for folder in (files.export, files.trained):
        shutil.rmtree(folder)
    for file in (files.dial, files.dial_losses, files.evaluation, files.document_losses, files.report):
        file.unlink(missing_ok=True)
    return Run(Workspace(run.workspace.root), root, run.ranks)


def files_of(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file() and "logs" not in path.relative_to(root).parts}


def contents(root: Path) -> dict[Path, str]:
    return {path: sha256(path.read_bytes()).hexdigest() for path in files_of(root) if path.name != "digests.json"}
