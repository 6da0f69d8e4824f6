"""What is evaluated is a number, or a complaint that says why it is none; nothing that is none is written."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.complaints import assert_one_line, files_under
from harness.launching import adept
from harness.marks import slow
from harness.packing import write_records
from harness.plain_evaluation import chosen, document_sums
from harness.questions import made_up_questions
from harness.spoiling import changed_json, marked_anew
from harness.trained_run import TrainedRun
from harness.workspace import Workspace
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from adept_ds.base.run_dir import RunDirectory
from adept_ds.data.pieces import document_id

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


@pytest.mark.parametrize(
    ("kind", "ranks"), [*((kind, 1) for kind in SPOILED), ("NaN", 2), slow("infinity", 2), slow("overflow", 2)]
)
def test_a_loss_that_is_no_number_is_refused_by_corpus_and_tensor_and_nothing_is_written(
    trained_run: TrainedRun, tmp_path: Path, kind: str, ranks: int
) -> None:
    copy = trained_run.copied(tmp_path)
    spoil, words = SPOILED[kind]
    spoil(copy.files.export)
    marked_anew(copy.files.export)
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


# --- documents, the dial, and what is kept ---------------------------------------------------------------------------


def held_out_texts(run: TrainedRun, corpus: str, count: int) -> list[str]:
    lines = (run.workspace.root / f"{corpus}_heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:count]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_of_every_document_is_kept_of_every_model(trained_run: TrainedRun, tmp_path: Path, ranks: int) -> None:
    """One rank, or two under ZeRO-3: sums over documents of some 50 tokens, to the rounding of a forward pass."""
    copy = trained_run.copied(tmp_path)
    result = adept(ranks, "eval", copy.config(eval={"dial": [0.25, 0.5]}), "--json")
    assert result.returncode == 0, result.stderr
    kept, found = load_arrays(copy.files.document_losses), json.loads(result.stdout)
    models = {"base": found["base"], "adapted": found["adapted"]}
    models |= {f"alpha={position['alpha']:g}": position["corpora"] for position in found["dial"]}
    assert list(models) == ["base", "adapted", "alpha=0.25", "alpha=0.5"]
    sources = ("general/general_heldout", "domain/domain_heldout")
    kinds = ("ids", "tokens", *(f"loss/{model}" for model in models))
    assert kept.keys() == {f"{kind}/{source}" for kind in kinds for source in sources}
    for source in sources:
        corpus, ids, tokens = source.split("/")[0], kept[f"ids/{source}"], kept[f"tokens/{source}"]
        texts = held_out_texts(copy, corpus, len(ids))
        assert ids.tolist() == [document_id(text) for text in texts]
        assert tokens.tolist() == [len(text) + 1 - -(-(len(text) + 1) // 32) for text in texts]
        for model, directory in (("base", copy.workspace.model), ("adapted", copy.files.export)):
            wanted = document_sums(directory, copy.workspace.model, texts, 32)
            assert kept[f"loss/{model}/{source}"].tolist() == pytest.approx(wanted, rel=2e-6)
        for model, corpora in models.items():
            loss = kept[f"loss/{model}/{source}"].sum() / tokens.sum()
            facts = {"loss": pytest.approx(loss, rel=1e-12), "tokens": tokens.sum(), "documents": len(ids)}
            assert corpora[corpus] == facts | {"sources": {source.split("/")[1]: facts}}
    ends = [models[name]["domain"]["loss"] for name in ("base", "alpha=0.25", "alpha=0.5", "adapted")]
    assert ends == sorted(ends, reverse=True), "a few steps from the base, the loss falls all the way"


def test_the_evaluation_of_the_base_is_good_for_another_run_that_has_its_files_and_its_record(
    trained_run: TrainedRun, tmp_path: Path
) -> None:
    """Which did something else with the same base: another model, evaluated on the same texts."""
    first = trained_run.copied(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(first.files.export, other / "export")
    with_weight(TENSOR, lambda tensor: tensor * 0.5)(other / "export")
    marked_anew(other / "export")
    for path in (first.files.base_evaluation, first.files.base_document_losses):
        shutil.copy2(path, other)
    record = json.loads(first.files.ledger.read_text())
    (other / "stages.json").write_text(json.dumps({"eval_base": record["eval_base"]}))
    stamps = [path.stat().st_mtime_ns for path in sorted(other.glob("*_base.*"))]
    result = adept(1, "eval", TrainedRun(first.workspace, RunDirectory(other)).config(), "--json")
    assert result.returncode == 0, result.stderr
    assert [path.stat().st_mtime_ns for path in sorted(other.glob("*_base.*"))] == stamps
    found, before = json.loads(result.stdout), json.loads(first.files.evaluation.read_text())
    assert found["base"] == before["base"]
    assert found["adapted"]["domain"]["loss"] != before["adapted"]["domain"]["loss"]
    kept, kept_before = load_arrays(other / "document_losses.safetensors"), load_arrays(first.files.document_losses)
    for name in kept_before:
        assert np.array_equal(kept[name], kept_before[name]) != name.startswith("loss/adapted/"), name


def test_losses_of_documents_that_are_lost_are_found_again(trained_run: TrainedRun, tmp_path: Path) -> None:
    copy = trained_run.copied(tmp_path)
    before = load_arrays(copy.files.document_losses)
    for path in (copy.files.document_losses, copy.files.base_document_losses):
        path.unlink()
    result = adept(1, "eval", copy.config())
    assert result.returncode == 0, result.stderr
    found = load_arrays(copy.files.document_losses)
    assert all(np.array_equal(found[name], of) for name, of in before.items()) and found.keys() == before.keys()


def test_damaged_losses_of_documents_are_named_and_found_again(trained_run: TrainedRun, tmp_path: Path) -> None:
    copy = trained_run.copied(tmp_path)
    before = copy.files.base_document_losses.read_bytes()
    copy.files.base_document_losses.write_bytes(b"damaged")
    copy.files.evaluation.unlink()
    result = adept(1, "eval", copy.config())
    assert result.returncode == 0, result.stderr
    assert f"{copy.files.base_document_losses}' is not as it was written" in result.stdout
    assert copy.files.base_document_losses.read_bytes() == before


def test_tasks_are_scored_beside_the_evaluation_and_once(trained_run: TrainedRun, tmp_path: Path) -> None:
    """By base and adapted model, and on the way between them; with the accuracies of plain PyTorch."""
    copy, questions = trained_run.copied(tmp_path), made_up_questions(20)
    write_records(tmp_path / "tasks" / "made_up.jsonl", *questions)
    evaluation = copy.files.evaluation.read_bytes()
    arguments = ("eval", copy.config(eval={"dial": [0.5]}), "--tasks", tmp_path / "tasks")
    result = adept(1, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["tasks"]
    assert found.keys() == {"base", "adapted", "alpha=0.5"}
    for model, directory in (("base", copy.workspace.model), ("adapted", copy.files.export)):
        answers = chosen(directory, copy.workspace.model, questions)
        for name, of in zip(("accuracy", "accuracy_norm"), zip(*answers, strict=True), strict=True):
            right = sum(answer == question["answer"] for answer, question in zip(of, questions, strict=True))
            assert round(found[model]["made_up.jsonl"][name] * 20) == right
    assert json.loads(copy.files.task_scores.read_text())["models"] == found
    again = adept(1, *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("not run again") == 2, "neither losses nor tasks"
    assert adept(1, "eval", copy.config()).returncode == 0
    assert json.loads(copy.files.evaluation.read_text()) == json.loads(evaluation), "tasks are no part of it"


def test_two_held_out_sources_of_one_name_are_refused(trained_run: TrainedRun, tmp_path: Path) -> None:
    text = write_texts(tmp_path, ["x"])
    sources = [{"files": [str(text)], "name": "one"}, {"files": [str(text)], "name": "one"}]
    config = Workspace(trained_run.workspace.root).config(tmp_path / "run", data={"general_eval": sources})
    result = adept(1, "eval", config)
    assert result.returncode == 2
    assert_one_line(result.stderr, ["data: general_eval: two sources are named 'one'", "give each a name of its own"])
