"""Which families a table has at every commit where a family costs more than a moment; `make test-slow` has all."""

from __future__ import annotations

from typing import Any

from harness.marks import slow
from harness.models import FAMILY_OPTIONS

REPRESENTATIVES = {
    "gemma3_text",  # norms behind sublayers, sliding windows, tied embeddings
    "gpt2",  # transposed weights, names of its own
    "gpt_neox",  # parallel residuals, fused projections
    "llama",
    "qwen2_moe",  # experts, layers without them
}

MOSTLY_SLOW_FAMILIES: list[Any] = [name if name in REPRESENTATIVES else slow(name) for name in sorted(FAMILY_OPTIONS)]
