"""`adept diagnose` on real runs that were made to fail: it names what was made wrong, and leaves the run alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.complaints import refused
from harness.expanding import layers_of, load
from harness.launching import adept
from harness.marks import slow
from harness.spoiling import marked_anew
from harness.trained_run import TrainedRun
from safetensors.torch import load_file, save_file

from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.config.loading import load_config
from adept_ds.report.diagnosis import Diagnosis
from adept_ds.run.prerequisites import trained_model
from adept_ds.weights.expansion import Expansion


@dataclass(frozen=True)
class Diagnosed:
    """A run, and what was said of it."""

    run: TrainedRun
    printed: dict[str, Any]

    @property
    def found(self) -> Diagnosis:
        return Diagnosis.load(self.run.files.diagnosis)

    def finding(self, name: str) -> Any:
        return next(finding for finding in self.found.findings if finding.name == name)


def turn_around(run: TrainedRun, layer: int) -> None:
    """One copy of the adapted model writes five times the opposite of what it has learned to write."""
    path = run.files.export / "model.safetensors"
    tensors = load_file(path)
    for name in Expansion.read(run.files.export).silenced:
        if name.startswith(f"model.layers.{layer}."):
            tensors[name] *= -5
    save_file(tensors, path, metadata={"format": "pt"})


def contents(run: TrainedRun) -> dict[str, bytes]:
    """Of a run's files, but for its logs and for what only saves time."""
    besides = {run.files.root / name for name in ("logs", "cache")}
    files = (path for path in run.files.root.rglob("*") if path.is_file() and not besides & {path, *path.parents})
    return {str(path.relative_to(run.files.root)): path.read_bytes() for path in files}


def diagnose(run: TrainedRun, ranks: int = 1, *options: str) -> dict[str, Any]:
    result = adept(ranks, "diagnose", run.config(), *options, "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def copies(trained_run: TrainedRun) -> list[int]:
    return Expansion.read(trained_run.files.export).copy_indices


@pytest.fixture(
    scope="module", params=[slow((1, 3)), (2, 3), slow((2, 1))], ids=lambda value: "{} ranks, ZeRO-{}".format(*value)
)
def harmed(trained_run: TrainedRun, copies: list[int], request: Any, tmp_path_factory: Any) -> Diagnosed:
    """The upper copy was made to do harm."""
    run = trained_run.copied(tmp_path_factory.mktemp("harmed"))
    turn_around(run, copies[1])
    marked_anew(run.files.export)
    ranks, stage = request.param
    deepspeed = run.files.root.parent / "deepspeed.json"
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    return Diagnosed(run, diagnose(run, ranks, f"deepspeed={deepspeed}"))


def sequences(run: TrainedRun, corpus: str) -> Iterator[torch.Tensor]:
    """The held-out ones, as the first evaluated blocks of their tokens; written down without the program's packing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.workspace.model)
    lines = (run.workspace.root / f"{corpus}_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    tokens = torch.tensor([token for text in texts for token in [*text, tokenizer.eos_token_id]])
    return iter(block[None] for block in tokens.split(32)[:7])


def test_the_copy_that_was_harmed_is_the_one_that_is_blamed(harmed: Diagnosed, copies: list[int]) -> None:
    finding = harmed.finding("harmful_copy")
    assert finding.problem
    assert f"The copy at layer {copies[1]} " in finding.saw
    kept = [source for source in harmed.found.setting.copied if source != harmed.found.effects[1].source]
    assert finding.settings == {"expand": {"layers": kept}}
    assert harmed.found.general_rose


@pytest.mark.parametrize("corpus", ["general", "domain"])
def test_losses_are_those_of_plain_forward_passes(harmed: Diagnosed, copies: list[int], corpus: str) -> None:
    """Of Hugging Face's model of the adapted run, with nothing, each copy, or all copies bypassed."""

    def loss(bypassed: list[int]) -> float:
        model, total, count = load(harmed.run.files.export), 0.0, 0
        for layer in bypassed:
            layers_of(model)[layer].forward = lambda hidden, *_, **__: hidden
        for tokens in sequences(harmed.run, corpus):
            with torch.no_grad():
                logits = model(input_ids=tokens, use_cache=False).logits.double()
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))
            count += tokens.shape[1] - 1
        return total / count

    adapted, losses = loss([]), harmed.found.losses[corpus]
    # float32 in another order of sums; losses are about 5 nats
    assert losses.adapted == pytest.approx(adapted, abs=1e-5)
    assert losses.base == pytest.approx(loss(copies), abs=1e-5)
    for effect in harmed.found.effects:
        assert getattr(effect, corpus).change == pytest.approx(adapted - loss([effect.index]), abs=2e-5)


def test_gradients_are_those_of_the_mean_loss_over_the_domain_text(harmed: Diagnosed, copies: list[int]) -> None:
    model, texts = load(harmed.run.files.export), list(sequences(harmed.run, "domain"))
    count = sum(tokens.shape[1] - 1 for tokens in texts)
    for tokens in texts:
        logits = model(input_ids=tokens, use_cache=False).logits
        (torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum") / count).backward()
    found = {unit.unit: unit.rms for unit in harmed.found.gradients}
    assert len(found) == 9 * len(copies)
    for name, rms in found.items():
        grad = model.get_parameter(f"model.{name}.weight").grad
        assert rms == pytest.approx(float(grad.square().mean().sqrt()), rel=1e-4), name
    assert {u.part for u in harmed.found.gradients if u.silent} == {"self_attn.o_proj", "mlp.down_proj"}


def test_what_is_printed_is_what_is_written(harmed: Diagnosed) -> None:
    assert harmed.printed == harmed.found.to_json()
    assert harmed.run.files.diagnosis_page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_nothing_of_the_run_is_touched_and_nothing_is_done_twice(trained_run: TrainedRun, tmp_path: Path) -> None:
    run = trained_run.copied(tmp_path)
    before = contents(run)
    first = adept(1, "diagnose", run.files.root)  # by its directory, although it has moved
    assert first.returncode == 0, first.stderr
    assert "diagnosis.html" in first.stdout
    after = contents(run)
    assert after.keys() - before.keys() == {"diagnosis.json", "diagnosis.html"}
    assert {name: after[name] for name in before} == before
    again = adept(1, "diagnose", run.files.root)
    assert "unchanged, not run again" in again.stdout
    assert contents(run) == after
    fewer = diagnose(run, 1, "--sequences", "4")
    assert fewer["losses"]["general"]["tokens"] == 4 * 31


def test_a_model_that_was_turned_down_by_hand_is_looked_into_as_it_was_trained(
    trained_run: TrainedRun, tmp_path: Path
) -> None:
    run = trained_run.copied(tmp_path)
    config = load_config(run.config())
    assert trained_model(config) == run.files.export
    shutil.copytree(run.files.export, run.files.trained)
    record = Expansion.read(run.files.export)
    record.turned((0.5,) * len(record.copies)).save(run.files.export / EXPANSION_NAME)
    assert trained_model(config) == run.files.trained


def test_a_learning_rate_that_is_too_small_is_recognised(trained_run: TrainedRun, tmp_path: Path) -> None:
    """A real run with next to none: copies stay silent, and the advice is a rate at which they would not."""
    run = TrainedRun(trained_run.workspace, type(trained_run.files)(tmp_path / "run"))
    tiny: dict[str, Any] = {"train": {"lr": 1e-6, "steps": 3, "eval_every": 3}, "expand": {"k": None, "layers": [0, 3]}}
    result = adept(1, "run", run.config(**tiny))
    assert result.returncode == 0, result.stderr
    assert "domain loss did not fall: it changed by " in result.stdout
    assert "to blame: silent projections" in result.stdout, "the run itself asks for the cause"
    diagnosed = Diagnosed(run, {})
    finding = diagnosed.finding("silent_projections")
    assert finding.problem and finding.settings["train.lr"] > 1e-6
    assert finding.change.startswith("The learning rate is too small for the silent projections")
    assert all(writes.on["domain"].copy_share < 1e-3 < writes.on["domain"].below_share
               for writes in diagnosed.found.writes)  # fmt: skip
    assert diagnosed.found.domain_stayed and not diagnosed.found.general_rose
    run.files.diagnosis.unlink()
    result = adept(1, "run", run.config(**tiny, eval={"diagnose": "never"}))
    assert result.returncode == 0, result.stderr
    assert not run.files.diagnosis.exists(), "it is left alone where that is asked for"


REFUSED: dict[str, tuple[str | None, Callable[[TrainedRun], Sequence[object]], str]] = {
    "not trained yet": (
        "unit_movement.jsonl",
        lambda run: [run.config()],
        "unit_movement.jsonl' does not exist; run `adept run CONFIG` first",
    ),
    "not exported yet": (
        "export/expansion.json",
        lambda run: [run.config()],
        "export' holds no adapted model; run `adept export CONFIG` first",
    ),
    "no held-out text": (
        None,
        lambda run: [run.config(data={"general_eval": [], "domain_eval": []})],
        "data.domain_eval: no corpus given",
    ),
    "a directory that is no run": (
        None,
        lambda run: [run.workspace.model],
        "model' has no config.yaml; give the directory of a run, or its CONFIG",
    ),
    "nothing there": (None, lambda run: [run.files.root / "nowhere"], "nowhere: no such"),
    "no sequences": (
        None,
        lambda run: [run.config(), "--sequences", "0"],
        "--sequences: 0 leaves nothing to look at; give 1 or more",
    ),
    "a damaged log": (
        None,
        lambda run: [damaged(run.files.unit_movement) and run.config()],
        "unit_movement.jsonl' line 1 is damaged",
    ),
}
"""What is missing, what is asked for, and the complaint."""


def damaged(log: Path) -> bool:
    """With a line that is none, and others behind it."""
    log.write_bytes(b"{}\n" + log.read_bytes())
    return True


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_run_that_cannot_be_looked_into_is_refused_in_one_line(
    trained_run: TrainedRun, tmp_path: Path, mistake: str
) -> None:
    run = trained_run.copied(tmp_path)
    missing, arguments_for, words = REFUSED[mistake]
    if missing:
        (run.files.root / missing).unlink()
    arguments = arguments_for(run)
    before = contents(run)
    refused(["diagnose", *arguments], [words])
    assert contents(run) == before


def test_a_method_without_copies_has_its_units_looked_at(trained_run: TrainedRun, tmp_path: Path) -> None:
    run = TrainedRun(trained_run.workspace, type(trained_run.files)(tmp_path / "run"))
    tree = run.workspace.tree(run.files.root, method="full", train={"steps": 2, "lr": 1e-3, "eval_every": 2})
    for section in ("expand", "importance"):
        tree.pop(section)
    config = tmp_path / "full.yaml"
    config.write_text(json.dumps(tree), encoding="utf-8")
    assert adept(1, "run", config).returncode == 0
    result = adept(1, "diagnose", config)
    assert result.returncode == 0, result.stderr
    assert "method full makes no copies: only how its units moved is looked at" in result.stdout
    assert Diagnosis.load(run.files.diagnosis).units
