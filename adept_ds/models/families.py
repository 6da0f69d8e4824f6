"""What is known of an architecture, as far as expansion, probing and unit-wise learning rates care. Imports no torch.

A family is data: an entry of `family_table.FAMILIES`. Everything else of the program works on these names and on
nothing else that is specific to an architecture.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from adept_ds.base.errors import InputError

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
    outside: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight")
    """Parameters outside the layers; the first is the embedding, a row per token."""
    head: str = "lm_head.weight"
    """The weight of the output head; where it is tied to the embedding, it need not be in a file."""
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
    """Parameters that checkpoints hold under other names: path in the model -> paths in the file; relative to a decoder
    layer inside of them. With a `*`, the number of an expert, whose matrices are stacked in the model, one below the
    other."""
    logits_divisor_key: str | None = None
    """Configuration key by which logits are divided."""
    logits_cap_key: str | None = None
    """Configuration key c of logits that are softly capped: c tanh(logits / c)."""
    bos_per: Literal["document", "block"] = "document"
    """What begins with the beginning-of-sequence token, where the tokenizer puts one: as the family was pretrained."""
    learned_positions: tuple[str, int] | None = None
    """Configuration key that counts the rows of a table of positions, and its default; None: positions are computed."""
    tokens_without_rows: tuple[str, ...] = ()
    """Special tokens that the published tokenizers have and the embedding has not: no text contains them."""

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
        prefix, inner = (f"{self.layers}.{place[0]}.", place[1]) if place else ("", parameter)
        names = [f"{prefix}{path}.weight" for path in self.stored_as.get(module_path(inner), ())]
        if names and all(name in stored for name in names):
            return [names]
        if not names or "*" not in names[0]:
            raise KeyError(parameter)
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
        dense = self.dense_layers(config)
        if self.dense_layers_key and self.sparse_step_key and dense:
            expanded[self.dense_layers_key] = [index for index, origin in enumerate(origins) if origin in dense]
            expanded[self.sparse_step_key] = 1
        expanded[self.layer_count_key] = len(origins)
        return expanded

    def dense_layers(self, config: Mapping[str, Any]) -> set[int]:
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


def copied_parameters(
    family: Family, names: Iterator[str] | Sequence[str], layers: Sequence[int]
) -> Iterator[tuple[str, int, str]]:
    """Those of `names` that lie in one of `layers`, as (name, layer, name inside the layer)."""
    wanted = set(layers)
    for name in names:
        place = family.split_name(name)
        if place is not None and place[0] in wanted:
            yield name, place[0], place[1]


def silent_factors(family: Family, names: Iterable[str], copies: Sequence[int]) -> list[str]:
    """Those of a model's parameters with which its copies write to the residual stream: silent in a fresh copy."""
    return [name for name, _, inner in copied_parameters(family, list(names), copies) if family.writes_residual(inner)]
