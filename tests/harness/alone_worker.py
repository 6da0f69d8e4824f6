"""What one rank does in test_unit_lr_alone.py: the example of docs/unit_lr.md, as it stands there.

Usage: python -m harness.alone_worker OUTPUT. Rank 0 writes final weights and multipliers by ZeRO stage to OUTPUT
(torch.save).
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import torch
from harness.launching import ROOT
from harness.models import TINY

from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment

STEPS = 4
STAGES = (2, 3)


def example() -> str:
    """The page's first Python block."""
    text = (ROOT / "docs" / "unit_lr.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    return found[1]


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY))


def batches_of(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 200, (2, 16), generator=generator) for _ in range(STEPS)]
    return [{"input_ids": rows, "labels": rows} for rows in tokens]


def run(stage: int, rank: int) -> dict[str, Any]:
    import deepspeed

    names: dict[str, Any] = {
        "model": tiny_model(),
        "batches": batches_of(rank),
        "ds_config": {
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    }
    exec(example(), names)
    parameters = dict(names["engine"].module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    names["engine"].destroy()
    return {"weights": weights, "multipliers": names["units"].multipliers}


def main() -> None:
    ranks = join(rank_from_environment(os.environ))
    found = {stage: run(stage, ranks.rank) for stage in STAGES}
    if ranks.is_main:
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
