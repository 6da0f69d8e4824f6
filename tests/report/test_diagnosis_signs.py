"""Whether a failure shows is told from the files of a run, at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness.launching import ROOT
from harness.made_up_run import write_evaluation
from safetensors.numpy import save_file

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.report.diagnosis_signs import evaluated_losses, paired_error, signatures


def names(run_dir: Path) -> list[str]:
    return [signature.name for signature in signatures(run_dir)]


def write_documents(run_dir: Path, noise: float, rise: float) -> None:
    """200 general documents, of which each has its own change."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 200, 200)
    base = tokens * generator.normal(2.2, 0.3, 200)
    changes = generator.normal(0, noise, 200)
    adapted = base + tokens * (changes - np.average(changes, weights=tokens) + rise)
    name = "general/validation/questions"
    save_file(
        {f"ids/{name}": np.arange(200), f"tokens/{name}": tokens, f"loss/base/{name}": base,
         f"loss/adapted/{name}": adapted, f"loss/alpha=0.5/{name}": base},
        run_dir / "document_losses.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("general", "domain", "found"),
    [
        (2.21, 1.61, []),
        (2.24, 1.61, ["general_rose"]),
        (2.20, 1.92, ["domain_stayed"]),
        (2.20, 1.99, ["domain_stayed"]),
        (2.40, 1.918, ["general_rose", "domain_stayed"]),
        (1.90, 1.91, []),
    ],
)
def test_a_failure_is_a_change_that_is_more_than_practically_none(
    tmp_path: Path, general: float, domain: float, found: list[str]
) -> None:
    """The base has 2.20 and 1.92."""
    write_evaluation(tmp_path, general, domain)
    assert names(tmp_path) == found


def test_a_rise_within_the_noise_of_its_documents_is_none(tmp_path: Path) -> None:
    write_evaluation(tmp_path, general=2.24)
    for noise, found in ((0.05, ["general_rose"]), (1.0, [])):
        write_documents(tmp_path, noise, rise=0.04)
        assert names(tmp_path) == found
    rise = evaluated_losses(RunDirectory(tmp_path))["general"].rise
    assert rise.standard_error is not None and 0.04 < 2 * rise.standard_error < 0.5


def test_losses_of_documents_that_cannot_be_read_cost_nothing_but_the_noise(tmp_path: Path) -> None:
    write_evaluation(tmp_path, general=2.24)
    (tmp_path / "document_losses.safetensors").write_bytes(b"no tensors")
    assert names(tmp_path) == ["general_rose"]
    assert evaluated_losses(RunDirectory(tmp_path))["general"].rise.standard_error is None


def test_a_run_that_was_not_evaluated_shows_nothing(tmp_path: Path) -> None:
    assert signatures(tmp_path) == []


def test_a_damaged_evaluation_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"base": {"general": {"loss": "high"}}}))
    with pytest.raises(InputError, match="is damaged"):
        signatures(tmp_path)


def test_the_error_of_a_mean_over_tokens_is_that_of_the_bootstrap() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 300, 400).astype(float)
    differences = tokens * generator.normal(0.05, 0.2, 400)
    draws = generator.integers(400, size=(4000, 400))
    resampled = differences[draws].sum(1) / tokens[draws].sum(1)
    # 4,000 draws have a standard deviation to 1.1%; linearising costs about 1 / 400.
    assert paired_error(differences, tokens) == pytest.approx(resampled.std(), rel=0.04)


def test_one_text_has_no_error() -> None:
    assert paired_error(np.array([3.0]), np.array([10.0])) is None
    assert paired_error(np.array([3.0, 0.0]), np.array([10.0, 0.0])) is None


def test_it_takes_no_torch(tmp_path: Path) -> None:
    write_evaluation(tmp_path, general=2.40)
    program = (
        "import sys; from pathlib import Path; from adept_ds.report.diagnosis_signs import signatures; "
        "found = signatures(Path(sys.argv[1])); "
        "print(len(found), sorted({'torch', 'deepspeed', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.stdout == "1 []\n", result.stdout + result.stderr
