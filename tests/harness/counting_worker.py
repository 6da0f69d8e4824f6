"""What one rank counts: collectives of a refresh and of a sweep, and which layers have a backward pass.

Usage: python -m harness.counting_worker WORKSPACE OUTPUT WHAT, where WHAT is a function here. Rank 0 writes what
it found to OUTPUT (torch.save).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness.counting import Collectives
from harness.lab import Lab, training_engine
from harness.workspace import Workspace

from adept_ds.config.deepspeed import check_deepspeed_file
from adept_ds.data.mixture import Mixture
from adept_ds.data.training_data import TrainingData, step_batch
from adept_ds.probing.sweep import bypass_losses, install_layer_sweep
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.training.step import accumulate_gradient
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.importance import estimate_importance
from adept_ds.units.unit_sums import backward_global_batch
from adept_ds.zero.build import EngineSettings, build_forward_engine
from adept_ds.zero.engine import parameter_shapes, release
from adept_ds.zero.gathered import gather_layers_whole
from adept_ds.zero.gradients import clear_gradients, gradients_outside_training


def refresh(lab: Lab) -> dict[str, Any]:
    """Collectives of an estimate, and of its forward and backward passes alone."""
    config = lab.config(deepspeed=str(lab.strict_zero3()))
    engine, registry = training_engine(config, lab.expanded, lab.layers, lab.ranks, UnitAdamW)
    batches = lab.gradient_batches(config.train.micro_batch_size)
    with Collectives() as whole:
        estimate_importance(engine, registry, batches, lab.ranks)
    with Collectives() as passes, gradients_outside_training(engine):
        for number in range(len(batches.global_batches())):
            backward_global_batch(engine, batches, number, lab.ranks)
            clear_gradients(engine)
    release(engine)
    return {"whole": whole.seen, "passes": passes.seen, "units": len(registry)}


def sweep(lab: Lab) -> dict[str, Any]:
    """What is gathered by a sweep of several batches: the stack in one chunk, in many, and layers not as a whole."""
    settings = EngineSettings(check_deepspeed_file(lab.strict_zero3()), torch.float32, lab.ranks)
    source, sample, found = lab.source, Mixture.of([lab.general]).sample(6, seed=0), dict[str, Any]()
    for name, chunk in {"one chunk": 1 << 20, "many chunks": 24, "each projection apart": 24}.items():

        def prepare(model: torch.nn.Module, name: str = name, chunk: int = chunk) -> None:
            install_layer_sweep(model, source.family, chunk)
            if name != "each projection apart":
                gather_layers_whole(model, source.family.layer_modules(model))

        model, device = build_forward_engine(settings, source, prepare)
        with Collectives() as counted:
            bypass_losses(model, source.num_layers, sample, lab.ranks, micro_batch_size=1, device=device)
        found[name] = counted.gathered()
        shapes = parameter_shapes(model.module)
        release(model)
    return found | {"shapes": shapes, "batches": 6 // lab.ranks.world_size}


def backward(lab: Lab) -> dict[str, Any]:
    """For each layer, whether what leaves it has a gradient during a training step."""
    found: dict[str, Any] = {"lowest": min(lab.layers)}
    for name, recompute in (("plain", False), ("recomputed", True)):
        config = lab.config(train={"activation_checkpointing": recompute})
        engine, _ = training_engine(config, lab.expanded, lab.layers, lab.ranks, UnitAdamW)
        leaves = found[name] = dict[int, bool]()
        for index, layer in enumerate(lab.expanded.family.layer_modules(engine.module)):

            def note(_: Any, inputs: Any, output: Any, index: int = index, leaves: dict[int, bool] = leaves) -> None:
                leaves[index] = output.requires_grad

            layer.register_forward_hook(note)
        data = TrainingData(lab.domain)
        accumulate_gradient(engine, step_batch(data, 0, config.train, lab.ranks))
        release(engine)
    return found


def main() -> None:
    workspace, output, what = Workspace(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    lab = Lab(workspace, output.parent, join(rank_from_environment(os.environ)))
    found = {"refresh": refresh, "sweep": sweep, "backward": backward}[what](lab)
    if lab.ranks.is_main:
        torch.save(found, output)


if __name__ == "__main__":
    main()
