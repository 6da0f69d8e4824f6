"""`lr_policy.map: ratio` by `adept run`: AdamW in plain PyTorch, at rates by importance on both sides.

Both importances are estimated on the source layers before the first step, and on the copies after every second one.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.launching import adept
from harness.marks import slow
from harness.packing import pack, rows, rows_of_step
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag
from adept_ds.config.loading import load_config, parse_config
from adept_ds.data.order import block_order
from adept_ds.weights.expansion import Expansion

PerUnit = dict[str, float]

STEPS, MIDDLE, EVERY = 5, 3, 2
LOW, HIGH, POWER, SMOOTHING = 0.8, 1.2, 1.5, 0.4
SECTIONS: dict[str, Any] = {
    "expand": {"choose": "uniform"},
    "importance": {"every": EVERY, "sequences": 7, "batch_sequences": 5},
    "lr_policy": {
        "map": "ratio",
        "ratio_power": POWER,
        "min_multiplier": LOW,
        "max_multiplier": HIGH,
        "smoothing": SMOOTHING,
    },
    "train": {"steps": STEPS, "checkpoint_every": MIDDLE, "eval_every": 0},
}


@dataclass(frozen=True)
class Run:
    workspace: Workspace
    file: Path
    world_size: int

    @property
    def finished(self) -> Finished:
        return Finished(self.file.with_suffix(""))

    def start(self) -> str:
        result = adept(self.world_size, "run", self.file)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module", params=[slow((1, 2)), slow((2, 1)), (3, 2)], ids="zero{0[0]}-{0[1]}".format)
def run(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    stage, world_size = request.param
    folder = tmp_path_factory.mktemp("ratio")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    file = workspace.config(folder / "run", deepspeed=str(folder / "zero.json"), **SECTIONS)
    found = Run(workspace, file, world_size)
    found.start()
    return found


def proportional(general: PerUnit, domain: PerUnit, sizes: PerUnit) -> PerUnit:
    """Norms apart; the factor of proportion is found by halving."""
    multipliers: PerUnit = {}
    for norms in (True, False):
        units = [unit for unit in general if ("norm" in unit) == norms]
        eps = 0.01 * statistics.median(general[unit] for unit in units)
        ratios = {unit: (domain[unit] / (general[unit] + eps)) ** POWER for unit in units}
        below, above = 0.0, 1e12
        for _ in range(300):
            factor = (below + above) / 2
            limited = {unit: min(max(factor * ratio, LOW), HIGH) for unit, ratio in ratios.items()}
            is_low = math.fsum(sizes[unit] * (limited[unit] - 1) for unit in units) < 0
            below, above = (factor, above) if is_low else (below, factor)
        multipliers |= limited
    return multipliers


def texts_of(run: Run) -> tuple[list[oracle.Batch], list[oracle.Batch], list[oracle.Batch]]:
    """What importances are estimated on, general and domain, and what each step trains on."""
    config, root, cache = load_config(run.file), run.workspace.root, run.file.parent / "oracle"
    train, section = config.train, config.importance
    general = pack([root / "general.jsonl"], run.workspace.model, cache, seq_len=config.probe.seq_len, keep_tail=True)
    domain = pack([root / "domain.jsonl"], run.workspace.model, cache, seq_len=config.data.seq_len)
    samples = []
    for blocks in (general, domain):
        chosen = block_order(len(blocks), config.probe.seed)[: section.sequences]
        starts = range(0, section.sequences, section.batch_sequences)
        samples.append([rows(blocks, chosen[start : start + section.batch_sequences]) for start in starts])
    steps = [rows_of_step(domain, step, train.global_batch_size, train.seed) for step in range(STEPS)]
    return samples[0], samples[1], steps


def of_copies(of_sources: PerUnit, expansion: Expansion) -> PerUnit:
    return {
        unit.replace(f"layers.{copy.source}.", f"layers.{copy.index}.", 1): value
        for unit, value in of_sources.items()
        for copy in expansion.copies
        if unit.startswith(f"layers.{copy.source}.")
    }


@dataclass
class Plain(oracle.Training):
    """With importances for the domain, as estimated."""

    for_domain: list[PerUnit] = field(default_factory=list)


def plain(run: Run) -> Plain:
    general, domain, steps = texts_of(run)
    train, directory = load_config(run.file).train, run.finished.directory
    expansion, source = Expansion.read(directory / "expanded"), oracle.load(run.workspace.model)
    model = oracle.load(directory / "expanded")
    parameters = oracle.trainable(model, expansion.copy_indices)
    sizes: PerUnit = {}
    for name, parameter in parameters.items():
        sizes[oracle.unit_of(name)] = sizes.get(oracle.unit_of(name), 0) + parameter.numel()
    result, smoothed = Plain(), list[PerUnit]()

    def refresh(of: Any, layers: Sequence[int]) -> None:
        found = [oracle.importance(of, layers, text) for text in (general, domain)]
        if of is source:
            found = [of_copies(side, expansion) for side in found]
        result.importances.append(found[0])
        result.for_domain.append(found[1])
        before = smoothed or found
        smoothed[:] = [
            {unit: SMOOTHING * old[unit] + (1 - SMOOTHING) * new[unit] for unit in new}
            for old, new in zip(before, found, strict=True)
        ]
        result.multipliers.append(proportional(smoothed[0], smoothed[1], sizes))

    refresh(source, expansion.source_indices)
    oracle.trainable(model, expansion.copy_indices)
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "name": name} for name, parameter in parameters.items()],
        betas=train.betas,
        weight_decay=train.weight_decay,
        eps=train.eps,
    )
    rates = [record["lr"] for record in run.finished.steps()]
    for number, (batch, lr) in enumerate(zip(steps, rates, strict=True), start=1):
        optimizer.zero_grad()
        loss = oracle.mean_loss(model, [batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), train.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * result.multipliers[-1][oracle.unit_of(group["name"])]
        optimizer.step()
        result.losses.append(float(loss.detach()))
        if number % EVERY == 0 and number < STEPS:
            refresh(model, expansion.copy_indices)
    result.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return result


def test_it_is_plain_adamw_at_rates_by_both_importances_and_resumes_bit_for_bit(run: Run) -> None:
    """Importances of the source layers to 1e-5, those after training steps of 1e-2 to 1e-3 relative; multipliers as
    they; losses of five steps and exported weights to 1e-5, as without the domain's side."""
    wanted, exported = plain(run), run.finished.weights()
    found = {key: run.finished.units(key) for key in ("importance", "domain_importance", "multiplier")}
    assert len(found["multiplier"]) == len(wanted.multipliers) == 3
    assert found["importance"][0] == pytest.approx(wanted.importances[0], rel=1e-5)
    assert found["domain_importance"][0] == pytest.approx(wanted.for_domain[0], rel=1e-5)
    for key, expected in (("importance", wanted.importances), ("domain_importance", wanted.for_domain)):
        for actual, plainly in zip(found[key], expected, strict=True):
            assert actual == pytest.approx(plainly, rel=1e-3)
    for actual, plainly in zip(found["multiplier"], wanted.multipliers, strict=True):
        assert actual == pytest.approx(plainly, abs=1e-3)
        assert min(actual.values()) == LOW
        assert max(actual.values()) == HIGH
        assert len(set(actual.values())) > 4, "some must lie between the limits"
    assert run.finished.losses() == pytest.approx(wanted.losses, abs=1e-5)
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 1e-5, name
    shutil.rmtree(RunDirectory(run.finished.directory).checkpoints / checkpoint_tag(STEPS))
    assert f"resuming after step {MIDDLE}" in run.start()
    again = run.finished.weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())
    assert run.finished.units("multiplier") == found["multiplier"]


def test_the_report_shows_both_importances(run: Run) -> None:
    page = (run.finished.directory / "report.html").read_text(encoding="utf-8")
    assert "<th>importance for the domain</th>" in page


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        pytest.param(
            {"importance": {"source": "online"}, "data": {"replay": ["a"]}},
            ["importance.source: online", "lr_policy.map: ratio", "remove it"],
            id="online",
        ),
        pytest.param({"data": {"streaming": True}}, ["data.streaming: ", "lr_policy.map: ratio"], id="streamed"),
        pytest.param(
            {"importance": {"sequences": 1}, "data": {"domain": [{"files": ["a"]}, {"files": ["b"]}]}},
            ["importance.sequences: 1", "2 sources of data.domain", "at least 2"],
            id="fewer sequences than sources",
        ),
    ],
)
def test_domain_text_that_cannot_be_sampled_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"model": "m", "run_dir": "r", "lr_policy": {"map": "ratio"}} | sections)
    assert_one_line(f"adept: {caught.value}", words)
