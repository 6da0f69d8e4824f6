"""Units of copied layers: which element belongs to which, at every granularity, in every family."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from harness.models import FAMILY_OPTIONS, TINY
from harness.unit_map import unit_of_each_element, units_of

from adept_ds.models.family_table import FAMILIES
from adept_ds.units.registry import UnitRegistry, build_registry

COPIES = [1, 4]
GRANULARITIES = ["matrix", "module", "fine"]


def tiny(model_type: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Configuration and parameter shapes of a tiny model; nothing is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(TINY | FAMILY_OPTIONS[model_type]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def registry_of(model_type: str, granularity: Any) -> tuple[UnitRegistry, dict[str, tuple[int, ...]]]:
    config, shapes = tiny(model_type)
    return build_registry(FAMILIES[model_type], shapes, COPIES, granularity, config), shapes


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_every_element_of_a_copy_belongs_to_exactly_one_unit(model_type: str, granularity: str) -> None:
    registry, shapes = registry_of(model_type, granularity)
    expected = [name for name in shapes if any(re.match(rf".*(layers|h)\.{index}\.", name) for index in COPIES)]
    assert sorted(registry.placements) == sorted(expected)
    assert len(set(registry.names)) == len(registry)
    counted = torch.zeros(len(registry), dtype=torch.float64)
    for name in registry.placements:
        units = units_of(registry, name, shapes[name])
        counted += torch.bincount(units.flatten(), minlength=len(registry))
        for index in units.unique():
            unit = registry.units[index]
            assert re.match(rf".*(layers|h)\.{unit.layer}\.", name)
            assert unit.name.startswith(f"layers.{unit.layer}.{unit.part}")
            assert (unit.kind == "norm") == ("norm" in name or ".ln_" in name)
    assert torch.equal(counted, registry.sizes)
    assert counted.min() > 0


def test_a_matrix_is_a_projection_with_its_bias_or_a_norm() -> None:
    registry, _ = registry_of("qwen2", "matrix")
    (weight,), (bias,) = (registry.placements[f"model.layers.1.self_attn.q_proj.{kind}"] for kind in ("weight", "bias"))
    assert weight.first == bias.first
    parts = [unit.part for unit in registry.units if unit.layer == 1]
    assert parts == [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        "input_layernorm",
        "post_attention_layernorm",
    ]


def test_modules_are_attention_mlp_and_norms() -> None:
    registry, _ = registry_of("qwen3", "module")
    assert [(unit.part, unit.kind) for unit in registry.units if unit.layer == 4] == [
        ("self_attn", "module"),
        ("mlp", "module"),
        ("input_layernorm", "norm"),
        ("post_attention_layernorm", "norm"),
        ("self_attn.q_norm", "norm"),
        ("self_attn.k_norm", "norm"),
    ]


def test_a_head_owns_rows_of_its_query_and_columns_of_the_output_and_shares_keys_and_values() -> None:
    """Two heads of 10 dimensions read one key-value head."""
    registry, _ = registry_of("qwen2", "fine")
    placements = {name.split(".")[-2] + "." + name.split(".")[-1]: p for name, (p,) in registry.placements.items()
                  if name.startswith("model.layers.4.self_attn")}  # fmt: skip
    names = registry.names

    def owners(parameter: str) -> list[str]:
        units = unit_of_each_element(placements[parameter])
        line = units[:, 0] if placements[parameter].axis == 0 and units.dim() == 2 else units.reshape(-1)[:20]
        return [names[index].removeprefix("layers.4.self_attn.") for index in line]

    heads = ["head.0"] * 10 + ["head.1"] * 10
    assert owners("q_proj.weight") == owners("q_proj.bias") == owners("o_proj.weight") == heads
    assert owners("k_proj.weight") == owners("v_proj.bias") == ["kv_head.0"] * 10


def test_a_neuron_owns_a_row_of_gate_and_up_and_a_column_of_down() -> None:
    registry, _ = registry_of("llama", "fine")
    parts = [registry.placements[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
    (gate,), (up,), (down,) = parts
    neurons = [index for index, unit in enumerate(registry.units) if unit.layer == 1 and unit.kind == "neuron"]
    assert len(neurons) == 37
    for units in (unit_of_each_element(gate), unit_of_each_element(up), unit_of_each_element(down).T):
        assert units[:, 0].tolist() == units[:, -1].tolist() == neurons
    assert {registry.units[index].numel for index in neurons} == {3 * 20}


QUERY, KEY, VALUE = "query", "key", "value"
FUSED = [
    # Which units the outputs of a fused projection belong to, written down from the forward pass of each architecture.
    # Phi-3: 2 heads of 10 queries, one of keys, one of values. GPT-NeoX: by head 10 queries, 10 keys, 10 values. GPT-2:
    # 20 queries, 20 keys, 20 values, two heads each.
    ("phi3", "matrix", "self_attn.qkv_proj", ["q_proj"] * 20 + ["k_proj"] * 10 + ["v_proj"] * 10),
    ("phi3", "fine", "self_attn.qkv_proj", ["head.0"] * 10 + ["head.1"] * 10 + ["kv_head.0"] * 20),
    ("phi3", "matrix", "mlp.gate_up_proj", ["gate_proj"] * 37 + ["up_proj"] * 37),
    ("phi3", "fine", "mlp.gate_up_proj", [f"neuron.{i}" for i in range(37)] * 2),
    ("gpt_neox", "matrix", "attention.query_key_value", [part for part in (QUERY, KEY, VALUE) for _ in range(10)] * 2),
    ("gpt_neox", "fine", "attention.query_key_value", ["head.0"] * 30 + ["head.1"] * 30),
    ("gpt2", "matrix", "attn.c_attn", [part for part in (QUERY, KEY, VALUE) for _ in range(20)]),
    ("gpt2", "fine", "attn.c_attn", (["head.0"] * 10 + ["head.1"] * 10) * 3),
]


@pytest.mark.parametrize(("model_type", "granularity", "path", "owners"), FUSED)
def test_a_fused_projection_falls_into_those_that_it_was_fused_from(
    model_type: str, granularity: str, path: str, owners: list[str]
) -> None:
    registry, shapes = registry_of(model_type, granularity)
    names = [name for name in shapes if re.search(rf"\.4\.{path}\.", name)]
    assert names
    for name in names:
        units = units_of(registry, name, shapes[name])
        line = units.movedim(1 if model_type == "gpt2" else 0, 0) if units.dim() == 2 else units[:, None]
        assert (line == line[:, :1]).all(), "all inputs of an output belong to the same unit"
        found = [registry.names[index] for index in line[:, 0]]
        assert found == [f"layers.4.{path.partition('.')[0]}.{owner}" for owner in owners]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("granularity", ["matrix", "fine"])
def test_every_expert_has_units_of_its_own(model_type: str, granularity: str) -> None:
    layer = 2  # with experts in all three
    config, shapes = tiny(model_type)
    registry = build_registry(FAMILIES[model_type], shapes, [layer], granularity, config)  # type: ignore[arg-type]
    path = f"model.layers.{layer}.mlp.experts"
    gate_up, down = (units_of(registry, f"{path}.{n}", shapes[f"{path}.{n}"]) for n in ("gate_up_proj", "down_proj"))
    size = down.shape[2]
    prefix = f"layers.{layer}.mlp.experts"
    for expert in range(3):
        columns = {tuple(down[expert, :, neuron].unique().tolist()) for neuron in range(size)}
        gate, up = gate_up[expert, :size], gate_up[expert, size:]
        if granularity == "matrix":
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down[expert]}
            owners = {part: [registry.names[index] for index in units.unique()] for part, units in parts.items()}
            assert owners == {part: [f"{prefix}.{part}.{expert}"] for part in parts}
        else:
            neurons = [registry.names.index(f"{prefix}.neuron.{expert}.{neuron}") for neuron in range(size)]
            assert gate[:, 0].tolist() == gate[:, -1].tolist() == up[:, 0].tolist() == up[:, -1].tolist() == neurons
            assert columns == {(index,) for index in neurons}
    shared = [unit.part for unit in registry.units if "shared" in unit.part]
    assert bool(shared) == (model_type == "qwen2_moe")
    assert all(part.startswith(("mlp.shared_expert.", "mlp.shared_expert_gate")) for part in shared)


def test_a_run_of_a_parameter_of_several_parts_is_cut_at_their_borders() -> None:
    """Every slice of a fused projection and of a stack of experts, against the definition element by element."""
    for model_type, name in (("phi3", "self_attn.qkv_proj.weight"), ("qwen3_moe", "mlp.experts.down_proj")):
        config, shapes = tiny(model_type)
        registry = build_registry(FAMILIES[model_type], shapes, [2], "fine", config)
        parameter = f"model.layers.2.{name}"
        truth = units_of(registry, parameter, shapes[parameter]).flatten()
        generator = torch.Generator().manual_seed(0)
        for start, stop in torch.randint(len(truth) + 1, (200, 2), generator=generator).sort(dim=1).values.tolist():
            told = torch.full((stop - start,), -1)
            for tile in registry.tiles(parameter, start, stop):
                view = tile.view(told)
                assert (view == -1).all(), "tiles must not overlap"
                view.copy_(tile.units.unsqueeze(1 - tile.axis).expand_as(view))
            assert torch.equal(told, truth[start:stop]), (parameter, start, stop)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_order_of_units_does_not_depend_on_the_order_of_parameters(granularity: Any) -> None:
    config, shapes = tiny("qwen2")
    forward = build_registry(FAMILIES["qwen2"], shapes, COPIES, granularity, config)
    turned = dict(reversed(shapes.items()))
    assert build_registry(FAMILIES["qwen2"], turned, COPIES[::-1], granularity, config).names == forward.names


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_every_element_of_a_whole_model_belongs_to_exactly_one_unit(model_type: str, granularity: Any) -> None:
    config, shapes = tiny(model_type)
    family = FAMILIES[model_type]
    registry = build_registry(family, shapes, range(5), granularity, config, outside=True)
    assert registry.placements.keys() == shapes.keys()
    counted = torch.zeros(len(registry), dtype=torch.float64)
    for name, shape in shapes.items():
        counted += torch.bincount(units_of(registry, name, shape).flatten(), minlength=len(registry))
    assert torch.equal(counted, registry.sizes)
    layers = build_registry(family, shapes, range(5), granularity, config)
    assert registry.names[: len(layers)] == layers.names


OUTSIDE = {
    "llama": [("embed_tokens", "matrix"), ("norm", "norm")],  # a tied head
    "phi3": [("embed_tokens", "matrix"), ("norm", "norm"), ("lm_head", "matrix")],
    "gpt2": [("wte", "matrix"), ("wpe", "matrix"), ("ln_f", "norm")],
    "gpt_neox": [("embed_in", "matrix"), ("final_layer_norm", "norm"), ("lm_head", "matrix")],
}


@pytest.mark.parametrize("model_type", OUTSIDE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_units_outside_the_layers_are_modules_under_the_architectures_names(model_type: str, granularity: Any) -> None:
    config, shapes = tiny(model_type)
    registry = build_registry(FAMILIES[model_type], shapes, [4], granularity, config, outside=True)
    found = [unit for unit in registry.units if unit.layer is None]
    assert [(unit.name, unit.kind) for unit in found] == OUTSIDE[model_type]
    assert all(unit.name == unit.part == unit.place for unit in found)
    assert found[0].numel == 262 * 20


def test_the_bias_of_a_head_belongs_to_the_head() -> None:
    shapes = {"model.embed_tokens.weight": (5, 4), "lm_head.bias": (5,), "lm_head.weight": (5, 4)}
    registry = build_registry(FAMILIES["llama"], shapes, [], outside=True)
    assert [(unit.name, unit.kind, unit.numel) for unit in registry.units] == [
        ("embed_tokens", "matrix", 20),
        ("lm_head", "matrix", 25),
    ]


@pytest.mark.parametrize("name", ["model.position_bias", "v_head.weight"])
def test_a_parameter_outside_the_layers_that_the_family_does_not_know_is_an_error(name: str) -> None:
    shapes = {"model.embed_tokens.weight": (5, 4), name: (4,)}
    with pytest.raises(ValueError, match=re.escape(name)):
        build_registry(FAMILIES["llama"], shapes, [], outside=True)


def test_what_trains_and_belongs_to_no_unit_is_named() -> None:
    registry = build_registry(FAMILIES["llama"], {"model.layers.1.mlp.up_proj.weight": (4, 4)}, [1])
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' trains and belongs to no unit"):
        list(registry.tiles("model.norm.weight", 0, 4))


def test_a_parameter_that_the_family_does_not_know_is_an_error() -> None:
    shapes = {"model.layers.1.self_attn.q_proj.weight": (4, 4), "model.layers.1.self_attn.sinks": (4,)}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.sinks"):
        build_registry(FAMILIES["llama"], shapes, [1])
    build_registry(FAMILIES["llama"], shapes, [2])  # in a layer that does not train it does not matter


def test_any_mapping_from_parameters_to_names_makes_units() -> None:
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (5,)}
    registry = UnitRegistry.from_mapping({"a.weight": "first", "b.weight": "second", "a.bias": "first"}, shapes)
    assert registry.names == ["first", "second"]
    assert registry.sizes.tolist() == [9, 5]
    assert sum(part.numel for parts in registry.placements.values() for part in parts) == 14
    with pytest.raises(ValueError, match=r"'c\.weight'"):
        UnitRegistry.from_mapping({"c.weight": "first"}, shapes)
