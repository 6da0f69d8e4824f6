"""The one-sweep layer probe beside M + 1 plain forward passes, on the same blocks, in turns.

    python tools/bench_probe.py --model demo_data/model --corpus demo_data/general_probe.jsonl
    python tools/bench_probe.py --model demo_data/model --corpus demo_data/general_probe.jsonl --ranks 2

Prints both times, their ratio, the speed-up that counting operations predicts, and the largest difference between the
deltas of the two. One process, all cores; or ranks of one thread under ZeRO-3, where no parameter stays gathered and
the bytes that all-gathers moved are counted too, in a turn that is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_refresh import CountedBytes, on_ranks
from packed_corpus import packed_corpus

from adept_ds.data.blocks import Blocks
from adept_ds.data.mixture import Sample
from adept_ds.data.order import block_order, rank_batches
from adept_ds.models.device import resolve_precision
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.flops import count_step_flops
from adept_ds.probing.sweep import bypass_losses, install_layer_sweep
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.zero.build import EngineSettings, build_forward_engine
from adept_ds.zero.gathered import gather_layers_whole

STRICT_ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def predicted_speed_up(model: torch.nn.Module, model_dir: ModelDirectory, seq_len: int) -> float:
    """Operations of M + 1 forward passes over those of one sweep; either passes the head M + 1 times."""
    config: Any = model.config
    head, num_layers = 2.0 * config.hidden_size * config.vocab_size, model_dir.num_layers
    layer = (count_step_flops(model, model_dir.family, seq_len).forward - head) / num_layers
    plain = num_layers * (num_layers - 1) * layer + num_layers * layer + (num_layers + 1) * head
    sweep = (num_layers * (num_layers + 1) / 2 + num_layers - 1) * layer + (num_layers + 1) * head
    return plain / sweep


def plain_deltas(model: Any, layers: list[Any], blocks: Blocks, indices: list[int], ranks: Ranks) -> list[float]:
    """One forward pass per bypassed layer, and one of the whole model; every rank its share of the blocks."""
    mine = [index for batch in rank_batches(indices, ranks.rank, ranks.world_size, 1) for index in batch]
    losses = []
    with torch.no_grad():
        for bypassed in [None, *layers]:
            original = bypassed.forward if bypassed is not None else None
            if bypassed is not None:
                bypassed.forward = lambda hidden, *args, **kwargs: hidden
            losses.append(sum(float(model(*blocks.batch([index])).double().sum()) for index in mine))
            if bypassed is not None:
                bypassed.forward = original
    totals = ranks.sum(losses).tolist()
    return [(total - totals[0]) / blocks.predicted_tokens(indices) for total in totals[1:]]


def measure(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Both ways on this rank, in turns; seconds are those of the slowest rank."""
    model = ModelDirectory.read(arguments.model)
    settings = EngineSettings(STRICT_ZERO3, resolve_precision("auto"), ranks)

    def prepare(module: torch.nn.Module) -> None:
        install_layer_sweep(module, model.family, arguments.max_stack_tokens)
        gather_layers_whole(module, model.family.layer_modules(module))

    plain_model, device = build_forward_engine(settings, model)
    sweep_model, _ = build_forward_engine(settings, model, prepare)
    whole = getattr(plain_model, "module", plain_model)
    layers = list(model.family.layer_modules(whole))
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder)
        blocks = packed_corpus(arguments.corpus, arguments.model, arguments.seq_len, cache, ranks)

    def plain(indices: list[int]) -> list[float]:
        return plain_deltas(plain_model, layers, blocks, indices, ranks)

    def sweep(indices: list[int]) -> list[float]:
        sample = Sample(blocks, tuple(indices), (0,) * len(indices), (1.0,), ("",))
        losses = bypass_losses(sweep_model, model.num_layers, sample, ranks, micro_batch_size=1, device=device)
        totals = losses.sum(0).tolist()
        return [(total - totals[0]) / sum(sample.tokens()) for total in totals[1:]]

    ways = {"plain": plain, "sweep": sweep}
    order, per_turn = block_order(len(blocks), 0), arguments.blocks
    seconds, num_bytes, difference = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0), 0.0
    for turn in range(arguments.turns):
        deltas = {}
        for name, way in ways.items():
            start = time.perf_counter()
            deltas[name] = way(order[turn * per_turn : (turn + 1) * per_turn])
            seconds[name] += ranks.max(time.perf_counter() - start)[0]
        difference = max(difference, *(abs(a - b) for a, b in zip(deltas["plain"], deltas["sweep"], strict=True)))
    if arguments.ranks > 1:
        for name, way in ways.items():
            with CountedBytes() as counted:
                way(order[:per_turn])
            num_bytes[name] = counted.total
    predicted = predicted_speed_up(whole, model, arguments.seq_len)
    return {
        "layers": model.num_layers,
        "seconds": seconds,
        "bytes": num_bytes,
        "difference": difference,
        "predicted": predicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--corpus", type=Path, required=True, help="general-competence corpus")
    parser.add_argument("--blocks", type=int, default=2, help="blocks per turn, over all ranks")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--max-stack-tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        ranks = join(rank_from_environment(os.environ))
        result = measure(arguments, ranks)
        if ranks.is_main:
            print("RESULT " + json.dumps(result), flush=True)
        leave()
        return
    found = on_ranks(arguments.ranks, __file__) if arguments.ranks > 1 else measure(arguments, Ranks())
    seconds, moved = found["seconds"], found["bytes"]
    ratio = seconds["plain"] / seconds["sweep"]
    print(f"{found['layers'] + 1} plain forwards  {seconds['plain']:7.1f} s")
    print(f"one sweep           {seconds['sweep']:7.1f} s")
    print(f"speed-up            {ratio:7.2f} x  (operations predict {found['predicted']:.2f} x)")
    if arguments.ranks > 1:
        fewer = moved["plain"] / moved["sweep"]
        print(f"bytes in collectives {moved['plain']:,} and {moved['sweep']:,}: {fewer:.1f} x fewer")
    print(f"largest difference of a delta {found['difference']:.1e} nats")


if __name__ == "__main__":
    main()
