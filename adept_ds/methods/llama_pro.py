"""LLaMA-Pro (Wu et al., ACL 2024, arXiv 2401.02415): copies at even distances, trained at one learning rate.

The decoder is cut into `expand.k` groups of consecutive layers, and each group's top layer gets a silent copy above it
(section 3.2). Only the copies train, all of their parameters alike. It departs from the original in nothing but the
schedule and the data, which are the configuration's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from adept_ds.methods.shape import Method


class LlamaPro(Method):
    """Evenly spread copies at a uniform rate."""

    name: Literal["llama_pro"] = "llama_pro"

    starts_from = "expanded"
    sections = frozenset({"expand", "anchor"})
    presets: ClassVar = {"expand": {"choose": "uniform"}, "lr_policy": {"map": "constant"}}
