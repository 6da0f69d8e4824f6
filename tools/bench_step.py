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
import time
from typing import Any

import torch

from adept_ds.models.family_table import FAMILIES
from adept_ds.ranks.collectives import init_distributed
from adept_ds.ranks.launchers import ranks_from_environment
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.engine import parameter_shapes

LAYERS = 16
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def build_engine(stage: int, granularity: Any, *, is_unit_wise: bool) -> tuple[Any, UnitLR | None]:
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, tie_word_embeddings=True, **SMOLLM2)
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    registry = build_registry(FAMILIES["llama"], parameter_shapes(model), range(LAYERS), granularity, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind: Any = UnitAdamW if is_unit_wise else torch.optim.AdamW
    ds_config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    options = {} if is_unit_wise else {"fused": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=kind(trainable, lr=1e-4, **options), config=ds_config)
    if not is_unit_wise:
        return engine, None
    units = UnitLR(engine, registry)
    units.set({name: 2.0 * (index + 1) / len(registry) for index, name in enumerate(registry.names)})
    return engine, units


def timed_step(engine: Any, tokens: torch.Tensor) -> float:
    """Seconds of `engine.step()` after a backward pass."""
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
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
    init_distributed(ranks_from_environment({}))
    torch.set_num_threads(arguments.threads)
    bare, _ = build_engine(arguments.zero, arguments.granularity, is_unit_wise=False)
    unit_wise, units = build_engine(arguments.zero, arguments.granularity, is_unit_wise=True)
    assert units is not None
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


if __name__ == "__main__":
    main()
