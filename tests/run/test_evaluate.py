"""What is evaluated is a number, or a complaint that says why it is none; nothing that is none is written."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.complaints import assert_one_line, files_under
from harness.launching import adept
from harness.spoiling import changed_json
from harness.trained_run import TrainedRun
from harness.workspace import Workspace
from safetensors.torch import load_file, save_file

TENSOR, LAST_NORM = "model.layers.2.mlp.down_proj.weight", "model.norm.weight"


def with_weight(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return spoil


def one_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = math.nan
    return tensor


def one_infinity(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = -math.inf
    return tensor


SPOILED = {
    "NaN": (with_weight(TENSOR, one_nan), ["holds NaN or infinity", TENSOR, "give a model whose weights are finite"]),
    "infinity": (with_weight(TENSOR, one_infinity), ["holds NaN or infinity", TENSOR, "give a model"]),
    "overflow": (with_weight(LAST_NORM, lambda tensor: tensor * 1e38), ["although all weights", "train.precision"]),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_no_number_is_refused_by_corpus_and_tensor_and_nothing_is_written(
    trained_run: TrainedRun, tmp_path: Path, kind: str, ranks: int
) -> None:
    copy = trained_run.copied(tmp_path)
    spoil, words = SPOILED[kind]
    spoil(copy.files.export)
    copy.files.evaluation.unlink()
    ledger = copy.files.ledger.read_bytes()
    result = adept(ranks, "eval", copy.config(), "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, ["data.general_eval: the held-out loss is ", str(copy.files.export), *words])
    assert not copy.files.evaluation.exists()
    assert copy.files.ledger.read_bytes() == ledger


def test_the_same_for_a_plain_model(trained_run: TrainedRun, tmp_path: Path) -> None:
    model, text = tmp_path / "model", trained_run.workspace.root / "domain_heldout.jsonl"
    shutil.copytree(trained_run.workspace.model, model)
    SPOILED["NaN"][0](model)
    before = files_under(tmp_path)
    result = adept(1, "eval", model, "--text", text, "--seq-len", "32")
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, ["the held-out loss is nan", TENSOR])
    assert files_under(tmp_path) == before


def test_a_text_of_one_token_has_a_loss_with_the_end_of_text_behind_it(trained_run: TrainedRun, tmp_path: Path) -> None:
    losses = evaluated_text(trained_run.workspace.model, tmp_path, ["x"])
    assert losses.returncode == 0, losses.stderr
    assert json.loads(losses.stdout)["model"]["text"]["tokens"] == 1


@pytest.mark.parametrize(
    ("packing", "texts"), [("concat", ["x"]), ("documents", ["x"]), ("documents", ["x", "y", "z"])], ids=str
)
def test_texts_in_which_nothing_is_predicted_are_refused(
    trained_run: TrainedRun, tmp_path: Path, packing: str, texts: list[str]
) -> None:
    """Without an end of text, a single token has nothing before it, and a document of its own nothing either."""
    model = tmp_path / "model"
    shutil.copytree(trained_run.workspace.model, model)
    for name in ("tokenizer_config.json", "config.json"):
        changed_json(model / name, lambda file: {key: value for key, value in file.items() if "eos" not in key})
    config = Workspace(trained_run.workspace.root).config(
        tmp_path / "run",
        model=str(model),
        data={"general_eval": [], "domain_eval": [str(write_texts(tmp_path, texts))], "packing": packing},
    )
    shutil.copytree(model, tmp_path / "run" / "export")
    result = adept(1, "eval", config)
    assert result.returncode == 2
    assert_one_line(result.stderr, ["data.domain_eval: ", "add text"])


def write_texts(folder: Path, texts: list[str]) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def evaluated_text(model: Path, folder: Path, texts: list[str]) -> subprocess.CompletedProcess[str]:
    return adept(1, "eval", model, "--text", write_texts(folder, texts), "--seq-len", "32", "--json")


def test_evaluation_is_not_done_again_and_needs_no_tokens_for_that(trained_run: TrainedRun, tmp_path: Path) -> None:
    copy = trained_run.copied(tmp_path)
    shutil.rmtree(copy.files.tokens)
    result = adept(1, "eval", copy.config())
    assert result.returncode == 0, result.stderr
    assert "not run again" in result.stdout
    assert not copy.files.tokens.exists()
