"""`anchor` by `adept run` is its term in the loss in plain PyTorch: base and adapted model apart, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.launching import adept
from harness.marks import slow
from harness.method_runs import MethodRun
from harness.packing import pack, rows, rows_of_step
from harness.workspace import Workspace

from adept_ds.base.files import read_json
from adept_ds.data.order import block_order, endless_order
from adept_ds.weights.expansion import Expansion

WEIGHT, SEQUENCES, PER_STEP = 4.0, 7, 3
"""Three sequences of a step are dealt unevenly to two ranks."""

TRAIN = {"steps": 4, "checkpoint_every": 2, "lr": 1e-2, "global_batch_size": 12, "micro_batch_size": 2}
TRAIN |= {"eval_every": 0, "warmup_ratio": 0.3, "weight_decay": 0.1, "clip_grad_norm": 0.5}
ONLINE = {"source": "online", "every": 2}
REFRESHED = {"every": 2, "sequences": 7, "batch_sequences": 5}


@dataclass(frozen=True)
class Case:
    method: str
    kind: str
    stage: int
    world_size: int
    train: dict[str, Any] = field(default_factory=dict)
    anchor: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, Any] = field(default_factory=lambda: REFRESHED)

    @property
    def name(self) -> str:
        online = "-online" if self.replays else ""
        return f"{self.method}-{self.kind}-zero{self.stage}-{self.world_size}{online}"

    @property
    def replays(self) -> bool:
        return self.importance is ONLINE


CASES = [
    Case("adept", "kl", 3, 2),
    Case("llama_pro", "neutral", 2, 2),
    slow(Case("llama_pro", "kl", 1, 1)),
    slow(Case("adept", "neutral", 3, 2, train={"micro_batch_size": 1})),
    slow(Case("adept", "kl", 2, 2, anchor={"cache_mib": 0}, importance=ONLINE)),
]


def configured(case: Case, workspace: Workspace, folder: Path) -> MethodRun:
    anchor = {"kind": case.kind, "weight": WEIGHT, "share": 0.25, "sequences": SEQUENCES}
    sections: dict[str, Any] = {"expand": {"layers": [1, 3]}, "train": TRAIN | case.train}
    sections |= {"anchor": anchor | case.anchor}
    if case.method == "adept":
        sections["importance"] = case.importance
    if case.replays:
        texts = {name: [str(workspace.root / f"{file}.jsonl")] for name, file in TEXTS.items()}
        sections["data"] = {"seq_len": 32, "replay_share": 1 / 3} | texts
        sections["anchor"] |= {"share": 0.375}
    return MethodRun(workspace, folder, {"name": case.method}, case.stage, case.world_size, sections)


TEXTS = {"domain": "domain", "replay": "general"}


def kl(model: Any, base: Any, batch: oracle.Batch) -> torch.Tensor:
    """Sum over predicted tokens of D(base || model)."""
    ids, labels = batch
    with torch.no_grad():
        p = base(input_ids=ids, use_cache=False).logits[:, :-1].double().softmax(-1)
    q = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return ((p * (p.log() - q)).sum(-1) * (labels[:, 1:] != -100)).sum()


def neutral(model: Any, _: Any, batch: oracle.Batch) -> torch.Tensor:
    """Sum over predicted tokens of the mean over copies of |w|^2 / |h|^2."""
    ids, labels = batch
    found = []

    def measure(_: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        found.append((output - inputs[0]).square().sum(-1) / inputs[0].detach().square().sum(-1))

    copies = [layer for layer in model.model.layers if any(p.requires_grad for p in layer.parameters())]
    handles = [copy.register_forward_hook(measure) for copy in copies]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return (torch.stack(found).mean(0) * (labels != -100))[:, 1:].sum()


TERMS: dict[str, Callable[[Any, Any, oracle.Batch], torch.Tensor]] = {"kl": kl, "neutral": neutral}


@dataclass
class Plain:
    losses: list[float]
    anchors: list[float]
    weights: dict[str, torch.Tensor]
    online: dict[str, float]
    """Importance of each unit over the first two steps, on the replayed rows alone."""


def plain(run: MethodRun, case: Case) -> Plain:
    """AdamW with a group for each parameter, on the loss with the term; rates and multipliers are those of the run."""
    root, config, cache = run.workspace.root, run.config, run.folder / "oracle"
    train, anchor = config.train, config.anchor
    assert anchor is not None
    general = [root / "general.jsonl"]
    domain, replay, anchored = (
        pack(files, run.workspace.model, cache, seq_len=32, keep_tail=tail)
        for files, tail in (([root / "domain.jsonl"], False), (general, False), (general, True))
    )
    sample = block_order(len(anchored), config.probe.seed)[:SEQUENCES]
    model, base = oracle.load(run.files.expanded), oracle.load(run.workspace.model)
    base.requires_grad_(False)
    parameters = oracle.trainable(model, Expansion.read(run.files.expanded).copy_indices)
    groups = [{"params": [parameter], "name": name} for name, parameter in parameters.items()]
    options = {key: getattr(train, key) for key in ("betas", "weight_decay", "eps")}
    optimizer = torch.optim.AdamW(groups, **options)
    multipliers = {record["step"]: record["units"] for record in _refreshes(run)}
    factor: dict[str, float] = {}
    found = Plain([], [], {}, {})
    for step, lr in enumerate(run.rates()):
        if step in multipliers:
            factor = {unit["unit"]: unit["multiplier"] for unit in multipliers[step]}
        batch = rows_of_step(domain, step, train.global_batch_size - config.replayed, train.seed)
        if config.replayed:
            replayed = rows_of_step(replay, step, config.replayed, train.seed)
            batch = tuple(torch.cat(parts) for parts in zip(replayed, batch, strict=True))  # type: ignore[assignment]
            if step < 2:
                _observe(found.online, model, replayed)
        order = endless_order(step * PER_STEP, (step + 1) * PER_STEP, SEQUENCES, train.seed)
        text = rows(anchored, [sample[position] for position in order])
        optimizer.zero_grad()
        loss = oracle.mean_loss(model, [batch])
        term = TERMS[case.kind](model, base, text) / int((text[1][:, 1:] != -100).sum())
        (loss + WEIGHT * term).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), train.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor.get(oracle.unit_of(group["name"]), 1.0)
        optimizer.step()
        found.losses.append(float(loss.detach()))
        found.anchors.append(float(term.detach()))
    found.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return found


def _refreshes(run: MethodRun) -> list[dict[str, Any]]:
    from adept_ds.base.files import read_json_lines

    return read_json_lines(run.files.unit_importance) if run.files.unit_importance.is_file() else []


def _observe(sums: dict[str, float], model: Any, replayed: oracle.Batch) -> None:
    """Half of |w g|, its mean over each unit: two steps make one mean."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(oracle.mean_loss(model, [replayed]), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        unit = oracle.unit_of(name)
        sums[unit] = sums.get(unit, 0.0) + float((parameter.detach() * gradient).abs().double().mean()) / 2


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def run(
    request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, MethodRun]:
    found = configured(request.param, workspace, tmp_path_factory.mktemp("anchor"))
    found.start()
    return request.param, found


def test_it_is_plain_adamw_on_the_loss_with_the_anchor(run: tuple[Case, MethodRun]) -> None:
    """Losses of four steps to 1e-5 relative, anchors to 1e-3, exported weights to 1e-4 of steps of 1e-2.

    An anchor is a small difference of large numbers, the less exact the smaller it is.
    """
    case, training = run
    wanted, exported, steps = plain(training, case), training.finished.weights(), training.finished.steps()
    assert [step["loss"] for step in steps] == pytest.approx(wanted.losses, rel=1e-5)
    anchors = [step["anchor"] for step in steps]
    assert anchors == pytest.approx(wanted.anchors, rel=1e-3, abs=1e-6)
    assert abs(anchors[0]) < 1e-6 < 1e-3 < anchors[-1], "fresh copies are silent, and then they write"
    for name, weight in wanted.weights.items():
        assert float((exported[name] - weight).abs().max()) <= 1e-4, name
    if case.replays:
        importance = training.finished.units("importance")[-1]
        assert importance == pytest.approx(wanted.online, rel=1e-3), "the anchor's gradient is none of it"


def test_it_resumes_bit_for_bit(run: tuple[Case, MethodRun]) -> None:
    _, training = run
    before, again = training.finished.weights(), training.resumed()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())


def test_what_it_takes_is_recorded_beside_the_domains_tokens(run: tuple[Case, MethodRun]) -> None:
    _, training = run
    steps, summary = training.finished.steps(), read_json(training.files.summary)
    assert {step["anchor_tokens"] for step in steps} <= {PER_STEP * 32, *range(2 * 32 + 2, 3 * 32)}  # one has a tail
    assert all(0 < step["anchor_seconds"] < step["seconds"] for step in steps)
    assert summary["anchor_tokens"] == sum(step["anchor_tokens"] for step in steps)
    assert steps[-1]["tokens"] == summary["tokens"] == 4 * 12 * 32
    assert 'id="anchor"' in training.files.report.read_text()


def test_it_does_not_go_on_with_another_anchor_or_without(workspace: Workspace, tmp_path: Path) -> None:
    training = configured(Case("llama_pro", "kl", 1, 1), workspace, tmp_path)
    assert adept(1, "run", training.file, "train.steps=1").returncode == 0
    for override, words in (("anchor.weight=2", "anchor.weight: "), ("anchor=null", "anchor.kind: ")):
        result = adept(1, "run", training.file, "train.steps=1", override)
        assert result.returncode == 2
        assert words in result.stderr
