"""`method: tasl` by `adept run`: plain training, and the export is the consolidation written down in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import method_oracle
import oracle
import pytest
import torch
from harness.complaints import assert_one_line
from harness.launching import adept
from harness.method_runs import GRID, STEPS, MethodRun
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import checkpoint_tag, manifest_of
from adept_ds.config.loading import parse_config
from adept_ds.training.checkpoint import CheckpointManifest

SMOOTHING = (0.6, 0.7)
METHOD = {"name": "tasl", "smoothing": list(SMOOTHING), "important": 0.4, "old_share": 0.65, "sequences": 8}
NEW_SHARES = {"general": 0.0, "domain": 1.0, "shared": 0.35, "idle": 0.5}


def score(batches: list[method_oracle.PerUnit]) -> method_oracle.PerUnit:
    """Smoothed importance times smoothed uncertainty."""
    mean, uncertainty = (dict.fromkeys(batches[0], 0.0) for _ in range(2))
    (first, second) = SMOOTHING
    for importance in batches:
        for unit, value in importance.items():
            mean[unit] = first * mean[unit] + (1 - first) * value
            uncertainty[unit] = second * uncertainty[unit] + (1 - second) * abs(value - mean[unit])
    return {unit: mean[unit] * uncertainty[unit] for unit in mean}


def plain(run: MethodRun, every: int = 1) -> tuple[oracle.Training, method_oracle.PerUnit]:
    """Training with its weights consolidated, and the share of new weights in each unit."""
    model, seen = oracle.load(run.workspace.model), list[method_oracle.PerUnit]()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    texts = run.sample("general", 8, 2)
    general = score([method_oracle.products(model, method_oracle.gradients(model, batch)) for batch in texts])

    def see(gradients: dict[str, torch.Tensor]) -> None:
        seen.append(method_oracle.products(model, gradients))

    training = method_oracle.train(model, run.steps(), run.rates(), dict(run.config.train), see=see)
    important = method_oracle.top(general, 0.4), method_oracle.top(score(seen[::every]), 0.4)
    new = method_oracle.by_role(*important, list(general), NEW_SHARES)
    for name, weight in training.weights.items():
        weight.copy_(start[name] + new[oracle.unit_of(name)] * (weight - start[name]))
    return training, new


@pytest.fixture(scope="module", params=GRID, ids=lambda cell: f"zero{cell[0]}-{cell[1]}")
def run(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> MethodRun:
    stage, world_size = request.param
    run = MethodRun(workspace, tmp_path_factory.mktemp("tasl"), METHOD, stage, world_size)
    run.start()
    return run


@pytest.fixture(scope="module")
def sparse(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> MethodRun:
    """Looks at the gradient of the first step, and of every third after it."""
    run = MethodRun(workspace, tmp_path_factory.mktemp("sparse"), METHOD | {"observe_every": 3}, stage=2)
    run.start()
    return run


def test_it_is_plain_adamw_consolidated_by_unit_and_resumes_bit_for_bit(run: MethodRun) -> None:
    """Losses of four steps to 1e-5 relative, exported weights to 5e-5 of steps of 1e-2; old weights to the last bit."""
    (wanted, new), exported = plain(run), run.finished.weights()
    assert set(new.values()) == set(NEW_SHARES.values()), "every role must have its units"
    written = read_json(run.files.checkpoints / checkpoint_tag(STEPS) / "consolidation.json")["units"]
    assert {unit: share["new"] for unit, share in written.items()} == pytest.approx(new)
    assert run.finished.losses() == pytest.approx(wanted.losses, rel=1e-5)
    before = load_file(run.workspace.model / "model.safetensors")
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 5e-5, name
        assert torch.equal(exported[name], before[name]) == (new[oracle.unit_of(name)] == 0), name
    again = run.resumed()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())


def test_a_checkpoint_that_does_not_say_what_becomes_of_units_is_not_exported(
    sparse: MethodRun, tmp_path: Path
) -> None:
    checkpoint = sparse.files.checkpoints / checkpoint_tag(STEPS)
    export = ["export", checkpoint, tmp_path / "out", "--base", sparse.workspace.model]
    file, manifest = checkpoint / "consolidation.json", manifest_of(checkpoint)
    whole, proved = read_json(file), manifest.read_bytes()
    CheckpointManifest.load(manifest).model_copy(update={"files": {}, "check": None}).save(manifest)
    try:
        write_json(file, {"units": dict(list(whole["units"].items())[1:])})
        result = adept(1, *export)
        assert result.returncode == 2
        assert_one_line(result.stderr, ["consolidation.json", "of another model"])
        file.unlink()
        result = adept(1, *export)
        assert result.returncode == 2
        assert_one_line(result.stderr, ["consolidation.json", "copy the checkpoint again"])
        assert not (tmp_path / "out").exists()
    finally:
        write_json(file, whole)
        manifest.write_bytes(proved)


def test_gradients_may_be_looked_at_less_often(sparse: MethodRun) -> None:
    written = read_json(sparse.files.checkpoints / checkpoint_tag(STEPS) / "consolidation.json")["units"]
    assert {unit: share["new"] for unit, share in written.items()} == pytest.approx(plain(sparse, every=3)[1])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        pytest.param({"method": {"name": "tasl", "important": 1.0}}, ["method.important: 1.0"], id="all important"),
        pytest.param({"method": {"name": "tasl", "old_share": 1.5}}, ["method.old_share: 1.5"], id="more than all"),
        pytest.param({"method": {"name": "tasl", "smoothing": [0.5]}}, ["method.smoothing"], id="one share"),
        pytest.param({"method": "tasl", "data": {"replay": ["a"]}}, ["data.replay: ", "method: replay"], id="replay"),
        pytest.param({"method": "tasl", "importance": {"every": 3}}, ["importance.every: "], id="no refreshes"),
    ],
)
def test_keys_that_make_no_sense_are_refused(sections: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r"} | sections)
    assert_one_line(f"adept: {caught.value}", words)
