"""What one rank does in the tests of test_engine.py: several small trainings in one process group.

Usage: python tests/worker.py WORKSPACE OUTPUT. Rank 0 writes what it found to OUTPUT (torch.save).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import ROOT, Workspace
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from adept_ds.base.errors import UnitMismatchError
from adept_ds.base.files import write_json
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.data.blocks import TrainingData
from adept_ds.data.order import block_order
from adept_ds.data.packing import build_blocks
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import gather_objects, init_distributed, on_main_rank, rank
from adept_ds.ranks.launchers import ranks_from_environment
from adept_ds.training.step import take_step
from adept_ds.units.importance import OnlineImportance, estimate_importance
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import ProbeBatches
from adept_ds.weights.expansion import expand_checkpoint
from adept_ds.zero.build import build_training_engine
from adept_ds.zero.engine import release, zero_stage
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import loss_scale, set_loss_scale
from adept_ds.zero.layout import partition_layout

FAMILY = FAMILIES["llama"]
STEPS = 5


@dataclasses.dataclass
class Outcome:
    """What a small training left behind."""

    losses: list[float]
    trained: dict[str, torch.Tensor]
    frozen_hash: str
    importances: list[list[float]]
    units: list[str]
    """Names, in the order of each list of importances."""
    cut_rows: int
    """Parameters of which this rank's slice begins inside a row."""
    kept: tuple[int, int]
    """Bytes of frozen parameters that stayed gathered, and of all frozen parameters."""
    gathered_again: int
    """Parameters among those that stayed gathered that lie elsewhere at the end."""
    lowest_runs: int
    """Forward passes of layer 0, which is frozen."""


class Lab:
    """The expanded tiny model and its data, for trainings that differ in their settings only."""

    def __init__(self, workspace: Workspace, scratch: Path) -> None:
        self.workspace, self.scratch = workspace, scratch
        self.expanded = scratch / "expanded"
        expansion = on_main_rank(lambda: expand_checkpoint(workspace.model, self.expanded, [1, 3]))
        self.layers = expansion.copy_indices
        base = self.config()
        cache = scratch / "blocks"
        self.domain = build_blocks("d", base.data.domain, workspace.model, 32, cache, keep_tail=False)
        self.general = build_blocks("g", base.probe.corpus, workspace.model, 24, cache, keep_tail=True)
        self.replay = build_blocks("r", base.probe.corpus, workspace.model, 32, cache, keep_tail=False)

    def config(self, **sections: Any) -> Config:
        return parse_config(self.workspace.tree(self.scratch / "run", **sections))

    def deepspeed_file(self, name: str, **zero_optimization: Any) -> Path:
        path = self.scratch / f"{name}.json"
        on_main_rank(lambda: write_json(path, {"zero_optimization": zero_optimization}))
        return path

    def strict_zero3(self) -> Path:
        """ZeRO-3 that keeps nothing gathered by itself; by default every parameter of a tiny model is small enough."""
        return self.deepspeed_file("strict", stage=3, stage3_param_persistence_threshold=0)

    def probe(self, micro_batch_size: int) -> ProbeBatches:
        return ProbeBatches(self.general, tuple(block_order(len(self.general), 0)[:7]), 5, micro_batch_size)

    def train(
        self,
        config: Config,
        *,
        probe_after: Iterable[int] = (),
        probe_within: Iterable[int] = (),
        multipliers: dict[str, float] | None = None,
        refresh: bool = False,
        keep_bytes: int = 0,
        cached_batches: int = 0,
    ) -> Outcome:
        """STEPS optimizer steps; importances are estimated after those in `probe_after`, and used if `refresh`.

        In `probe_within` they are also estimated between the micro-batches of a step.
        After the first, up to `keep_bytes` of frozen parameters stay gathered. What the frozen layers below compute
        for `cached_batches` of the probe's micro-batches is computed once.
        """
        engine, optimizer, registry = build_training_engine(config, self.expanded, FAMILY, self.layers)
        unit_lr = UnitLR(engine, registry, config.lr_policy)
        if multipliers is not None:
            unit_lr.set(multipliers)
        losses, importances, kept = [], [], (0, 0)
        layers = FAMILY.layer_modules(engine.module)
        prefix = FrozenPrefix(layers, min(self.layers), cached_batches)
        lowest_runs = 0

        def count(*_: Any) -> None:
            nonlocal lowest_runs
            lowest_runs += 1

        layers[0].self_attn.register_forward_hook(count)
        addresses: dict[Any, int] = {}
        online = OnlineImportance(engine, registry) if config.importance.source == "online" else None
        data = TrainingData(self.domain, self.replay if config.replayed else None, config.replayed)
        whole_step, probe = engine.step, self.probe(config.train.micro_batch_size)

        def step_and_probe() -> None:
            whole_step()
            if step in probe_within and engine.micro_steps % engine.gradient_accumulation_steps():
                importances.append(estimate_importance(engine, registry, probe))

        engine.step = step_and_probe
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3
            losses.append(sum(take_step(engine, data, step, config.train, online)))
            if step == 0 and keep_bytes:
                partitions = {p: p.ds_tensor.clone() for p in engine.module.parameters()}
                kept = keep_frozen_gathered(engine, keep_bytes)
                assert all(torch.equal(p.ds_tensor, partition) for p, partition in partitions.items())
                whole = [p for p in engine.module.parameters() if not p.requires_grad and p.shape == p.ds_shape]
                assert sum(parameter.numel() * parameter.element_size() for parameter in whole) == kept[0]
                addresses = {parameter: parameter.data_ptr() for parameter in whole}
            if step in probe_after:
                estimate = online.take() if online else estimate_importance(engine, registry, probe, prefix=prefix)
                importances.append(estimate)
                if refresh:
                    unit_lr.refresh(importances[-1])
        gathered_again = sum(parameter.data_ptr() != address for parameter, address in addresses.items())
        outcome = self._outcome(engine, losses, importances, registry.names, kept, gathered_again, lowest_runs)
        release(engine)
        return outcome

    def _outcome(
        self,
        engine: Any,
        losses: list[float],
        importances: list[list[float]],
        units: list[str],
        kept: tuple[int, int],
        gathered_again: int,
        lowest_runs: int,
    ) -> Outcome:
        import deepspeed

        cut = 0
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters()}
        for partition in partition_layout(engine):
            cut += sum(
                len(shapes[p.parameter]) == 2 and p.param_start % shapes[p.parameter][1] for p in partition.pieces
            )
        parameters = dict(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero_stage(engine) == 3):
            values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        digest = hashlib.sha256()
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                digest.update(values[name].float().numpy().tobytes())
        trained = {name: values[name] for name, parameter in parameters.items() if parameter.requires_grad}
        return Outcome(losses, trained, digest.hexdigest(), importances, units, cut, kept, gathered_again, lowest_runs)

    def source_importance(self, config: Config) -> dict[str, float]:
        """Of the layers that are copied, as a run estimates it before the first step."""
        engine, _, registry = build_training_engine(config, self.workspace.model, FAMILY, [1, 3], plain_sgd=True)
        importance = estimate_importance(engine, registry, self.probe(config.train.micro_batch_size))
        release(engine)
        return dict(zip(registry.names, importance, strict=True))

    def misplaced_share(self, config: Config) -> float:
        """How far the first step of any master weight is from its unit's multiplier times the step it takes with 1.

        Largest over all elements and ranks, as a share of the learning rate, which is about the size of a first step.
        """
        moved: dict[str, list[torch.Tensor]] = {}
        for run in ("whole", "shared"):
            engine, optimizer, registry = build_training_engine(config, self.expanded, FAMILY, self.layers)
            unit_lr = UnitLR(engine, registry, config.lr_policy)
            values = {name: 0.1 * (index % 21) for index, name in enumerate(registry.names)}
            if run == "shared":
                unit_lr.set(values)
            optimizer.param_groups[0]["lr"] = 3e-3
            layout = partition_layout(engine)
            before = [partition.tensor.detach().clone() for partition in layout]
            take_step(engine, TrainingData(self.domain), 0, config.train, None)
            moved[run] = [p.tensor.detach() - old for p, old in zip(layout, before, strict=True)]
            release(engine)
        factors, worst = torch.tensor(list(values.values())), 0.0
        for partition, whole, shared in zip(layout, moved["whole"], moved["shared"], strict=True):
            for piece in partition.pieces:
                run_of = slice(piece.flat_start, piece.flat_start + piece.numel)
                for tile in registry.tiles(piece.parameter, piece.param_start, piece.param_start + piece.numel):
                    expected = tile.view(whole[run_of]) * tile.spread(factors)
                    worst = max(worst, float((tile.view(shared[run_of]) - expected).abs().max()))
        assert max(float(move.abs().max()) for move in moved["shared"]) > 1e-3
        return max(gather_objects(worst)) / 3e-3

    def overflowing(self, config: Config) -> dict[str, Any]:
        """Estimates in fp16 with a right loss scale, and with one so large that gradients overflow; then a step."""
        engine, _, registry = build_training_engine(config, self.workspace.model, FAMILY, [1, 3])
        UnitLR(engine, registry)
        probe, importances = self.probe(config.train.micro_batch_size), []
        for scale in (2.0**10, 2.0**40):
            set_loss_scale(engine, scale)
            importances.append(dict(zip(registry.names, estimate_importance(engine, registry, probe), strict=True)))
        scale_after = loss_scale(engine)
        before = [partition.tensor.detach().clone() for partition in partition_layout(engine)]
        take_step(engine, TrainingData(self.domain), 0, config.train, None)
        after = [partition.tensor for partition in partition_layout(engine)]
        moved = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        release(engine)
        return {"importances": importances, "scale_after": scale_after, "moved": moved}

    def disagreement(self) -> str:
        """What the check says when rank 1 holds another multiplier."""
        config = self.config()
        engine, _, registry = build_training_engine(config, self.expanded, FAMILY, self.layers)
        unit_lr = UnitLR(engine, registry, config.lr_policy)
        try:
            unit_lr.set({registry.names[4]: 0.5} if rank() == 1 else {})
        except UnitMismatchError as error:
            return str(error)
        finally:
            release(engine)
        return ""


def main() -> None:
    workspace, output = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    init_distributed(ranks_from_environment(os.environ))
    lab = Lab(workspace, output.parent)
    plain = lab.config()
    recompute = lab.config(train={"activation_checkpointing": True})
    strict, strict_recompute = (c.model_copy(update={"deepspeed": lab.strict_zero3()}) for c in (plain, recompute))
    silent = {"layers.2.mlp.up_proj": 0.0, "layers.2.input_layernorm": 0.0, "layers.5.self_attn.q_proj": 0.0}
    results: dict[str, Any] = {
        "plain": lab.train(plain),
        "probed": lab.train(plain, probe_after=(0, 1, 3)),
        "recomputed": lab.train(recompute),
        "recomputed_probed": lab.train(recompute, probe_after=(0, 1, 3)),
        "kept": lab.train(strict, probe_after=(0, 1, 3), keep_bytes=1 << 30),
        "kept_in_part": lab.train(strict_recompute, probe_after=(0, 1, 3), keep_bytes=40_000),
        "cached": lab.train(strict, probe_after=(0, 1, 3), cached_batches=100),
        "cached_in_part": lab.train(recompute, probe_after=(0, 1, 3), cached_batches=2),
        "silent": lab.train(plain, multipliers=silent),
        "silent_units": list(silent),
        "recomputed_within": lab.train(recompute, probe_within=(0, 1, 4)),
        "disagreement": lab.disagreement(),
        "expanded": str(lab.expanded),
    }
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        config = lab.config(deepspeed=str(ROOT / "ds_configs" / f"{name}.json"))
        results[name] = lab.train(config, probe_after=(0, 2), refresh=True)
        results[f"{name} within"] = lab.train(config, probe_after=(0, 2), refresh=True, probe_within=(0, 1, 4))
    replayed = {"replay": [str(workspace.root / "general.jsonl")], "replay_share": 1 / 3}
    for name in ("zero2", "zero3"):
        config = lab.config(
            deepspeed=str(ROOT / "ds_configs" / f"{name}.json"),
            data=replayed,
            importance={"source": "online"},
            train={"precision": "bf16"},
        )
        results[f"bf16 online {name}"] = lab.train(config, probe_after=(1, 3))
        results[f"bf16 online {name} within"] = lab.train(config, probe_after=(1, 3), probe_within=(0, 2))
    # DeepSpeed takes fp16 on a CPU for unsupported where it would be slow.
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True):
        for name, precision in itertools.product(("zero1", "zero2", "zero3", "zero3_offload"), ("bf16", "fp16")):
            config = lab.config(
                deepspeed=str(ROOT / "ds_configs" / f"{name}.json"),
                importance={"granularity": "fine"},
                train={"precision": precision},
            )
            results[f"{precision} {name}"] = lab.misplaced_share(config)
        for name in ("zero2", "zero3"):
            path = str(ROOT / "ds_configs" / f"{name}.json")
            results[f"overflow {name}"] = lab.overflowing(lab.config(deepspeed=path, train={"precision": "fp16"}))
    results["source importance"] = lab.source_importance(plain)
    results["second_rank_cut_rows"] = gather_objects(results["plain"].cut_rows)[1]
    if rank() == 0:
        torch.save({k: dataclasses.asdict(v) if isinstance(v, Outcome) else v for k, v in results.items()}, output)


if __name__ == "__main__":
    main()
