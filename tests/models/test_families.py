"""Every family of the table, on two ranks under ZeRO-3: probed, estimated, trained, exported as in plain PyTorch."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.expanding import COPIES, SELECTED, change_after_one_step, load
from harness.families import MOSTLY_SLOW_FAMILIES, REPRESENTATIVES
from harness.family_worker import ROWS, TOKENS, batch
from harness.launching import ROOT, launch
from harness.models import FAMILY_OPTIONS, save_tiny_model
from harness.unit_map import units_of
from safetensors.torch import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.models import family_table as families
from adept_ds.models.family_table import FAMILIES
from adept_ds.units.registry import Granularity, build_registry
from adept_ds.weights.expansion import expand_checkpoint, layer_origins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for model_type in FAMILY_OPTIONS:
        source, expanded = save_tiny_model(root / model_type / "source", model_type), root / model_type / "expanded"
        silenced = expand_checkpoint(source, expanded, SELECTED).silenced
        tensors = load_file(expanded / "model.safetensors")
        for name in silenced:  # so that every unit of a copy has a gradient
            tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
        save_file(tensors, expanded / "model.safetensors", metadata={"format": "pt"})
    return root


class Results(dict[str, Any]):
    """By family; two ranks find those of the representatives together, and those of all others."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, model_type: str) -> Any:
        families = sorted(REPRESENTATIVES if model_type in REPRESENTATIVES else FAMILY_OPTIONS.keys() - REPRESENTATIVES)
        output = self._folder / f"results_{model_type}.pt"
        result = launch(2, ["-m", "harness.family_worker", str(self._folder), str(output), *families])
        assert result.returncode == 0, result.stderr[-4000:]
        self.update(torch.load(output))
        return self[model_type]


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return Results(folder)


each_family = pytest.mark.parametrize("model_type", MOSTLY_SLOW_FAMILIES)


def loss_sum(model: Any) -> torch.Tensor:
    """Over all predicted tokens, from the model's own logits."""
    logits = model(input_ids=batch(), use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.flatten(0, 1), batch()[:, 1:].flatten(), reduction="sum")


@contextmanager
def without(layer: torch.nn.Module) -> Iterator[None]:
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    yield
    del layer.forward


def test_every_family_of_the_table_is_tested() -> None:
    assert FAMILIES.keys() == FAMILY_OPTIONS.keys()


@each_family
def test_the_sweep_gives_the_losses_of_plain_passes(model_type: str, folder: Path, results: dict[str, Any]) -> None:
    model = load(folder / model_type / "source")
    layers = FAMILIES[model_type].layer_modules(model)
    expected = []
    with torch.no_grad():
        expected.append(float(loss_sum(model)))
        for layer in layers:
            with without(layer):
                expected.append(float(loss_sum(model)))
    # float32 in another order: 1e-6 of a loss sum of about 280
    assert results[model_type]["sweep"].tolist() == pytest.approx(expected, rel=3e-6)
    assert len({round(loss, 3) for loss in expected}) == len(expected), "every layer matters"


@each_family
@pytest.mark.parametrize("granularity", ["matrix", "fine"])
def test_every_unit_has_its_importance(
    model_type: str, granularity: Granularity, folder: Path, results: dict[str, Any]
) -> None:
    model = load(folder / model_type / "expanded")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    registry = build_registry(FAMILIES[model_type], shapes, COPIES, granularity, model.config)
    (loss_sum(model) / (ROWS * (TOKENS - 1))).backward()
    expected = torch.zeros(len(registry), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name in registry.placements:
            values = (parameter.detach() * parameter.grad).abs().flatten().double()
            expected.index_add_(0, units_of(registry, name, shapes[name]).flatten(), values)
    found = results[model_type]["importances"][granularity]
    assert list(found) == registry.names
    assert min(found.values()) > 0
    # float32 gradients summed over two ranks; the smallest ones are differences of larger numbers
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=2e-4, abs=1e-8)


@each_family
def test_the_exported_model_has_the_trained_copies_and_nothing_else_is_new(
    model_type: str, folder: Path, results: dict[str, Any]
) -> None:
    model, before = (load(folder / model_type / name) for name in ("export", "expanded"))
    start = dict(before.named_parameters())
    trained, seen = results[model_type]["trained"], set()
    for name, parameter in model.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), name
            seen.add(name)
        else:
            assert torch.equal(parameter, start[name]), name
    assert seen == trained.keys()
    layers = {int(re.findall(r"\d+", name)[0]) for name in trained}
    assert layers == set(COPIES)
    assert any(not torch.equal(trained[name], start[name]) for name in trained)


@each_family
def test_movement_is_measured_from_the_checkpoints_own_tensors(
    model_type: str, folder: Path, results: dict[str, Any]
) -> None:
    after, before = (dict(load(folder / model_type / name).named_parameters()) for name in ("export", "expanded"))
    shapes = {name: tuple(parameter.shape) for name, parameter in before.items()}
    config = load(folder / model_type / "expanded").config
    registry = build_registry(FAMILIES[model_type], shapes, COPIES, "fine", config)
    squares = torch.zeros(len(registry), dtype=torch.float64)
    with torch.no_grad():
        for name in registry.placements:
            change = (after[name] - before[name]).double().square().flatten()
            squares.index_add_(0, units_of(registry, name, shapes[name]).flatten(), change)
    moved = results[model_type]["moved"]
    assert list(moved) == registry.names
    assert list(moved.values()) == pytest.approx(squares.sqrt().tolist(), rel=1e-5, abs=1e-9)


def test_the_guide_adds_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of CONTRIBUTING.md as it stands, in one process; what it is put through is said there."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"```python\n( *FAMILIES.*?)```", guide, flags=re.DOTALL)
    added = dict(FAMILIES)
    exec(textwrap.dedent(entry), vars(families) | {"FAMILIES": added})
    assert added.keys() - FAMILIES.keys() == {"starcoder2"}
    monkeypatch.setitem(FAMILIES, "starcoder2", added["starcoder2"])
    monkeypatch.setitem(FAMILY_OPTIONS, "starcoder2", {"sliding_window": None})
    source = save_tiny_model(tmp_path / "source", "starcoder2")
    expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    before, after = load(source), load(tmp_path / "expanded")
    with torch.no_grad():
        assert torch.equal(after(input_ids=batch()).logits, before(input_ids=batch()).logits)
    options = {"attention_mask": torch.ones_like(batch()), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(after.generate(batch(), **options), before.generate(batch(), **options))
    shapes = {name: tuple(parameter.shape) for name, parameter in after.named_parameters()}
    granularities: tuple[Granularity, ...] = ("matrix", "module", "fine")
    for granularity in granularities:
        registry = build_registry(added["starcoder2"], shapes, COPIES, granularity, after.config)
        layers = [int(re.findall(r"\d+", name)[0]) for name in shapes if "layers" in name]
        assert len(registry.placements) == len([layer for layer in layers if layer in COPIES])
    assert change_after_one_step(tmp_path / "expanded") < 0.05


def test_checkpoints_of_a_base_model_keep_their_names_without_prefix(folder: Path, tmp_path: Path) -> None:
    """As GPT-2 was published: no 'transformer.' in front, and causal masks among the weights."""
    shutil.copytree(folder / "gpt2" / "source", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(5)}
    save_file(tensors, file, metadata={"format": "pt"})
    expand_checkpoint(tmp_path / "source", tmp_path / "expanded", SELECTED)
    names = load_file(tmp_path / "expanded" / "model.safetensors").keys()
    assert {f"h.{layer}.attn.bias" for layer in range(8)} <= names
    assert not any(name.startswith("transformer.") for name in names)
    with torch.no_grad():
        before, after = (load(tmp_path / name)(input_ids=batch()).logits for name in ("source", "expanded"))
    assert torch.equal(before, after)
    stored = FAMILIES["gpt2"].stored_parts("transformer.h.7.mlp.c_fc.weight", names)
    assert stored == [["h.7.mlp.c_fc.weight"]]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_checkpoints_that_hold_stacks_of_experts_are_expanded_too(
    model_type: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / model_type / "source", tmp_path / "source")
    model = load(folder / model_type / "source")
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    expand_checkpoint(tmp_path / "source", tmp_path / "expanded", SELECTED)
    names = load_file(tmp_path / "expanded" / "model.safetensors").keys()
    stack = "model.layers.4.mlp.experts.gate_up_proj"
    assert stack in names
    assert FAMILIES[model_type].stored_parts(stack, names) == [[stack]]
    with torch.no_grad():
        before, after = (load(tmp_path / name)(input_ids=batch()).logits for name in ("source", "expanded"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_every_parameter_of_a_model_is_found_in_its_files(model_type: str, folder: Path) -> None:
    """Under the name that files have for it, elements and all."""
    stored = load_file(folder / model_type / "source" / "model.safetensors")
    for name, parameter in load(folder / model_type / "source").named_parameters():
        parts = [part for expert in FAMILIES[model_type].stored_parts(name, stored) for part in expert]
        assert torch.equal(torch.cat([stored[part].flatten() for part in parts]), parameter.flatten()), name


def test_attention_that_depends_on_the_layers_index_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"scale_attn_by_inverse_layer_idx=True.*=False can be expanded"):
        expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    assert not (tmp_path / "expanded").exists()


def test_layers_without_experts_stay_where_they_were(folder: Path) -> None:
    """Source layers 1 and 4 of one model, all but 2 of the other, whose rule was every third layer."""
    origins = layer_origins(5, SELECTED)
    for model_type, dense in (("qwen2_moe", {1, 4}), ("qwen3_moe", {0, 1, 3, 4})):
        config = read_json(folder / model_type / "expanded" / "config.json")
        assert config["mlp_only_layers"] == [index for index, origin in enumerate(origins) if origin in dense]
        assert config["decoder_sparse_step"] == 1
