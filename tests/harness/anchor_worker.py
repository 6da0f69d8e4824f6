"""What one rank does in zero/test_anchored.py: trainings with an anchor that differ in how they are done only.

Usage: python -m harness.anchor_worker WORKSPACE OUTPUT PART... with kinds of anchors, compared in fp32, and other
precisions. Rank 0 writes what it found to OUTPUT (torch.save).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from harness.lab import LR, Lab, training_engine, whole_values
from harness.workspace import Workspace

from adept_ds.config.checks import anchor_shape
from adept_ds.config.schema import Config
from adept_ds.data.anchor_text import AnchorText
from adept_ds.data.order import block_order
from adept_ds.data.training_data import TrainingData, step_batch
from adept_ds.models.anchor_passes import AnchorPasses
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.training.anchor import Anchor
from adept_ds.training.step import accumulate_gradient
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.importance import estimate_importance
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.engine import release, set_learning_rate
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import loss_scale, set_loss_scale

STEPS, SEQUENCES = 4, 5


def train(
    lab: Lab, config: Config, capacity: int = SEQUENCES + 1, keep_bytes: int = 0, estimate_after: int | None = None
) -> dict[str, Any]:
    """The anchor before each step, trained weights, and how often the lowest layer was run.

    Args:
        capacity: sequences of which is kept what the base computes.
        keep_bytes: of frozen weights that stay gathered after the first step.
        estimate_after: the step after which importances are estimated.
    """
    section, train, ranks = config.anchor, config.train, lab.ranks
    assert section is not None
    engine, registry = training_engine(config, lab.expanded, lab.layers, ranks, UnitAdamW)
    UnitLR(engine, registry, config.lr_policy, ranks)
    sample, rows = block_order(len(lab.replay.blocks), 0)[:SEQUENCES], anchor_shape(config, ranks.world_size)[1]
    text = AnchorText(lab.replay.blocks, tuple(sample), config.anchored, rows, train.seed)
    family, runs, anchors = lab.expanded.family, 0, []
    passes = AnchorPasses(engine.module, family, lab.layers, section.kind)
    anchor = Anchor(engine, passes, text, section.weight, ranks, capacity, 0.0)

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    lowest: Any = family.layer_modules(engine.module)[0]
    lowest.self_attn.register_forward_hook(count)
    data = TrainingData(lab.domain)
    if train.precision == "fp16":
        set_loss_scale(engine, 16.0)  # or many steps would pass until it is found
    for step in range(STEPS):
        set_learning_rate(engine, LR)
        accumulate_gradient(engine, step_batch(data, step, train, ranks), further=anchor.backward_passes(step))
        anchors.append(anchor.record(step, float(ranks.sum(anchor.take().reshape(1))))["anchor"])
        engine.step()
        if step == 0 and keep_bytes:
            keep_frozen_gathered(engine, keep_bytes)
        if step == estimate_after:
            estimate_importance(engine, registry, lab.gradient_batches(train.micro_batch_size), ranks)
    values = whole_values(engine)
    trained = {name: values[name].float() for name, p in engine.module.named_parameters() if p.requires_grad}
    scale = loss_scale(engine)
    release(engine)
    return {"anchors": anchors, "trained": trained, "runs": runs, "loss_scale": scale}


def main() -> None:
    workspace, output = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    lab = Lab(workspace, output.parent, join(rank_from_environment(os.environ)))
    strict, results = str(lab.strict_zero3()), dict[str, Any]()

    def config(
        kind: str, deepspeed: str = strict, precision: str = "fp32", weight: float = 4.0, **train: Any
    ) -> Config:
        return lab.config(
            deepspeed=deepspeed,
            anchor={"kind": kind, "share": 0.75, "weight": weight},
            train={"precision": precision, "global_batch_size": 4, "micro_batch_size": 1} | train,
        )

    for kind in ("kl", "neutral"):
        if kind not in sys.argv[3:]:
            continue
        results[f"{kind} kept"] = train(lab, config(kind))
        recomputed = config(kind, activation_checkpointing=True)
        results[f"{kind} kept in part"] = train(lab, recomputed, capacity=2, keep_bytes=40_000)
        results[f"{kind} not kept"] = train(lab, config(kind), capacity=0, keep_bytes=1 << 30, estimate_after=1)
    zero2 = str(lab.deepspeed_file("two", stage=2))
    # DeepSpeed takes fp16 on a CPU for unsupported where it would be slow.
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        for precision, kind, file in (("bf16", "neutral", zero2), ("fp16", "kl", strict)):
            for weight in (1e-3, 1e3) if precision in sys.argv[3:] else ():
                found = train(lab, config(kind, file, precision, weight))
                results[f"{precision} {kind} {weight:g}"] = found
    if lab.ranks.is_main:
        torch.save(results, output)


if __name__ == "__main__":
    main()
