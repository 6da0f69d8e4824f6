"""What copies are weighed against: parameters, and those that a token passes, from the headers of the weight files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.hf_directory import stored_tensors


@dataclass(frozen=True)
class ModelSize:
    """What copies are weighed against."""

    layer_parameters: tuple[int, ...]
    """Of each decoder layer."""
    other_parameters: int
    """Embeddings, head, last norm."""
    layer_passed: tuple[float, ...]
    """Parameters of each layer that one token passes: of experts those that it is sent to."""
    head_passed: int
    """The same of the output head."""
    attention_width: int = 0
    """Of all query heads together."""

    def trainable_share(self, layers: Sequence[int]) -> float:
        """Of the expanded model's parameters."""
        copies = sum(self.layer_parameters[layer] for layer in layers)
        return copies / (copies + sum(self.layer_parameters) + self.other_parameters)

    def added_latency(self, layers: Sequence[int]) -> float:
        """Time that copies of `layers` add to a forward pass, as a share of it, if time follows parameters passed."""
        return sum(self.layer_passed[layer] for layer in layers) / (sum(self.layer_passed) + self.head_passed)


def model_size(model: ModelDirectory) -> ModelSize:
    """From config.json and the headers of the weight files."""
    from transformers import AutoConfig

    from adept_ds.models.flops import attention_width

    family = model.family
    parameters, passed = [0] * model.num_layers, [0.0] * model.num_layers
    others, largest = 0, 0
    experts_per_token = model.config.get(family.experts_per_token_key or "")
    stored = stored_tensors(model.path)
    expert_of = {name: re.search(r"\.experts\.(\d+)\.", name) for name in stored}
    num_experts = 1 + max((int(found[1]) for found in expert_of.values() if found), default=-1)
    for name, tensor in stored.items():
        numel, place = math.prod(tensor.shape), family.split_name(name)
        if place is None:
            others += numel
            if len(tensor.shape) == 2:
                largest = max(largest, numel)
            continue
        share = 1.0
        if experts_per_token and (expert_of[name] or len(tensor.shape) == 3):
            share = min(1.0, experts_per_token / (num_experts if expert_of[name] else tensor.shape[0]))
        parameters[place[0]] += numel
        passed[place[0]] += share * numel
    width = attention_width(AutoConfig.for_model(**model.config))
    # Embeddings and head have one size, and may be one tensor.
    return ModelSize(tuple(parameters), others, tuple(passed), largest, width)
