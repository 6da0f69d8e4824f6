"""What a model without content keeps and computes is what the same model with content does, in every family."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import FAMILY_OPTIONS, save_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from adept_ds.models.adapter_spec import LoraSpec
from adept_ds.models.adapters import adapters_train
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.hidden_states import final_hidden
from adept_ds.models.loading import layers_train
from adept_ds.planning import repeats
from adept_ds.planning.live_bytes import LiveBytes
from adept_ds.planning.memory import Step, working_bytes
from adept_ds.planning.outline import Outline
from adept_ds.planning.recording import outline_of
from adept_ds.planning.repeats import Repeats
from adept_ds.planning.zero_settings import SHIPPED

TOKENS, ROWS, TRAINED = 24, 5, (2, 4)


def frozen_model(directory: ModelDirectory) -> Any:
    """With real tensors, and the stand-in for attention that a plan has."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory.path)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("planned")
    model.config.use_cache = False
    return model.train().requires_grad_(False)


def kept_by(model: Any, layers: list[torch.nn.Module], rows: int, tokens: int = TOKENS) -> dict[int | None, int]:
    """Bytes that autograd keeps, by layer; None: around them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}
    found: dict[int | None, int] = {}
    current: list[int | None] = [None]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and address not in seen:
            seen[address] = tensor.detach()
            found[current[0]] = found.get(current[0], 0) + tensor.untyped_storage().nbytes()
        return tensor

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: current.__setitem__(0, index))
        layer.register_forward_hook(lambda *_: current.__setitem__(0, None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        hidden = final_hidden(model, torch.zeros(rows, tokens, dtype=torch.int64), None)
    del hidden
    return found


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(model_type: str, tmp_path: Path) -> None:
    """Real tensors of the same model, with the same stand-in for attention, for other sequences than it sends.

    Exactly, but for experts: a CPU counts the tokens of each in floating point, a device in whole numbers.
    """
    directory = ModelDirectory.read(save_tiny_model(tmp_path / "model", model_type))
    outline = outline_of(directory, layers_train(directory.family, TRAINED), torch.float32, TOKENS)
    model = frozen_model(directory)
    layers = list(directory.family.layer_modules(model))
    for layer in TRAINED:
        layers[layer].requires_grad_(True)
    found = kept_by(model, layers, ROWS)
    assert set(found) - {None} == {2, 3, 4}, "nothing below the lowest trained layer is kept"
    for index in range(len(layers)):
        assert outline.layer_saved[index].of(ROWS) == pytest.approx(found.get(index, 0), rel=1e-3), index
    head_gradient = ROWS * TOKENS * model.config.hidden_size * 4
    assert outline.other_saved.of(ROWS) - head_gradient == pytest.approx(found.get(None, 0), rel=1e-3)
    assert [w.numel for w in outline.weights] == [p.numel() for p in model.parameters()]
    assert outline.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_layers_that_stand_for_one_another_are_as_if_each_was_sent_through(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kinds there are: sliding and full attention, with and without experts, below, behind and between."""
    options = {"mlp_only_layers": [1, 4, 11]} if model_type == "qwen2_moe" else {}
    directory = ModelDirectory.read(save_tiny_model(tmp_path / "model", model_type, num_hidden_layers=24, **options))
    trains = layers_train(directory.family, (6, 15))
    stood_for: set[int] = set()
    send = Repeats.send

    def watched(self: Repeats, layer: int, *arguments: Any) -> Any:
        returned = send(self, layer, *arguments)
        stood_for.update({layer} - {self.alike(layer)})
        return returned

    monkeypatch.setattr(Repeats, "send", watched)
    short = outline_of(directory, trains, torch.float32, TOKENS)
    assert len(stood_for) >= 4, "or nothing is saved"
    stood_for.clear()
    monkeypatch.setattr(repeats, "_SENT_THROUGH", 24)
    whole = outline_of(directory, trains, torch.float32, TOKENS)
    assert not stood_for
    for field in dataclasses.fields(Outline):
        assert getattr(short, field.name) == getattr(whole, field.name), field.name


@pytest.mark.parametrize("tokens", [24, 32])
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_there_once_is_told_from_what_every_sequence_has(rows: int, tokens: int, tmp_path: Path) -> None:
    """DoRA keeps tensors of its weights' shapes beside those of the tokens; 32 divides the former too, 24 does not."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    directory = ModelDirectory.read(save_tiny_model(tmp_path / "model", **sizes))
    trains = adapters_train(directory.family, LoraSpec(rank=4, dora=True), 0)
    outline = outline_of(directory, trains, torch.float32, tokens)
    model = frozen_model(directory)
    trains.prepare(model)
    found = kept_by(model, list(directory.family.layer_modules(model)), rows, tokens)
    widths = [weight.numel for weight in outline.weights if weight.name.endswith("mlp.up_proj.base_layer.weight")]
    for index, saved in enumerate(outline.layer_saved):
        assert saved.fixed > 4 * widths[index], "as much as a matrix, at least"
        assert saved.of(rows) == pytest.approx(found[index], rel=1e-3), index


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_a_backward_pass_holds_gradients_of_weights_once_and_those_of_activations_by_sequence(
    rows: int, tmp_path: Path
) -> None:
    """Real tensors of a trained layer, whose heaviest moment is another one with few sequences than with many."""
    directory = ModelDirectory.read(save_tiny_model(tmp_path / "model"))
    top = directory.num_layers - 1
    outline = outline_of(directory, layers_train(directory.family, [top]), torch.float32, 8)
    model, given = frozen_model(directory), dict[str, Any]()
    layer = directory.family.layer_modules(model)[top].requires_grad_(True)
    layer.register_forward_pre_hook(lambda _, *of: given.update(of=of), with_kwargs=True)
    final_hidden(model, torch.zeros(rows, 8, dtype=torch.int64), None)
    (hidden, *others), named = given["of"]
    for weight in layer.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with LiveBytes() as live:
        output = layer(hidden.detach().requires_grad_(True), *others, **named)
        gradient = torch.ones_like(output)
        kept, live.peak = live.now, live.now
        output.backward(gradient)
    for recompute in (False, True):
        found = working_bytes(outline, Step(1, rows, 1, recompute), SHIPPED[2])
        assert found == pytest.approx(live.peak - kept, rel=1e-3)
    few, many = outline.layer_working[top][0], outline.layer_working[top][-1]
    assert few.fixed > 0 >= many.fixed, "with gradients of weights, and without"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "phi3"])
def test_operations_are_those_that_pytorch_counts(model_type: str, tmp_path: Path) -> None:
    """Of a step with frozen layers below, between and above, at one token, against PyTorch's own counter.

    Norms, biases and half attention are 7% of ours and not in PyTorch's; 6N would be twice as many.
    """
    from transformers import AutoModelForCausalLM

    directory = ModelDirectory.read(save_tiny_model(tmp_path / "model", model_type))
    outline = outline_of(directory, layers_train(directory.family, TRAINED), torch.float32, 1)
    model: Any = AutoModelForCausalLM.from_pretrained(directory.path)
    model.requires_grad_(False)
    for layer in TRAINED:
        directory.family.layer_modules(model)[layer].requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits.sum().backward()
    assert outline.flops.total == pytest.approx(counter.get_total_flops(), rel=0.07)
    assert outline.flops.total < 0.8 * 6 * outline.total


def test_live_bytes_are_those_of_tensors_that_are_there() -> None:
    """Views and what is done in place add nothing; what is dropped is given back."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        one = torch.zeros(256)
        view = one[10:].view(-1)
        view.add_(1)
        before.mul_(2)
        assert live.now == 1024
        other = one + 1
        assert live.now == 2048
        del one, view
        assert live.now == 1024
        del other
    assert (live.now, live.peak) == (0, 2048)
