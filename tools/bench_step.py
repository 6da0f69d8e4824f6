"""What unit-wise learning rates cost in `engine.step()`, beside the bare fused AdamW in the same DeepSpeed engine.

    python tools/bench_step.py --granularity matrix
    python tools/bench_step.py --granularity fine --zero 2

Sixteen trainable Llama layers of SmolLM2's size: 57 M elements, 144 units at `matrix`, 24,800 at `fine`, each with
another multiplier. Steps of both engines alternate on one rank, so that both see the same machine; the median of
paired ratios is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import Granularity, build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import Engine, parameter_shapes

LAYERS = 16
ONE_SEQUENCE = StepShape(global_batch_size=1, micro_batch_size=1, accumulation_steps=1, clip_grad_norm=1.0)
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def write_model(folder: Path) -> ModelDirectory:
    """Random weights of that size, with next to no vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, tie_word_embeddings=True, **SMOLLM2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelDirectory.read(folder)


def build_bare(settings: EngineSettings, model: ModelDirectory) -> Engine:
    """An engine in which every element has the same learning rate."""

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    return build_training_engine(settings, model, layers_train(model.family, range(LAYERS)), optimizer, ONE_SEQUENCE)


def build_unit_wise(settings: EngineSettings, model: ModelDirectory, granularity: Granularity) -> tuple[Engine, UnitLR]:
    """The same, with another multiplier for every unit."""

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return UnitAdamW(parameters, lr=1e-4)

    engine = build_training_engine(settings, model, layers_train(model.family, range(LAYERS)), optimizer, ONE_SEQUENCE)
    shapes = parameter_shapes(engine.module)
    registry = build_registry(model.family, shapes, range(LAYERS), granularity, engine.module.config)
    units = UnitLR(engine, registry, ranks=settings.ranks)
    units.set({name: 2.0 * (index + 1) / len(registry) for index, name in enumerate(registry.names)})
    return engine, units


def timed_step(engine: Engine, tokens: torch.Tensor) -> float:
    """Seconds of `engine.step()` after a backward pass."""
    engine.backward(engine(tokens, tokens).sum())
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--granularity", choices=["matrix", "module", "fine"], default="matrix")
    parser.add_argument("--zero", type=int, choices=[1, 2, 3], default=3, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    ranks = join(rank_from_environment({}))
    torch.set_num_threads(arguments.threads)
    settings = EngineSettings({"zero_optimization": {"stage": arguments.zero}}, torch.float32, ranks)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        bare = build_bare(settings, model)
        unit_wise, units = build_unit_wise(settings, model, arguments.granularity)
    tokens = torch.arange(8).unsqueeze(0)
    for engine in (bare, unit_wise):
        timed_step(engine, tokens)
    pairs = [(timed_step(bare, tokens), timed_step(unit_wise, tokens)) for _ in range(arguments.steps)]
    ratio = statistics.median(unit / plain for plain, unit in pairs)
    elements = int(units.registry.sizes.sum())
    print(f"{elements / 1e6:.1f} M trainable elements, {len(units.registry)} units, ZeRO-{arguments.zero}, 1 rank")
    print(f"bare fused AdamW   {statistics.median(plain for plain, _ in pairs) * 1e3:7.1f} ms")
    print(f"unit-wise          {statistics.median(unit for _, unit in pairs) * 1e3:7.1f} ms")
    print(f"median of paired ratios {ratio:.3f}  (share spent on multipliers {max(0.0, 1 - 1 / ratio):.1%})")
    share = units.map_bytes / (8 * elements)
    print(f"map from elements to units: {units.map_bytes / 1024:.0f} KiB, {share:.4%} of the optimizer's state")
    leave()


if __name__ == "__main__":
    main()
