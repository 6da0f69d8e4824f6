"""A refresh of unit importances beside the way that gathers everything, on real ranks under ZeRO-3.

    python tools/bench_refresh.py --model demo_data/model --corpus demo_data/general_probe.jsonl --ranks 2

    adept     local slices of weights and gradients, one all-reduce of n_units numbers
    gathering safe_get_full_fp32_param and safe_get_full_grad of every trainable parameter, on every rank

Both follow the same forward and backward passes, with frozen weights kept gathered, as in training where memory is left
over. What comes after the passes is measured, in turns, and the passes themselves: whole, and with the frozen layers
below the lowest trained one replayed. What adept does beyond the passes is also what online importance adds to a
training step. Seconds are medians over turns, of the slowest rank. Bytes are those of all collectives that a rank took
part in, counted in a turn that is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adept_ds.config.loading import parse_config
from adept_ds.data.packing import build_blocks
from adept_ds.models.directory import family_of
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import init_distributed, max_over_ranks, rank, sum_over_ranks
from adept_ds.ranks.launchers import ranks_from_environment
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_sums import ProbeBatches, backward_global_batch, local_sums
from adept_ds.zero.build import build_training_engine
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import clear_probe_gradients, probing_gradients


class CountedBytes(TorchDispatchMode):
    """Bytes that collectives moved while the block ran: of each, its larger side (gathered, or reduced)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.total += max(sum(t.numel() * t.element_size() for t in _tensors(argument)) for argument in args)
        return func(*args, **(kwargs or {}))


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)] if isinstance(argument, list | tuple) else []


@dataclass
class Refresh:
    """One refresh: its result, and what it cost after each backward pass."""

    importance: list[float]
    passes_seconds: float
    seconds: float
    num_bytes: int


def gathered_sums(engine: Any, registry: UnitRegistry, parameters: Sequence[tuple[str, Any]]) -> torch.Tensor:
    """[n_units] float64: sums of |w * g| from full parameters and gradients; the same on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    sums = torch.zeros(len(registry), dtype=torch.float64)
    for name, parameter in parameters:
        weight, grad = safe_get_full_fp32_param(parameter), safe_get_full_grad(parameter)
        value = (weight.flatten() * grad.flatten()).abs_().sum(dtype=torch.float64)
        sums[registry.placements[name][0].first] += value.cpu()
    return sums


def refresh(
    engine: Any,
    registry: UnitRegistry,
    probe: ProbeBatches,
    *,
    gathering: bool = False,
    count: bool = False,
    prefix: FrozenPrefix | None = None,
) -> Refresh:
    """Counting slows down, so a refresh is either counted or timed."""
    parameters = [(name, p) for name, p in engine.module.named_parameters() if name in registry.placements]
    sums, counted, batches = torch.zeros(len(registry), dtype=torch.float64), CountedBytes(), probe.global_batches()
    start, collecting = time.perf_counter(), 0.0
    with probing_gradients(engine):
        for number in range(len(batches)):
            backward_global_batch(engine, probe, number, prefix)
            before = time.perf_counter()
            with counted if count else nullcontext():
                sums += (gathered_sums if gathering else local_sums)(engine, registry, parameters)
                if not gathering and number == len(batches) - 1:
                    sums = sum_over_ranks(sums)
            collecting += time.perf_counter() - before
            clear_probe_gradients(engine)
    importance = (sums / (registry.sizes * len(batches))).tolist()
    return Refresh(importance, time.perf_counter() - start - collecting, collecting, counted.total)


def on_ranks(ranks: int, script: str) -> dict[str, Any]:
    """Run this very command on real ranks of one thread; what rank 0 printed as RESULT {...}.

    They are given a --cache directory that they share.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [*launcher, script, *sys.argv[1:], "--cache", cache],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    line = next((line for line in result.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(result.stderr)
    return dict(json.loads(line.removeprefix("RESULT ")))


def run_rank(arguments: argparse.Namespace) -> None:
    """What each rank does; rank 0 prints the result as JSON."""
    init_distributed(ranks_from_environment(os.environ))
    layers = [int(layer) for layer in arguments.layers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config({"model": str(arguments.model), "run_dir": folder})
        blocks = build_blocks("corpus", [arguments.corpus], arguments.model, 256, arguments.cache, keep_tail=False)
        family = family_of(arguments.model)
        engine, _, registry = build_training_engine(config, arguments.model, family, layers)
    probe = ProbeBatches(blocks, tuple(range(arguments.blocks)), arguments.blocks, 2)
    ways = {"adept": False, "gathering": True}
    counted = {way: refresh(engine, registry, probe, gathering=full, count=True) for way, full in ways.items()}
    keep_frozen_gathered(engine, 1 << 40)
    prefix = FrozenPrefix(family.layer_modules(engine.module), min(layers), arguments.blocks)
    refresh(engine, registry, probe, prefix=prefix)
    pairs = zip(counted["adept"].importance, counted["gathering"].importance, strict=True)
    timed: dict[str, list[float]] = {way: [] for way in [*ways, "passes", "replayed"]}
    for _ in range(arguments.turns):
        for way, full in ways.items():
            one = refresh(engine, registry, probe, gathering=full)
            slowest, passes = max_over_ranks(one.seconds, one.passes_seconds)
            timed[way].append(slowest)
            timed["passes"].append(passes)
        timed["replayed"] += max_over_ranks(refresh(engine, registry, probe, prefix=prefix).passes_seconds)
    if rank() == 0:
        result = {
            "units": len(registry),
            "trained": int(registry.sizes.sum()),
            "difference": max(abs(mine / full - 1) for mine, full in pairs),
            "seconds": {way: statistics.median(values) for way, values in timed.items()},
            "bytes": {way: one.num_bytes for way, one in counted.items()},
        }
        print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--corpus", type=Path, required=True, help="general-competence corpus")
    parser.add_argument("--layers", default="5,12,14,17", help="layers that train")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of 256 tokens of one probe batch")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    found = on_ranks(arguments.ranks, __file__)
    seconds = found["seconds"]
    print(f"{found['trained'] / 1e6:.1f} M trained elements, {found['units']} units, {arguments.ranks} ranks, ZeRO-3")
    print(f"forward and backward passes {seconds['passes']:8.3f} s")
    print(f"the same, prefix replayed   {seconds['replayed']:8.3f} s")
    for way in ("adept", "gathering"):
        print(f"beyond that, {way:<14} {seconds[way]:8.3f} s   {found['bytes'][way]:12,} bytes")
    print(f"largest relative difference of an importance {found['difference']:.1e}")


if __name__ == "__main__":
    main()
