"""The one-sweep layer probe beside M + 1 plain forward passes, on the same blocks, measured in turns in one process.

    python tools/bench_probe.py --model demo_data/model --corpus demo_data/general_probe.jsonl

Prints both times, their ratio, the speed-up that counting operations predicts, and the largest difference between
the deltas of the two. One process, all cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adept_ds.data import Blocks, block_order, build_blocks
from adept_ds.families import family_of, layer_count
from adept_ds.flops import count_step_flops
from adept_ds.modeling import load_causal_lm
from adept_ds.probing import install_layer_sweep, probe_layers


def predicted_speed_up(model: torch.nn.Module, num_layers: int, seq_len: int, model_dir: Path) -> float:
    """Operations of M + 1 forward passes over those of one sweep; either passes the head M + 1 times."""
    config: Any = model.config
    head = 2.0 * config.hidden_size * config.vocab_size
    layer = (count_step_flops(model, family_of(model_dir), seq_len).forward - head) / num_layers
    plain = num_layers * (num_layers - 1) * layer + num_layers * layer + (num_layers + 1) * head
    sweep = (num_layers * (num_layers + 1) / 2 + num_layers - 1) * layer + (num_layers + 1) * head
    return plain / sweep


def plain_deltas(model: Any, layers: list[Any], blocks: Blocks, indices: list[int]) -> list[float]:
    """One forward pass per bypassed layer, and one of the whole model."""
    losses = []
    with torch.no_grad():
        for bypassed in [None, *layers]:
            original = bypassed.forward if bypassed is not None else None
            if bypassed is not None:
                bypassed.forward = lambda hidden, *args, **kwargs: hidden
            losses.append(sum(float(model(*blocks.batch([index])).double().sum()) for index in indices))
            if bypassed is not None:
                bypassed.forward = original
    tokens = blocks.predicted_tokens(indices)
    return [(loss - losses[0]) / tokens for loss in losses[1:]]


def timed(action: Callable[[], list[float]]) -> tuple[float, list[float]]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--corpus", type=Path, required=True, help="general-competence corpus")
    parser.add_argument("--blocks", type=int, default=2, help="blocks per turn")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--max-stack-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    family, num_layers = family_of(arguments.model), layer_count(arguments.model)
    plain_model = load_causal_lm(arguments.model, torch.float32).eval()
    sweep_model = load_causal_lm(arguments.model, torch.float32).eval()
    install_layer_sweep(sweep_model, family, arguments.max_stack_tokens)
    layers = list(family.layer_modules(plain_model))
    with tempfile.TemporaryDirectory() as folder:
        blocks = build_blocks(
            "corpus", [arguments.corpus], arguments.model, arguments.seq_len, Path(folder), keep_tail=False
        )
        order = block_order(len(blocks), 0)
        plain_seconds = sweep_seconds = difference = 0.0
        for turn in range(arguments.turns):
            indices = order[turn * arguments.blocks : (turn + 1) * arguments.blocks]

            def sweep(indices: list[int] = indices) -> list[float]:
                result = probe_layers(sweep_model, num_layers, blocks, indices, batch_size=1, device="cpu", k=1)
                return [layer.delta for layer in result.layers]

            seconds, expected = timed(lambda indices=indices: plain_deltas(plain_model, layers, blocks, indices))  # type: ignore[misc]
            plain_seconds += seconds
            seconds, deltas = timed(sweep)
            sweep_seconds += seconds
            difference = max(difference, *(abs(a - b) for a, b in zip(expected, deltas, strict=True)))
    predicted = predicted_speed_up(plain_model, num_layers, arguments.seq_len, arguments.model)
    print(f"{num_layers + 1} plain forwards  {plain_seconds:7.1f} s")
    print(f"one sweep           {sweep_seconds:7.1f} s")
    print(f"speed-up            {plain_seconds / sweep_seconds:7.2f} x  (operations predict {predicted:.2f} x)")
    print(f"largest difference of a delta {difference:.1e} nats")


if __name__ == "__main__":
    main()
