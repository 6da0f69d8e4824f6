"""Predicted bytes against measured ones: of memory by kind, and of what is sent, on 1, 2 and 4 real ranks.

Measured in real training steps of real engines (harness/planning_worker.py): storages of weights, gradients and
moments; what autograd keeps; what is made while weights are fetched; the peak of all tensors that a step makes; and the
arguments of every collective. The limit is 5% of each kind. The peak is a bound: the plan adds up what most kinds hold
at most, which need not be at the same moment, so it may be more than what is measured, and not less.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.launching import launch
from harness.marks import slow
from harness.models import save_tiny_model
from harness.planning_worker import DTYPES, MICRO_BATCHES, rows_of

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.planning.candidates import as_run
from adept_ds.planning.memory import Memory, Step, held
from adept_ds.planning.outline import Outline
from adept_ds.planning.recording import outline_of
from adept_ds.planning.traffic import collectives
from adept_ds.planning.zero_settings import ZeroSettings

CELLS = ["1/fp32", "2/fp32/1", "2/bf16", "3/fp32", "3/fp32/recomputed", "3/bf16/3", "3/bf16/3/recomputed"]
CELLS += ["3/fp32/offloaded"]
"""Stage 3 last: from it on, DeepSpeed's linear layers stay in the process. Two sequences, one and three."""
EVERY_LOGIT = 1e12
DEMO = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
TINY_LAYERS, DEMO_LAYERS = (2, 4), (8, 17, 25, 33)
SMALLEST = 4096
"""Bytes below which a kind is not compared in shares: padding and counters of single elements show there."""


def predicted(outline: Outline, zero: dict[str, Any], precision: str, ranks: int, how: list[str]) -> dict[str, Any]:
    settings = as_run(ZeroSettings.read({"zero_optimization": zero}, ""), precision)
    step = Step(ranks, rows_of(how), MICRO_BATCHES, "recomputed" in how)
    found = held(outline, settings, step, EVERY_LOGIT, 0.0, 0.0)
    memory = {each.name: getattr(found.memory, each.name) for each in fields(Memory)}
    sent: dict[str, float] = {}
    for collective in collectives(outline, settings, step, found):
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.payload
    there = ["frozen_weights", "trained_weights", "optimizer"]  # when a step begins
    there += ["gradients", "bucket"] if settings.stage == 3 else []
    in_step = found.memory.peak - sum(memory[kind] for kind in there)
    return {"memory": memory, "sent": sent, "in_step": in_step}


def measured(folder: Path, model: Path, layers: tuple[int, ...], seq_len: int, ranks: int, cells: list[str]) -> Any:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"model": str(model), "run_dir": "none", "data": {"seq_len": seq_len}}))
    out = folder / f"{ranks}.pt"
    arguments = ["-m", "harness.planning_worker", str(config), str(model), ",".join(map(str, layers)), str(out)]
    result = launch(ranks, [*arguments, *cells])
    assert result.returncode == 0, result.stderr
    return torch.load(out)


def compare(outline_by_precision: dict[str, Outline], found: dict[str, Any], ranks: int) -> list[str]:
    """A line for every number: (cell, kind, predicted, measured)."""
    lines, wrong = [], []
    for cell, of in found.items():
        _, precision, *how = cell.split("/")
        plan = predicted(outline_by_precision[precision], of["zero"], precision, ranks, how)
        real = dict(of["memory"])
        real["activations"] = sum(of["kept"].values())
        if "recomputed" in how:  # inputs of layers are kept, and all of one: that is measured where nothing is
            plain = found[cell.removesuffix("/recomputed")]["kept"]
            real["activations"] += max(size for layer, size in plain.items() if layer is not None)
        pairs = {kind: (plan["memory"][kind], real[kind], 0.05) for kind in real if kind != "peak"}
        pairs |= {f"sent: {kind}": (plan["sent"].get(kind, 0.0), size, 0.05) for kind, size in of["sent"].items()}
        pairs |= {f"sent: {kind}": (size, of["sent"].get(kind, 0), 0.05) for kind, size in plan["sent"].items()}
        bound = plan["in_step"]
        if real["peak"] > 1.05 * bound:
            wrong.append(f"{ranks} | {cell} | peak of a step | {bound:,.0f} | {real['peak']:,.0f}")
        lines.append(
            f"{ranks} | {cell} | peak of a step | {bound:,.0f} | {real['peak']:,.0f} | {bound / real['peak'] - 1:+.1%}"
        )
        for kind, (ours, theirs, limit) in pairs.items():
            share = abs(ours - theirs) / max(theirs, 1.0)
            line = f"{ranks} | {cell} | {kind} | {ours:,.0f} | {theirs:,.0f} | {ours / max(theirs, 1.0) - 1:+.1%}"
            lines.append(line)
            if share > limit and max(ours, theirs) > SMALLEST:
                wrong.append(line)
    print("\n".join(lines))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_model_of_the_demos_size_holds_and_sends_what_was_predicted(ranks: int, tmp_path: Path) -> None:
    """SmolLM2-135M's shape with random weights and four copies, in fp32."""
    options: dict[str, Any] = {
        **DEMO,
        "num_hidden_layers": 34,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "head_dim": 64,
    }
    model = ModelDirectory.read(save_tiny_model(tmp_path / "model", **options))
    outline = outline_of(model, layers_train(model.family, DEMO_LAYERS), torch.float32, 64)
    cells = ["1/fp32", "2/fp32", "3/fp32", "3/fp32/recomputed"]
    found = measured(tmp_path, model.path, DEMO_LAYERS, 64, ranks, cells)
    assert compare({"fp32": outline}, found, ranks) == []


@pytest.mark.parametrize("ranks", [slow(1), 2, slow(4)])
def test_a_tiny_model_holds_and_sends_what_was_predicted(ranks: int, tmp_path: Path) -> None:
    model = ModelDirectory.read(save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=96, head_dim=16))
    trains = layers_train(model.family, TINY_LAYERS)
    outlines = {name: outline_of(model, trains, dtype, 32) for name, dtype in DTYPES.items()}
    found = measured(tmp_path, model.path, TINY_LAYERS, 32, ranks, CELLS)
    assert compare(outlines, found, ranks) == []
