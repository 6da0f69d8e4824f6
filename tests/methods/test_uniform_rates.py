"""Methods in which all that trains learns at one rate: each is what plain PyTorch does with the same rows.

`adept run` is started on 1 and 2 real ranks under ZeRO-1, 2 and 3; the oracle repeats it in one process.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.packing import pack, rows_of_step
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag
from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config

IN_PLACE = ("full", "replay", "freeze")


def everything(_: str) -> bool:
    return True


@dataclass(frozen=True)
class Case:
    """A run, and which parameters of the model that it starts from train in it."""

    method: str
    stage: int
    world_size: int
    trains: Callable[[str], bool]
    sections: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method}-zero{self.stage}-{self.world_size}"


CASES = [
    Case("full", 3, 2, everything, {}),
    slow(Case("full", 2, 1, everything, {})),
    slow(Case("full", 1, 2, everything, {})),
    slow(Case("replay", 3, 1, everything, {})),
    slow(Case("replay", 2, 2, everything, {})),
    slow(
        Case("freeze", 3, 2, lambda name: name.startswith(("model.layers.1.", "model.layers.3.")), {"layers": [1, 3]})
    ),
    slow(Case("freeze", 1, 1, lambda name: name.startswith("model.layers.4."), {"choose": "last", "k": 1})),
    slow(Case("llama_pro", 2, 2, lambda name: name.startswith(("model.layers.2.", "model.layers.6.")), {"k": 2})),
]


def configured(case: Case, workspace: Workspace, folder: Path) -> Path:
    tree = workspace.tree(
        folder / case.name, method=case.method, train={"steps": 3, "checkpoint_every": 2, "eval_every": 0}
    )
    tree["checkpoint"] = {"background": case.world_size > 1}
    tree["deepspeed"] = str(folder / f"{case.name}.json")
    Path(tree["deepspeed"]).write_text(json.dumps({"zero_optimization": {"stage": case.stage}}))
    del tree["importance"], tree["expand"]
    if case.method == "replay":
        tree["data"] |= {"replay": [str(workspace.root / "general.jsonl")], "replay_share": 1 / 3}
    if case.sections:
        tree["expand"] = case.sections
    path = folder / f"{case.name}.yaml"
    path.write_text(json.dumps(tree))  # which is YAML too
    return path


@dataclass(frozen=True)
class Outcome:
    case: Case
    config_file: Path
    run: Finished
    start: Path
    plain: oracle.Training


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def outcome(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("methods")
    file = configured(case, workspace, folder)
    result = adept(case.world_size, "run", file)
    assert result.returncode == 0, result.stderr
    run = folder / case.name
    start = workspace.model if case.method in IN_PLACE else run / "expanded"
    return Outcome(case, file, Finished(run), start, _plain(case, load_config(file), Finished(run), start, workspace))


def _plain(case: Case, config: Config, run: Finished, start: Path, workspace: Workspace) -> oracle.Training:
    model, train, cache = oracle.load(start), config.train, run.directory / "oracle"
    files = [[path for path in corpus if isinstance(path, Path)] for corpus in (config.data.domain, config.data.replay)]
    domain, replay = (
        pack(corpus, workspace.model, cache, seq_len=config.data.seq_len) if corpus else None for corpus in files
    )
    assert domain is not None

    def batch(step: int) -> oracle.Batch:
        parts = [rows_of_step(domain, step, train.global_batch_size - config.replayed, train.seed)]
        if replay is not None:
            parts.insert(0, rows_of_step(replay, step, config.replayed, train.seed))
        ids, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return ids, labels

    names = [name for name, _ in model.named_parameters() if case.trains(name)]
    rates = [record["lr"] for record in run.steps()]
    return oracle.train_alike(model, names, [batch(step) for step in range(train.steps)], rates, dict(train))


def test_it_is_plain_adamw_on_what_the_method_trains(outcome: Outcome) -> None:
    """Losses of three steps to 1e-5, exported weights to 5e-5; the rest keeps every bit.

    AdamW's first steps are of the size of the learning rate, 1e-2, whatever the gradient's: where that is near zero,
    its rounding counts. A wrong row, token or rate moves weights by more than 1e-3.
    """
    assert outcome.run.losses() == pytest.approx(outcome.plain.losses, abs=1e-5)
    before, after = load_file(outcome.start / "model.safetensors"), outcome.run.weights()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in outcome.plain.weights:
            assert float((after[name] - outcome.plain.weights[name]).abs().max()) <= 5e-5, name
            assert not torch.equal(after[name], tensor), name
        else:
            assert torch.equal(after[name], tensor), name


def test_what_it_trains_is_counted_and_its_movement_is_recorded(outcome: Outcome) -> None:
    summary = read_json(RunDirectory(outcome.run.directory).summary)
    assert summary["method"] == outcome.case.method
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in outcome.plain.weights.values())
    (movement,) = outcome.run.movement()
    assert sum(unit["numel"] for unit in movement["units"]) == summary["trainable_parameters"]
    assert all(unit["moved_since_start"] > 0 for unit in movement["units"])


def test_held_out_text_may_wait_for_the_end(outcome: Outcome) -> None:
    """train.eval_every: 0"""
    assert outcome.run.evaluations() == []
    assert read_json(RunDirectory(outcome.run.directory).evaluation).keys() >= {"base", "adapted"}


def test_deepspeeds_own_tools_read_its_checkpoints(outcome: Outcome, tmp_path: Path) -> None:
    """They find what trained to the last bit, with the moments of its optimizer; what is frozen is in no checkpoint."""
    checkpoints, trained = outcome.run.directory / "checkpoints", outcome.run.weights()
    convert_zero_checkpoint_to_state_dict(checkpoints, tmp_path / "whole")
    in_this_process = {"num_extract_workers": 1, "num_merge_workers": 1}
    places = {"input_folder": str(checkpoints / "step_3"), "output_folder": str(tmp_path / "universal")}
    defaults = {"keep_temp_folder": False, "strict": True, "inject_missing_state": False}
    ds_to_universal.main(argparse.Namespace(**in_this_process, **places, **defaults))
    whole, parts = torch.load(tmp_path / "whole" / "pytorch_model.bin"), tmp_path / "universal" / "zero"
    tied = {"lm_head.weight"}
    assert outcome.plain.weights.keys() <= whole.keys() <= outcome.plain.weights.keys() | tied
    for name in outcome.plain.weights:
        assert torch.equal(whole[name], trained[name]), name
        saved = {file.stem: torch.load(file) for file in (parts / name).glob("[ef]*.pt")}
        states = {key: state["param"] if isinstance(state, dict) else state for key, state in saved.items()}
        assert states.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
        assert torch.equal(states["fp32"].view_as(trained[name]), trained[name]), name
        assert all(state.numel() == trained[name].numel() and state.any() for state in states.values())


def test_a_checkpoint_holds_what_trained_and_nothing_else(outcome: Outcome) -> None:
    """Weights, two moments of 4 bytes for each element over all ranks, and what describes them."""
    trained = sum(tensor.numel() for tensor in outcome.plain.weights.values())
    files = read_json(outcome.run.directory / "checkpoints" / "step_3" / "manifest.json")["files"]
    states = sum(file["size"] for name, file in files.items() if name.endswith("optim_states.pt"))
    assert 12 * trained <= states <= 1.1 * 12 * trained + 20_000 * outcome.case.world_size
    models = sum(file["size"] for name, file in files.items() if name.endswith("model_states.pt"))
    assert models <= 4 * trained + 40_000 * outcome.case.world_size


def test_it_resumes_bit_for_bit(outcome: Outcome) -> None:
    """From the checkpoint before the last, which is what a crash leaves."""
    files, before = RunDirectory(outcome.run.directory), outcome.run.weights()
    shutil.rmtree(files.checkpoints / checkpoint_tag(3))
    result = adept(outcome.case.world_size, "run", outcome.config_file)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stdout
    after = outcome.run.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_in_place_nothing_is_expanded(workspace: Workspace, tmp_path: Path) -> None:
    result = adept(1, "expand", configured(CASES[0], workspace, tmp_path))
    assert result.returncode == 2
    assert_one_line(result.stderr, ["method: full", "in place", "adept train"])
    assert not (tmp_path / CASES[0].name / "expanded").exists()


def test_training_in_place_does_not_go_on_with_other_layers(workspace: Workspace, tmp_path: Path) -> None:
    case = Case("freeze", 1, 1, everything, {"layers": [0]})
    file = configured(case, workspace, tmp_path)
    assert adept(1, "run", file, "train.steps=1").returncode == 0
    result = adept(1, "run", file, "train.steps=1", "expand.layers=[1]")
    assert result.returncode == 2
    assert_one_line(result.stderr, ["expand.layers: ", "[0], not [1]"])


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        pytest.param({"method": "fulll"}, ["method: ", "'fulll'", "choose one of adept, "], id="no such method"),
        pytest.param({"method": {"name": "full", "rank": 3}}, ["unknown key 'method.rank'"], id="no such key"),
        pytest.param({"method": "full", "expand": {"k": 2}}, ["expand.k: ", "method: full", "remove it"], id="layers"),
        pytest.param(
            {"method": "llama_pro", "expand": {"choose": "lowest"}},
            ["expand.choose: 'lowest'", "'uniform'"],
            id="even",
        ),
        pytest.param({"method": "freeze", "lr_policy": {"map": "rank"}}, ["lr_policy.map: 'rank'"], id="rates"),
        pytest.param({"method": "full", "importance": {"every": 5}}, ["importance.every: "], id="no importance"),
        pytest.param({"method": "replay"}, ["data.replay: ", "method: full"], id="nothing to replay"),
        pytest.param({"method": "full", "data": {"replay": ["a"]}}, ["data.replay: ", "method: replay"], id="replay"),
        pytest.param({"method": {}}, ["method: name is missing"], id="no name"),
    ],
)
def test_what_a_method_does_not_look_at_is_refused(sections: dict[str, Any], parts: list[str]) -> None:
    from adept_ds.base.errors import InputError
    from adept_ds.config.loading import parse_config

    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r"} | sections)
    assert_one_line(f"adept: {caught.value}", parts)
