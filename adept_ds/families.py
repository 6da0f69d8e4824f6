"""The only place that knows how an architecture names its layers, outputs and units.

A family is data: an entry of `FAMILIES`. Everything else of the program works on these names and on nothing else
that is specific to an architecture. To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adept_ds.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """Outputs (or inputs) of a projection that follow one another and are a projection of their own in the paper."""

    fine: str
    """Path of its units at granularity `fine`; parts with the same path share them: 'mlp.neuron'."""
    count_key: str | None = None
    """Configuration key that says how many such units there are; None: each output (or input) is one."""
    name: str | None = None
    """Path of its unit at granularity `matrix`; None: that of the projection, which has no other part."""


@dataclass(frozen=True)
class Projection:
    """How the weight of a linear layer falls into units. Three dimensions are a stack of experts."""

    parts: tuple[Part, ...] = ()
    """Several if the projection is fused from several; none if it stays whole even at granularity `fine`."""
    side: Literal["outputs", "inputs"] = "outputs"
    """What the parts consist of. Outputs come with the elements of the bias."""
    by_head: bool = False
    """Fused head by head: the outputs of all parts for the first head, then those for the second."""


@dataclass(frozen=True)
class Family:
    """How one architecture is built, as far as expansion, probing and unit-wise learning rates care.

    Module paths in `residual_writers`, `projections` and `norms` are relative to a decoder layer; a `*` is a number.
    """

    layers: str
    """Path of the list of decoder layers."""
    residual_writers: tuple[str, ...]
    """The last factors that write to the residual stream, as checkpoints call them. Where a sublayer ends in a norm,
    that is the norm's gain: with a zeroed projection before it, the norm would blow up the first small update."""
    projections: dict[str, Projection]
    """Linear layers by path, in the order of their units; weight and bias belong together."""
    norms: tuple[str, ...]
    """Normalisations; each is one unit."""
    silent: float = 0.0
    """The value of `residual_writers` with which they write nothing."""
    transposed: bool = False
    """Weights are [inputs, outputs], as in GPT-2's Conv1D."""
    layer_count_key: str = "num_hidden_layers"
    per_layer_config: tuple[str, ...] = ("layer_types",)
    """Configuration keys that hold a list with one entry per layer; a copy inherits its source's entry."""
    derived_config: tuple[str, ...] = ()
    """Those of them that transformers derives from the number of layers where config.json has none."""
    dense_layers_key: str | None = None
    """Configuration key that lists the indices of layers without experts."""
    sparse_step_key: str | None = None
    """Configuration key that makes only every n-th layer one with experts."""
    required_config: Mapping[str, Any] = field(default_factory=dict)
    """Configuration keys that must have this value: with another, a layer's function depends on its index."""
    experts_per_token_key: str | None = None
    """Configuration key that says how many experts of a stack each token passes."""
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters that checkpoints hold under other names: path in the model -> paths in the file. With a `*`, the
    number of an expert, whose matrices are stacked in the model, one below the other."""
    logits_divisor_key: str | None = None
    """Configuration key by which logits are divided."""
    logits_cap_key: str | None = None
    """Configuration key c of logits that are softly capped: c tanh(logits / c)."""

    def split_name(self, parameter: str) -> tuple[int, str] | None:
        """'model.layers.3.mlp.up_proj.weight' -> (3, 'mlp.up_proj.weight'); None outside the decoder layers."""
        match = self._layer_pattern.fullmatch(parameter)
        return (int(match.group(2)), match.group(3)) if match else None

    def in_layer(self, parameter: str, layer: int) -> str:
        """The name of the same parameter in another layer."""
        match = self._layer_pattern.fullmatch(parameter)
        if match is None:
            raise ValueError(f"'{parameter}' is in no decoder layer")
        return f"{match.group(1)}{layer}.{match.group(3)}"

    def writes_residual(self, inner: str) -> bool:
        """Whether this tensor of a layer, by its name in a checkpoint, is silenced in a fresh copy."""
        return module_path(inner) in self.residual_writers

    def logit_transform(self, config: Any) -> tuple[float, float | None]:
        """What the model does to its head's output: divisor and cap (see `logits_divisor_key`, `logits_cap_key`)."""
        divisor = getattr(config, self.logits_divisor_key) if self.logits_divisor_key else 1.0
        return float(divisor), getattr(config, self.logits_cap_key) if self.logits_cap_key else None

    def layer_modules(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The decoder layers of a loaded model, lowest first."""
        return list(model.get_submodule(self.layers).children())

    def stored_parts(self, parameter: str, stored: Container[str]) -> list[list[str]]:
        """The names under which a parameter of the model lies in a checkpoint that holds the names `stored`.

        Returns:
            For each expert of a stack the tensors that lie one below the other in it; else one list of one name.

        Raises:
            KeyError: the checkpoint does not hold it.
        """
        # Checkpoints of a base model lack the path's first component.
        for name in (parameter, parameter.partition(".")[2]):
            if name in stored:
                return [[name]]
        place = self.split_name(parameter)
        patterns = self.stored_as.get(module_path(place[1]), ()) if place else ()
        if not place or not patterns:
            raise KeyError(parameter)
        suffix = ".weight"
        names = [f"{self.layers}.{place[0]}.{pattern}{suffix}" for pattern in patterns]
        if "*" not in patterns[0]:
            return [names]
        experts: list[list[str]] = []
        while (found := [name.replace("*", str(len(experts))) for name in names])[0] in stored:
            experts.append(found)
        if not experts:
            raise KeyError(parameter)
        return experts

    def expand_config(self, config: Mapping[str, Any], origins: Sequence[int]) -> dict[str, Any]:
        """The configuration of a model whose layer i is (a copy of) source layer `origins[i]`.

        Raises:
            InputError: the configuration makes a layer's function depend on its index.
        """
        for key, value in self.required_config.items():
            if config.get(key, value) != value:
                raise InputError(
                    f"model: config.json has {key}={config[key]!r}, with which every layer that is moved would compute "
                    f"something else; only models with {key}={value!r} can be expanded"
                )
        expanded = dict(config)
        for key in self.per_layer_config:
            entries = config.get(key)
            if isinstance(entries, list):
                expanded[key] = [entries[origin] for origin in origins]
        dense = self._dense_layers(config)
        if self.dense_layers_key and self.sparse_step_key and dense:
            expanded[self.dense_layers_key] = [index for index, origin in enumerate(origins) if origin in dense]
            expanded[self.sparse_step_key] = 1
        expanded[self.layer_count_key] = len(origins)
        return expanded

    def _dense_layers(self, config: Mapping[str, Any]) -> set[int]:
        """Layers without experts, in families that mix both kinds."""
        if not self.dense_layers_key or not self.sparse_step_key:
            return set()
        listed, step = config.get(self.dense_layers_key) or [], config.get(self.sparse_step_key) or 1
        return {i for i in range(config[self.layer_count_key]) if i in listed or (i + 1) % step}

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        first, _, rest = self.layers.partition(".")
        # Checkpoints of a base model lack the path's first component.
        return re.compile(rf"((?:{re.escape(first)}\.)?{re.escape(rest)}\.)(\d+)\.(.+)")


def module_path(inner: str) -> str:
    """'mlp.up_proj.weight' -> 'mlp.up_proj', 'mlp.experts.3.up_proj.weight' -> 'mlp.experts.*.up_proj'.

    Stacks of experts are parameters of a module that is none of a single projection: they keep their name.
    """
    path, _, last = inner.rpartition(".")
    return re.sub(r"\.\d+(?=\.|$)", ".*", path if last in ("weight", "bias") else inner)


def _outputs(fine: str, count_key: str | None = None) -> Projection:
    return Projection((Part(fine, count_key),))


def _inputs(fine: str, count_key: str | None = None) -> Projection:
    return Projection((Part(fine, count_key),), side="inputs")


def _gated_mlp(path: str) -> dict[str, Projection]:
    """A neuron owns a row of gate_proj and up_proj and a column of down_proj."""
    neuron = f"{path}.neuron"
    return {
        f"{path}.gate_proj": _outputs(neuron),
        f"{path}.up_proj": _outputs(neuron),
        f"{path}.down_proj": _inputs(neuron),
    }


def _stacked_experts(path: str) -> dict[str, Projection]:
    neuron = f"{path}.neuron"
    fused = tuple(Part(neuron, name=f"{path}.{name}_proj") for name in ("gate", "up"))
    return {f"{path}.gate_up_proj": Projection(fused), f"{path}.down_proj": _inputs(neuron)}


_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"

# With grouped queries, several heads read one key and value head: those are units of their own.
_ATTENTION = {
    "self_attn.q_proj": _outputs("self_attn.head", _HEADS),
    "self_attn.k_proj": _outputs("self_attn.kv_head", _KV_HEADS),
    "self_attn.v_proj": _outputs("self_attn.kv_head", _KV_HEADS),
    "self_attn.o_proj": _inputs("self_attn.head", _HEADS),
}
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

_LLAMA = Family(
    layers="model.layers",
    residual_writers=("self_attn.o_proj", "mlp.down_proj"),
    projections=_ATTENTION | _gated_mlp("mlp"),
    norms=_PRE_NORMS,
)
_QWEN2 = replace(_LLAMA, derived_config=("layer_types",))
_QWEN3 = replace(_QWEN2, norms=(*_PRE_NORMS, *_QK_NORMS))
_SMOLLM3 = replace(
    _LLAMA, per_layer_config=("layer_types", "no_rope_layers"), derived_config=("layer_types", "no_rope_layers")
)
_GRANITE = replace(_LLAMA, logits_divisor_key="logits_scaling")

_OLMO2 = replace(_LLAMA, residual_writers=_POST_NORMS, norms=(*_POST_NORMS, *_QK_NORMS))
_OLMO3 = replace(_OLMO2, derived_config=("layer_types",))
_GEMMA2 = replace(
    _LLAMA,
    residual_writers=_POST_NORMS,
    silent=-1.0,  # the gain is 1 + weight
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    derived_config=("layer_types",),
    logits_cap_key="final_logit_softcapping",
)
_GEMMA3 = replace(_GEMMA2, norms=(*_GEMMA2.norms, *_QK_NORMS))

_PHI3 = replace(
    _LLAMA,
    projections={
        "self_attn.qkv_proj": Projection(
            (
                Part("self_attn.head", _HEADS, "self_attn.q_proj"),
                Part("self_attn.kv_head", _KV_HEADS, "self_attn.k_proj"),
                Part("self_attn.kv_head", _KV_HEADS, "self_attn.v_proj"),
            )
        ),
        "self_attn.o_proj": _ATTENTION["self_attn.o_proj"],
        "mlp.gate_up_proj": Projection(
            (Part("mlp.neuron", name="mlp.gate_proj"), Part("mlp.neuron", name="mlp.up_proj"))
        ),
        "mlp.down_proj": _inputs("mlp.neuron"),
    },
)


def _query_key_value(path: str) -> tuple[Part, ...]:
    """As many key and value heads as heads: a head owns its keys and values."""
    return tuple(Part(f"{path}.head", _HEADS, f"{path}.{name}") for name in ("query", "key", "value"))


_GPT_NEOX = Family(
    layers="gpt_neox.layers",
    residual_writers=("attention.dense", "mlp.dense_4h_to_h"),
    projections={
        "attention.query_key_value": Projection(_query_key_value("attention"), by_head=True),
        "attention.dense": _inputs("attention.head", _HEADS),
        "mlp.dense_h_to_4h": _outputs("mlp.neuron"),
        "mlp.dense_4h_to_h": _inputs("mlp.neuron"),
    },
    norms=_PRE_NORMS,
)
_GPT2 = Family(
    layers="transformer.h",
    residual_writers=("attn.c_proj", "mlp.c_proj"),
    projections={
        "attn.c_attn": Projection(_query_key_value("attn")),
        "attn.c_proj": _inputs("attn.head", _HEADS),
        "mlp.c_fc": _outputs("mlp.neuron"),
        "mlp.c_proj": _inputs("mlp.neuron"),
    },
    norms=("ln_1", "ln_2"),
    transposed=True,
    layer_count_key="n_layer",
    required_config={"scale_attn_by_inverse_layer_idx": False},
)

_MIXTRAL = replace(
    _LLAMA,
    # Checkpoints hold a tensor per expert and matrix, or stacks as the model does: files of either kind exist.
    residual_writers=("self_attn.o_proj", "block_sparse_moe.experts.*.w2", "mlp.experts.down_proj"),
    projections=_ATTENTION | {"mlp.gate": Projection()} | _stacked_experts("mlp.experts"),
    experts_per_token_key="num_experts_per_tok",
    stored_as={
        "mlp.gate": ("block_sparse_moe.gate",),
        "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.*.w2",),
    },
)
_QWEN3_MOE = replace(
    _QWEN3,
    residual_writers=(*_LLAMA.residual_writers, "mlp.experts.*.down_proj", "mlp.experts.down_proj"),
    projections=_LLAMA.projections | {"mlp.gate": Projection()} | _stacked_experts("mlp.experts"),
    derived_config=(),
    experts_per_token_key="num_experts_per_tok",
    dense_layers_key="mlp_only_layers",
    sparse_step_key="decoder_sparse_step",
    stored_as={
        "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "mlp.experts.down_proj": ("mlp.experts.*.down_proj",),
    },
)
_QWEN2_MOE = replace(
    _QWEN3_MOE,
    residual_writers=(*_QWEN3_MOE.residual_writers, "mlp.shared_expert.down_proj"),
    projections=_QWEN3_MOE.projections | {"mlp.shared_expert_gate": Projection()} | _gated_mlp("mlp.shared_expert"),
    norms=_PRE_NORMS,
    derived_config=("layer_types",),
)

FAMILIES: dict[str, Family] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _GRANITE,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "olmo2": _OLMO2,
    "olmo3": _OLMO3,
    "phi3": _PHI3,
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "smollm3": _SMOLLM3,
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
    config = read_model_config(model_dir)
    model_type, inner = config.get("model_type"), config.get("text_config")
    family = FAMILIES.get(str(model_type))
    if family is None and isinstance(inner, dict) and inner.get("model_type") in FAMILIES:
        raise InputError(
            f"model: '{model_dir}' has architecture '{model_type}', which is not supported; "
            f"the '{inner['model_type']}' inside it is: save its language model alone, and give that directory"
        )
    if family is None:
        raise InputError(
            f"model: '{model_dir}' has architecture '{model_type}', which is not supported; "
            f"supported: {', '.join(FAMILIES)} (CONTRIBUTING.md says how to add one)"
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
