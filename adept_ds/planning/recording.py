"""The outline of a training step, from a model without content.

Sequences are sent through it (see `contentless`). So what is kept for the backward pass, and which module uses which
weights when, are those of the model's own code, whatever its family; nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adept_ds.config.deepspeed import UNSUPPORTED
from adept_ds.models.directory import ModelDirectory, understood_by_transformers
from adept_ds.models.flops import count_step_flops, forward_flops
from adept_ds.models.head_chunks import bytes_per_logit
from adept_ds.models.hidden_states import final_hidden
from adept_ds.models.loading import Trains
from adept_ds.planning.contentless import StandIns, contentless_model
from adept_ds.planning.live_bytes import LiveBytes
from adept_ds.planning.outline import Call, Event, Outline, Saved, Weight
from adept_ds.planning.repeats import Repeats
from adept_ds.planning.trees import tensors_of

_ROWS = (2, 3)
"""Sequences that are sent through, once so many and once one more: what the second pass adds is a sequence's, and the
rest is there once. Of one alone, some operations copy nothing that copy for more."""


def outline_of(model: ModelDirectory, trains: Trains, precision: torch.dtype, seq_len: int) -> Outline:
    """Of a model of which nothing but config.json has to be there.

    Args:
        model: that training starts from, copies included.
        trains: what of it trains.

    Raises:
        InputError: transformers cannot make a model of its configuration.
    """
    built = contentless_model(model, precision)
    family = model.family
    with torch.device("meta"):
        trains.prepare(built)
    layers = list(family.layer_modules(built))
    lowest = trains.lowest_trainable_layer
    recorders = fewer, more = _Recorder(built, layers), _Recorder(built, layers)
    for rows, recorder in zip(_ROWS, recorders, strict=True):
        with understood_by_transformers(model.path), StandIns(recorder.sees_linear), recorder.recording():
            hidden = final_hidden(built, torch.zeros(rows, seq_len, dtype=torch.int64, device="meta"), None)
    head: Any = built.get_output_embeddings()
    fewer.add_head(head, hidden)
    size = hidden.element_size()
    hidden_bytes = float(hidden[0].numel() * size)
    flops, recomputed = count_step_flops(built, family, seq_len), forward_flops(built, family, seq_len, lowest)
    config: Any = built.config
    divisor, cap = family.logit_transform(config)
    head_trains = bool(head.weight.requires_grad)
    kept_of_head = Saved(4.0 * head.weight.numel() if head_trains else 0.0, hidden_bytes)
    layer_saved = tuple(_of_both(fewer.saved_by(index), more.saved_by(index)) for index in range(len(layers)))
    return Outline(
        weights=fewer.weights,
        calls=tuple(fewer.calls),
        forward=tuple(fewer.events),
        element_size=size,
        lowest=lowest,
        layer_saved=layer_saved,
        layer_inputs=tuple(_of_both(fewer.inputs_of(index), more.inputs_of(index)) for index in range(len(layers))),
        other_saved=_of_both(fewer.saved_by(None), more.saved_by(None)) + kept_of_head,
        layer_input=hidden_bytes,
        layer_working=tuple(_working(recorders, layers, layer_saved, lowest)),
        seq_len=seq_len,
        vocabulary=head.weight.shape[0],
        planned_logit_bytes=bytes_per_logit(head.weight, divisor, cap),
        logit_bytes=8 if cap is None else 12,
        flops=flops,
        recomputed_flops=recomputed,
    )


class _Recorder:
    """Sees modules run, and what is kept for the backward pass."""

    def __init__(self, model: Any, layers: Sequence[torch.nn.Module]) -> None:
        named = dict(model.named_parameters())
        self.weights = tuple(Weight(name, p.numel(), p.requires_grad) for name, p in named.items())
        self._position = {id(parameter): index for index, parameter in enumerate(named.values())}
        self._of_weights = {parameter.untyped_storage()._cdata for parameter in named.values()}
        self._layers = layers
        self._layer_of = {id(layer): index for index, layer in enumerate(layers)}
        self._repeats = Repeats(layers)
        self._within: dict[int, tuple[slice, slice]] = {}
        self._model = model
        self._layer: int | None = None
        self.calls: list[Call] = []
        self.events: list[Event] = []
        self.arguments: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._open: list[tuple[torch.nn.Module, int]] = []
        self._kept: dict[int, tuple[torch.Tensor, int | None]] = {}
        self._inputs: dict[int, tuple[torch.Tensor, int | None]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        hooks = []
        for module in _separate_modules(self._model.base_model):
            hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._end))
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._send, index, layer.forward)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept):
            yield
        for hook in hooks:
            hook.remove()
        for layer in self._layers:
            del layer.forward

    def add_head(self, head: torch.nn.Module, hidden: torch.Tensor) -> None:
        """It runs last, on what the rest of the model returned."""
        gradient = hidden.requires_grad
        weights = tuple(self._position[id(weight)] for weight in head.parameters())
        leaves = gradient or any(weight.requires_grad for weight in head.parameters())
        self.calls.append(Call(weights, None, False, leaves, gradient))
        self.events += [Event(len(self.calls) - 1, True), Event(len(self.calls) - 1, False)]

    def saved_by(self, layer: int | None) -> int:
        """Bytes, by a decoder layer, or by what is around them."""
        return _bytes_of(self._kept, layer if layer is None else self._repeats.alike(layer))

    def inputs_of(self, layer: int) -> int:
        """Bytes that its linear layers are given else."""
        others = {key: value for key, value in self._inputs.items() if key not in self._kept}
        return _bytes_of(others, self._repeats.alike(layer))

    def sees_linear(self, given: torch.Tensor) -> None:
        self._inputs.setdefault(given.untyped_storage()._cdata, (given.detach(), self._layer))

    def _send(self, layer: int, forward: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        calls, events = len(self.calls), len(self.events)
        output = self._repeats.send(layer, forward, inputs, kwargs)
        alike = self._repeats.alike(layer)
        if alike == layer:
            self._within[layer] = slice(calls, len(self.calls)), slice(events, len(self.events))
        else:
            self._repeat(alike, layer)
        return output

    def _repeat(self, alike: int, layer: int) -> None:
        """Calls within a layer, as they were within another, of its own weights."""
        calls, events = self._within[alike]
        of = {self._position[id(there)]: self._position[id(here)] for there, here in self._weights_of(alike, layer)}
        begun = len(self.calls) - calls.start
        for call in self.calls[calls]:
            self.calls.append(replace(call, weights=tuple(of[weight] for weight in call.weights), layer=layer))
        self.events += [Event(begun + event.call, event.begins) for event in self.events[events]]

    def _weights_of(self, one: int, other: int) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        return zip(self._layers[one].parameters(), self._layers[other].parameters(), strict=True)

    def _begin(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) in self._layer_of:
            self._layer = self._layer_of[id(module)]
            self.arguments[self._layer] = (inputs, kwargs)
        recursive = _is_leaf(module)
        weights = [self._position[id(weight)] for weight in module.parameters(recurse=recursive)]
        given = any(tensor.requires_grad for tensor in (*tensors_of(inputs), *tensors_of(kwargs)))
        self.calls.append(Call(tuple(weights), self._layer, id(module) in self._layer_of, False, given))
        self._open.append((module, len(self.calls) - 1))
        self.events.append(Event(len(self.calls) - 1, True))

    def _end(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        begun, index = self._open.pop()
        assert begun is module
        call = self.calls[index]
        leaves = any(tensor.requires_grad for tensor in tensors_of(output))
        self.calls[index] = Call(call.weights, call.layer, call.is_layer, leaves, call.gradient_enters)
        self.events.append(Event(index, False))
        if call.is_layer:
            self._layer = None

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._of_weights:
            self._kept.setdefault(key, (tensor.detach(), self._layer))
        return tensor


def _separate_modules(root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Those that ZeRO-3 gathers weights for, each by itself."""
    yield root
    if not _is_leaf(root):
        for child in root.children():
            yield from _separate_modules(child)


_LEAVES = next(set(feature.off[-1]) for feature in UNSUPPORTED if feature.key.endswith(".leaf_module.classes"))
"""Classes of modules that DeepSpeed gathers as a whole unless it is told otherwise."""


def _is_leaf(module: torch.nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" in _LEAVES


def _bytes_of(found: Mapping[int, tuple[torch.Tensor, int | None]], layer: int | None) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor, of in found.values() if of == layer)


def _of_both(fewer: float, more: float) -> Saved:
    """From the bytes of both passes to what there is once, and of each sequence."""
    per_row = float(more - fewer)
    return Saved(fewer - _ROWS[0] * per_row, per_row)


def _working(
    recorders: Sequence[_Recorder], layers: Sequence[torch.nn.Module], saved: Sequence[Saved], lowest: int
) -> Iterator[tuple[Saved, ...]]:
    """Of each layer; of those that are alike the backward pass of one is run once more, by itself."""
    found: dict[Any, tuple[Saved, ...]] = {}
    for index, layer in enumerate(layers):
        if index < lowest:
            yield ()
            continue
        kind = (saved[index], *((weight.shape, weight.requires_grad) for weight in layer.parameters()))
        if kind not in found:
            fewer, more = (_held_in_backward(layer, *recorder.arguments[index]) for recorder in recorders)
            moments = {_of_both(*held) for held in zip(fewer, more, strict=True)}
            found[kind] = tuple(_largest_somewhere(moments))
        yield found[kind]


def _held_in_backward(layer: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Bytes beside what the forward pass kept, whenever something was made."""
    hooks = []
    for weight in layer.parameters():
        if weight.requires_grad:
            hooks.append(weight.register_post_accumulate_grad_hook(_forget_gradient))
    hidden = next(iter(tensors_of(inputs) or tensors_of(kwargs)))
    given = hidden.detach().requires_grad_(True)
    with LiveBytes() as live, StandIns(lambda _: None):
        if tensors_of(inputs):
            output = layer(given, *inputs[1:], **kwargs)
        else:
            name = next(key for key, value in kwargs.items() if value is hidden)
            output = layer(**(kwargs | {name: given}))
        (left,) = tensors_of(output)[:1]
        gradient = torch.empty_like(left)
        kept, before = live.now, len(live.grown)
        left.backward(gradient)
    for hook in hooks:
        hook.remove()
    return [0, *(now - kept for now in live.grown[before:])]


def _largest_somewhere(moments: Collection[Saved]) -> Iterator[Saved]:
    """Those that hold more than all others at some number of sequences, from one on."""
    most = max(moments, key=lambda each: (each.of(1), each.per_row))
    yield most
    while steeper := [each for each in moments if each.per_row > most.per_row]:
        held = most
        most = min(steeper, key=lambda each: ((held.fixed - each.fixed) / (each.per_row - held.per_row), -each.per_row))
        yield most


def _forget_gradient(weight: torch.Tensor) -> None:
    weight.grad = None
