"""The values of config.json that the program, or what loads the model, computes with: of their type, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.models.completeness import UNQUANTISED
from adept_ds.models.families import Family

_COUNTS = (
    *("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "n_positions", "num_experts", "num_local_experts", "num_experts_per_tok"),
    "decoder_sparse_step",
)
_FLAGS = ("tie_word_embeddings", "use_sliding_window", "scale_attn_by_inverse_layer_idx")
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "logits_scaling")


def check_values(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """Raises `InputError`, naming key and value: a value is of another type, or the number of layers is missing."""
    for key, what, is_right in _rules(config, family):
        value = config.get(key)
        if not is_right(value) and (value is not None or key == family.layer_count_key):
            raise InputError(
                f"model: '{path}/config.json' has {key}={_shortened(value)}, which is no {what}; give a complete model"
            )


def check_form_of_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Raises `InputError`: config.json says that the weights are quantised, or lie in a file of another name."""
    other = config.get("transformers_weights")
    if other is not None:
        raise InputError(
            f"model: '{path}/config.json' has transformers_weights={_shortened(other)}, a file of its own for weights; "
            "load the model with transformers, save it and give that directory"
        )
    for key in ("quantization_config", "compression_config"):
        section = config.get(key)
        if section is not None:
            method = section.get("quant_method") if isinstance(section, dict) else None
            raise InputError(
                f"model: '{path}/config.json' has {key} (quant_method={_shortened(method)}), and quantised weights "
                f"can be neither expanded nor trained; {UNQUANTISED}"
            )


def _rules(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, str, Callable[[Any], bool]]]:
    """Key, what it must be, and whether a value is that. The number of layers comes first: others depend on it."""
    for key in (family.layer_count_key, *_COUNTS):
        yield key, "whole number above 0", _is_count
    if config.get("use_sliding_window") is not False or config.get("sliding_window") != 0:
        yield "sliding_window", "whole number above 0", _is_count  # one that is not used, transformers writes as 0
    for key in _FLAGS:
        yield key, "true or false", lambda value: isinstance(value, bool)
    for key in _NUMBERS if family.logits_cap_key is None else (*_NUMBERS, family.logits_cap_key):
        yield key, "number above 0", _is_number
    layers = config.get(family.layer_count_key)
    for key in family.per_layer_config:
        yield key, f"list of {layers} entries", lambda value: isinstance(value, list) and len(value) == layers
    if family.dense_layers_key:
        yield family.dense_layers_key, "list of layers", _is_list_of_layers


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_list_of_layers(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."
