"""How often a device is spoken to in one optimizer step and in one look at importances: counts, not times.

    python tools/bench_counts.py

    before  views of partitions, one fused call per distinct multiplier, and clone, step and lerp per matrix of rows or
            columns, with indices of units on the host; sums fetched from the device matrix by matrix
    now     one pass over a partition, as a Triton kernel or in PyTorch's operations; sums fetched once

Operator calls are those that torch.profiler sees on one rank under ZeRO-3 (see `launches`), on a GPU each is a launch;
the kernel, which a CPU cannot run, is one more. A CPU takes the step of `before` still, in chunks that fit its cache.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_step import ONE_SEQUENCE, SMOLLM2
from launches import Launches, launches

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import Granularity, UnitRegistry, build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import UnitSums, weight_times_grad
from adept_ds.zero.build import EngineSettings, build_training_engine
from adept_ds.zero.engine import Engine, client_optimizer, parameter_shapes, release
from adept_ds.zero.gradients import local_weight_and_grad
from adept_ds.zero.layout import partition_layout


@dataclass(frozen=True)
class Case:
    """A model of random weights, all layers of which train."""

    what: str
    layers: int
    granularity: Granularity
    experts: int = 0


CASES = [
    Case("4 layers of SmolLM2's size", 4, "matrix"),
    Case("4 layers of 16 experts", 4, "matrix", experts=16),
    Case("16 layers of SmolLM2's size", 16, "fine"),
]


def write_model(case: Case, folder: Path) -> ModelDirectory:
    """With next to no vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": case.layers, "tie_word_embeddings": True}
    if case.experts:
        config = Qwen3MoeConfig(
            **shared,
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_experts=case.experts,
            num_experts_per_tok=4,
        )
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**shared, **SMOLLM2)).save_pretrained(folder)
    return ModelDirectory.read(folder)


def build(case: Case, ranks: Ranks) -> tuple[Engine, UnitRegistry]:
    """An engine in which every unit has another multiplier."""
    settings = EngineSettings({"zero_optimization": {"stage": 3}}, torch.float32, ranks)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(case, Path(folder))
        trains = layers_train(model.family, range(case.layers))
        engine = build_training_engine(settings, model, trains, lambda p: UnitAdamW(p, lr=1e-4), ONE_SEQUENCE)
    shapes = parameter_shapes(engine.module)
    registry = build_registry(model.family, shapes, range(case.layers), case.granularity, engine.module.config)
    units = UnitLR(engine, registry, ranks=ranks)
    units.set({name: 2.0 * (index + 1) / len(registry) for index, name in enumerate(registry.names)})
    return engine, registry


def backward(engine: Engine) -> None:
    tokens = torch.arange(8).unsqueeze(0)
    engine.backward(engine(tokens, tokens).sum())


def count_step(engine: Engine, registry: UnitRegistry, way: str) -> Launches:
    """Of the optimizer, in one `engine.step()`; a first one makes its state."""
    optimizer, total = client_optimizer(engine), Launches()
    assert isinstance(optimizer, UnitAdamW)
    step, optimizer.one_pass = optimizer.step, way != "views"

    def counted() -> None:
        with launches() as found:
            step()
        total.add(found)

    def kernel(*_: Any) -> None:
        total.operators["the kernel"] += 1

    with ExitStack() as stack:
        stack.enter_context(mock.patch("adept_ds.units.adamw._CPU_CHUNK", 1 << 62))
        if way == "kernel":
            stack.enter_context(mock.patch("adept_ds.units.one_pass.by_kernel", return_value=kernel))
        for take in (step, counted):
            backward(engine)
            optimizer.step = take  # type: ignore[assignment, method-assign]
            engine.step()
    optimizer.step = step  # type: ignore[method-assign]
    if way == "views":
        for lines in index_sizes(engine, registry):
            total.copies += 1
            total.copied_bytes += 8 * lines
    return total


def index_sizes(engine: Engine, registry: UnitRegistry) -> list[int]:
    """How many indices were copied to the device for each matrix of rows or columns."""
    return [
        len(tile.units)
        for partition in partition_layout(engine)
        for fragment in partition.fragments
        for part, first, last, _ in registry.parts(fragment.parameter, fragment.param_start, fragment.param_stop)
        if part.axis is not None
        for tile in part.tiles(first, last)
    ]


def sums_before(engine: Engine, registry: UnitRegistry) -> None:
    """What `UnitSums.local` was on a device; what the host did with the sums is left out."""
    for name, parameter in engine.module.named_parameters():
        found = local_weight_and_grad(engine, parameter) if name in registry.placements else None
        if found is not None:
            weight, grad, start = found
            values = weight_times_grad(weight, grad)
            for tile in registry.tiles(name, start, start + values.numel()):
                tile.view(values).sum(1 - tile.axis, dtype=torch.float64).cpu()


def count(look: Callable[[], object]) -> Launches:
    """Of a look at the gradients that are there; a first one learns where everything lies."""
    look()
    with launches() as found:
        look()
    return found


def row(what: str, units: int, how: str, found: Launches) -> str:
    return f"{what:32}{units:>8,}  {how:<30}{found.total:>8,}{found.copies:>8,}{found.copied_bytes:>12,}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ranks = join(rank_from_environment({}))
    lines = [f"{'':32}{'units':>8}  {'':<30}{'calls':>8}{'copies':>8}{'bytes':>12}"]
    for case in CASES:
        engine, registry = build(case, ranks)
        units = len(registry)
        for way, how in (("views", "step, before"), ("kernel", "now: kernel"), ("operations", "now: operations")):
            lines.append(row(case.what, units, how, count_step(engine, registry, way)))
        backward(engine)
        sums = UnitSums(engine, registry, ranks)
        lines.append(row(case.what, units, "sums of a batch, before", count(partial(sums_before, engine, registry))))
        lines.append(row(case.what, units, "now", count(sums.local)))
        release(engine)
    print(*lines, sep="\n")
    leave()


if __name__ == "__main__":
    main()
