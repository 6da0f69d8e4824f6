"""The only place that knows how an architecture names its layers, outputs and units.

A family is data: an entry of `FAMILIES`. Everything else of the program works on these names and on nothing else
that is specific to an architecture. To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_ds.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FineUnits:
    """How a projection falls into units at granularity `fine`."""

    part: str
    """Path of these units inside the layer; projections with the same part share them: 'mlp.neuron'."""
    axis: int
    """0: a unit is some rows of the weight (and of the bias), 1: some columns."""
    count_key: str | None
    """Configuration key that says how many units there are; None: each row or column is one."""


@dataclass(frozen=True)
class Family:
    """How one architecture is built, as far as expansion and unit-wise learning rates care.

    Module paths in `residual_writers`, `matrices` and `norms` are relative to a decoder layer.
    """

    layers: str
    """Path of the list of decoder layers."""
    residual_writers: tuple[str, ...]
    """The last factors that write to the residual stream: zero in a fresh copy, so that it is the identity."""
    matrices: tuple[str, ...]
    """Projections; weight and bias are one unit."""
    norms: tuple[str, ...]
    """Normalisations; each is one unit."""
    fine: Mapping[str, FineUnits]
    """For each projection that falls into heads or neurons; others stay whole."""
    layer_count_key: str = "num_hidden_layers"
    per_layer_config: tuple[str, ...] = ("layer_types",)
    """Configuration keys that hold a list with one entry per layer; a copy inherits its source's entry."""
    derived_config: tuple[str, ...] = ()
    """Those of them that transformers derives from the number of layers where config.json has none."""

    def split_name(self, parameter: str) -> tuple[int, str] | None:
        """'model.layers.3.mlp.up_proj.weight' -> (3, 'mlp.up_proj.weight'); None outside the decoder layers."""
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", parameter)
        return (int(match.group(1)), match.group(2)) if match else None

    def join_name(self, layer: int, inner: str) -> str:
        return f"{self.layers}.{layer}.{inner}"

    def writes_residual(self, inner: str) -> bool:
        """Whether this parameter of a layer is zeroed in a fresh copy."""
        return inner.rpartition(".")[0] in self.residual_writers

    def layer_modules(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The decoder layers of a loaded model, lowest first."""
        return list(model.get_submodule(self.layers).children())

    def expand_config(self, config: Mapping[str, Any], origins: Sequence[int]) -> dict[str, Any]:
        """The configuration of a model whose layer i is (a copy of) source layer `origins[i]`."""
        expanded = dict(config)
        for key in self.per_layer_config:
            entries = config.get(key)
            if isinstance(entries, list):
                expanded[key] = [entries[origin] for origin in origins]
        expanded[self.layer_count_key] = len(origins)
        return expanded


_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")

# With grouped queries, several heads read one key and value head: those are units of their own.
_FINE = {
    "self_attn.q_proj": FineUnits("self_attn.head", 0, "num_attention_heads"),
    "self_attn.k_proj": FineUnits("self_attn.kv_head", 0, "num_key_value_heads"),
    "self_attn.v_proj": FineUnits("self_attn.kv_head", 0, "num_key_value_heads"),
    "self_attn.o_proj": FineUnits("self_attn.head", 1, "num_attention_heads"),
    "mlp.gate_proj": FineUnits("mlp.neuron", 0, None),
    "mlp.up_proj": FineUnits("mlp.neuron", 0, None),
    "mlp.down_proj": FineUnits("mlp.neuron", 1, None),
}

_LLAMA = Family(
    layers="model.layers",
    residual_writers=("self_attn.o_proj", "mlp.down_proj"),
    matrices=_ATTENTION + _GATED_MLP,
    norms=_PRE_NORMS,
    fine=_FINE,
)

_QWEN2 = replace(_LLAMA, derived_config=("layer_types",))

_QWEN3 = replace(_QWEN2, norms=(*_PRE_NORMS, "self_attn.q_norm", "self_attn.k_norm"))

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
}
"""`model_type` of a Hugging Face configuration -> family."""


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """config.json as it lies on disk. Raises `InputError` if it cannot be read."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: '{model_dir}/config.json' cannot be read ({error}); give a complete model") from None
    if not isinstance(config, dict):
        raise InputError(f"model: '{model_dir}/config.json' holds no JSON object; give a complete model")
    return config


def family_of(model_dir: Path) -> Family:
    """The family of a model directory.

    Raises:
        InputError: the architecture is not in the table; the message lists those that are.
    """
    model_type = read_model_config(model_dir).get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise InputError(
            f"model: '{model_dir}' has architecture '{model_type}', which is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))} (CONTRIBUTING.md says how to add one)"
        )
    return family


def layer_count(model_dir: Path) -> int:
    """How many decoder layers a model directory has. Raises `InputError` if its configuration does not say."""
    key = family_of(model_dir).layer_count_key
    count = read_model_config(model_dir).get(key)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"model: '{model_dir}/config.json' has {key}={count!r}; give a complete model")
    return count


def copied_parameters(
    family: Family, names: Iterator[str] | Sequence[str], layers: Sequence[int]
) -> Iterator[tuple[str, int, str]]:
    """Those of `names` that lie in one of `layers`, as (name, layer, name inside the layer)."""
    wanted = set(layers)
    for name in names:
        place = family.split_name(name)
        if place is not None and place[0] in wanted:
            yield name, place[0], place[1]
