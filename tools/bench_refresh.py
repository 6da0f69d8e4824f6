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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packed_corpus import packed_corpus
from torch.utils._python_dispatch import TorchDispatchMode

from adept_ds.config.deepspeed import check_deepspeed_file
from adept_ds.models.device import resolve_precision
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.models.loading import layers_train
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.unit_sums import GradientBatches, UnitSums, backward_global_batch
from adept_ds.zero.build import EngineSettings, build_training_engine
from adept_ds.zero.engine import Engine, parameter_shapes
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import clear_gradients, gradients_outside_training

SEQ_LEN, MICRO_BATCH = 256, 2


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


def gathered_sums(engine: Engine, registry: UnitRegistry) -> torch.Tensor:
    """[n_units] float64: sums of |w * g| from full parameters and gradients; the same on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    sums = torch.zeros(len(registry), dtype=torch.float64)
    for name, parameter in engine.module.named_parameters():
        if name not in registry.placements:
            continue
        weight, grad = safe_get_full_fp32_param(parameter), safe_get_full_grad(parameter)
        value = (weight.flatten() * grad.flatten()).abs_().sum(dtype=torch.float64)
        sums[registry.placements[name][0].first] += value.cpu()
    return sums


@dataclass(frozen=True)
class Estimate:
    """What a refresh works on."""

    engine: Engine
    registry: UnitRegistry
    batches: GradientBatches
    ranks: Ranks

    def refresh(self, *, gathering: bool = False, count: bool = False, prefix: FrozenPrefix | None = None) -> Refresh:
        """Counting slows down, so a refresh is either counted or timed."""
        engine, registry = self.engine, self.registry
        unit_sums, num_batches = UnitSums(engine, registry, self.ranks), len(self.batches.global_batches())
        sums, counted = torch.zeros(len(registry), dtype=torch.float64), CountedBytes()
        start, collecting = time.perf_counter(), 0.0
        with gradients_outside_training(engine):
            for number in range(num_batches):
                backward_global_batch(engine, self.batches, number, self.ranks, prefix)
                before = time.perf_counter()
                with counted if count else nullcontext():
                    sums += gathered_sums(engine, registry) if gathering else unit_sums.local()
                    if not gathering and number == num_batches - 1:
                        sums = self.ranks.sum(sums)
                collecting += time.perf_counter() - before
                clear_gradients(engine)
        importance = (sums / (registry.sizes * num_batches)).tolist()
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
    ranks = join(rank_from_environment(os.environ))
    layers = [int(layer) for layer in arguments.layers.split(",")]
    model = ModelDirectory.read(arguments.model)
    blocks = packed_corpus(arguments.corpus, arguments.model, SEQ_LEN, arguments.cache, ranks)
    settings = EngineSettings(check_deepspeed_file(None), resolve_precision("auto"), ranks)
    engine = build_training_engine(settings, model, layers_train(model.family, layers))
    registry = build_registry(model.family, parameter_shapes(engine.module), layers, config=engine.module.config)
    batches = GradientBatches(blocks, tuple(range(arguments.blocks)), arguments.blocks, MICRO_BATCH)
    estimate = Estimate(engine, registry, batches, ranks)
    ways = {"adept": False, "gathering": True}
    counted = {way: estimate.refresh(gathering=full, count=True) for way, full in ways.items()}
    keep_frozen_gathered(engine, 1 << 40)
    prefix = FrozenPrefix(model.family.layer_modules(engine.module), min(layers), arguments.blocks)
    estimate.refresh(prefix=prefix)
    pairs = zip(counted["adept"].importance, counted["gathering"].importance, strict=True)
    timed: dict[str, list[float]] = {way: [] for way in [*ways, "passes", "replayed"]}
    for _ in range(arguments.turns):
        for way, full in ways.items():
            one = estimate.refresh(gathering=full)
            slowest, passes = ranks.max(one.seconds, one.passes_seconds)
            timed[way].append(slowest)
            timed["passes"].append(passes)
        timed["replayed"] += ranks.max(estimate.refresh(prefix=prefix).passes_seconds)
    if ranks.is_main:
        result = {
            "units": len(registry),
            "trained": int(registry.sizes.sum()),
            "difference": max(abs(mine / full - 1) for mine, full in pairs),
            "seconds": {way: statistics.median(values) for way, values in timed.items()},
            "bytes": {way: one.num_bytes for way, one in counted.items()},
        }
        print("RESULT " + json.dumps(result), flush=True)
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--corpus", type=Path, required=True, help="general-competence corpus")
    parser.add_argument("--layers", default="5,12,14,17", help="layers that train")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4, help=f"blocks of {SEQ_LEN} tokens of one probe batch")
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
