"""Expanding a large checkpoint beside copying it: seconds and peak memory.

    python tools/bench_expand.py --gib 4 --shard-gib 1

Writes a synthetic Llama checkpoint of random bf16 weights with a tiny vocabulary below --folder, then in turns copies
it with `cp -r` and expands it with `adept expand` (every eighth layer), each into a new directory on the same disk.
Peak memory is that of the process, as the kernel counts it (resident pages).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

DIM, MLP, VOCABULARY = 2048, 8192, 256
SHAPES = {
    **{f"self_attn.{name}_proj.weight": (DIM, DIM) for name in "qkvo"},
    "mlp.gate_proj.weight": (MLP, DIM),
    "mlp.up_proj.weight": (MLP, DIM),
    "mlp.down_proj.weight": (DIM, MLP),
    "input_layernorm.weight": (DIM,),
    "post_attention_layernorm.weight": (DIM,),
}
LAYER_BYTES = 2 * sum(rows * (columns[0] if columns else 1) for rows, *columns in SHAPES.values())


def random_weights(*shape: int) -> torch.Tensor:
    """Any bits: nothing is computed with them."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def write_checkpoint(folder: Path, layers: int, layers_per_shard: int) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": DIM,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards = [range(first, min(first + layers_per_shard, layers)) for first in range(0, layers, layers_per_shard)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        tensors = dict(_shard_tensors(shard, is_last=number == len(shards)))
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": layers * LAYER_BYTES}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_tensors(layers: range, *, is_last: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in layers:
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}", random_weights(*shape)
    if is_last:
        yield "model.embed_tokens.weight", random_weights(VOCABULARY, DIM)
        yield "model.norm.weight", random_weights(DIM)


_MEASURE = """
import json, os, sys, time
start = time.perf_counter()
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(child, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss * 1024, status]))
"""
"""Run by a small process of its own: the kernel counts what a parent held when it started a child as the child's."""


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    result = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *command], stdout=subprocess.PIPE, check=True)
    seconds, peak, status = json.loads(result.stdout)
    if status:
        sys.exit(f"{command[0]} failed")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--shard-gib", type=float, default=1.0, help="size of a shard; more than --gib: one file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to work, on the disk that is to be measured")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    layers = max(8, round(arguments.gib * 2**30 / LAYER_BYTES))
    per_shard = max(1, min(layers, round(arguments.shard_gib * 2**30 / LAYER_BYTES)))
    copied = ",".join(str(layer) for layer in range(4, layers, 8))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        write_checkpoint(source, layers, per_shard)
        os.sync()
        sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
        commands = {
            "cp -r": ["cp", "-r", str(source), str(target)],
            "adept expand": [sys.executable, "-m", "adept_ds", "expand", str(source), str(target), "--layers", copied],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory: dict[str, int] = {}
        written = {}
        for _ in range(arguments.turns):
            for name, command in commands.items():
                took, memory[name] = measured(command)
                seconds[name].append(took)
                written[name] = sum(file.stat().st_size for file in target.glob("*.safetensors"))
                shutil.rmtree(target)
                os.sync()
    gib, mib = 2**30, 2**20
    print(f"{sum(sizes) / gib:.2f} GiB in {len(sizes)} files, the largest {max(sizes) / gib:.2f} GiB; copied {copied}")
    for name in commands:
        took = statistics.median(seconds[name])
        size, peak = written[name] / gib, memory[name] / mib
        print(f"{name:<14} {took:6.2f} s   wrote {size:.2f} GiB   peak memory {peak:6.0f} MiB")
    pairs = zip(seconds["adept expand"], seconds["cp -r"], strict=True)
    print(f"ratio (median of pairs) {statistics.median(mine / plain for mine, plain in pairs):.2f}")


if __name__ == "__main__":
    main()
