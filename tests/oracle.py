"""The independent oracle: the paper's method in plain PyTorch, one process, one AdamW group per parameter.

Shares nothing with the program but the packed blocks and the order in which they are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

Batch = tuple[torch.Tensor, torch.Tensor]


def load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def mean_loss(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """Mean next-token loss over every predicted token of several batches."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for input_ids, labels in batches:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        target = labels[:, 1:]
        total = total + F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=-100, reduction="sum"
        )
        tokens += int((target != -100).sum())
    return total / tokens


@contextmanager
def bypassed(model: Any, layer: int) -> Iterator[None]:
    """The residual stream passes around a whole decoder layer."""
    module = model.model.layers[layer]
    original = module.forward
    module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        module.forward = original


def layer_deltas(model: Any, batches: Sequence[Batch]) -> tuple[float, list[float]]:
    """Base loss and delta of each layer, by M + 1 forward passes."""
    with torch.no_grad():
        base = float(mean_loss(model, batches))
        deltas = []
        for layer in range(len(model.model.layers)):
            with bypassed(model, layer):
                deltas.append(float(mean_loss(model, batches)) - base)
    return base, deltas


def unit_of(parameter: str) -> str:
    """'model.layers.3.mlp.up_proj.weight' -> 'layers.3.mlp.up_proj'"""
    return parameter.removeprefix("model.").rpartition(".")[0]


def trainable(model: Any, layers: Sequence[int]) -> dict[str, torch.nn.Parameter]:
    model.requires_grad_(False)
    chosen = {}
    for name, parameter in model.named_parameters():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match and int(match.group(1)) in layers:
            chosen[name] = parameter.requires_grad_(True)
    return chosen


def importance(model: Any, layers: Sequence[int], batches: Sequence[Batch]) -> dict[str, float]:
    """Mean of |w * g| over each unit's elements, averaged over batches (paper, equation 5)."""
    parameters = trainable(model, layers)
    sums: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for batch in batches:
        gradients = torch.autograd.grad(mean_loss(model, [batch]), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            value = float((parameter.detach().double() * gradient.double()).abs().sum())
            sums[unit_of(name)] = sums.get(unit_of(name), 0.0) + value
    for name, parameter in parameters.items():
        sizes[unit_of(name)] = sizes.get(unit_of(name), 0) + parameter.numel()
    return {unit: sums[unit] / sizes[unit] / len(batches) for unit in sums}


def multipliers(importances: dict[str, float]) -> dict[str, float]:
    """2 * (1 - min-max scaled importance), norms apart from matrices (paper, equation 6); 1 where all are equal."""
    result = {}
    for norms in (True, False):
        group = {unit: value for unit, value in importances.items() if ("norm" in unit) == norms}
        low, high = min(group.values()), max(group.values())
        for unit, value in group.items():
            result[unit] = 2 * (1 - (value - low) / (high - low)) if high > low else 1.0
    return result


@dataclass
class Training:
    """What a plain training run yields."""

    losses: list[float] = field(default_factory=list)
    importances: list[dict[str, float]] = field(default_factory=list)
    multipliers: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train(
    model: Any,
    layers: Sequence[int],
    steps: Sequence[Batch],
    learning_rates: Sequence[float],
    first_importance: dict[str, float],
    probe_batches: Sequence[Batch],
    every: int,
    options: dict[str, Any],
) -> Training:
    """AdamW with a group per parameter whose learning rate is the unit's multiplier times the base's."""
    parameters = trainable(model, layers)
    result = Training()
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "name": name} for name, parameter in parameters.items()],
        betas=options["betas"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
    )
    result.importances.append(first_importance)
    result.multipliers.append(multipliers(first_importance))
    for number, (batch, lr) in enumerate(zip(steps, learning_rates, strict=True)):
        optimizer.zero_grad()
        loss = mean_loss(model, [batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), options["clip_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = lr * result.multipliers[-1][unit_of(group["name"])]
        optimizer.step()
        result.losses.append(float(loss.detach()))
        if (number + 1) % every == 0 and number + 1 < len(steps):
            result.importances.append(importance(model, layers, probe_batches))
            result.multipliers.append(multipliers(result.importances[-1]))
    result.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return result


# --- the whole model ------------------------------------------------------------------------------------------------


@dataclass
class WholeTraining:
    """What plain training of every parameter yields; a list has an entry for each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Of the gradient, before it is clipped."""
    products: dict[str, float] = field(default_factory=dict)
    """Of each unit: the sum of |w * g| before the first step, without the pull."""
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)


def train_whole(
    model: Any, steps: Sequence[Batch], lr: float, factors: dict[str, float], options: dict[str, Any], pull: float = 0.0
) -> WholeTraining:
    """AdamW on every parameter, a group each, with its unit's factor; the loss has the term pull/2 |w - w0/2|^2."""
    parameters, result = dict(model.named_parameters()), WholeTraining()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "lr": lr * factors[unit_of(name)]} for name, parameter in parameters.items()],
        betas=options["betas"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
    )
    for number, batch in enumerate(steps):
        optimizer.zero_grad()
        loss = mean_loss(model, [batch])
        if number == 0:
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                product = float((parameter.detach().double() * gradient.double()).abs().sum())
                result.products[unit_of(name)] = result.products.get(unit_of(name), 0.0) + product
        term = sum(((parameter - start[name] / 2) ** 2).sum() for name, parameter in parameters.items())
        (loss + pull / 2 * term).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), options["clip_grad_norm"])
        optimizer.step()
        result.losses.append(float(loss.detach()))
        result.norms.append(float(norm))
        result.weights.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return result


# --- units inside parameters ----------------------------------------------------------------------------------------


def units_of_elements(parameter: str, shape: Sequence[int], granularity: str, head_dim: int) -> list[str]:
    """The unit of every element of a Llama parameter, in memory order, written down from the definition."""
    path, layer = unit_of(parameter), unit_of(parameter).split(".")[1]
    projection = path.rpartition(".")[2]
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    if "norm" in path or granularity == "matrix":
        return [path] * (rows * columns)
    if granularity == "module":
        return [path.rpartition(".")[0]] * (rows * columns)
    names = []
    for row in range(rows):
        for column in range(columns):
            if projection in ("gate_proj", "up_proj", "down_proj"):
                names.append(f"layers.{layer}.mlp.neuron.{column if projection == 'down_proj' else row}")
            elif projection in ("q_proj", "o_proj"):
                names.append(f"layers.{layer}.self_attn.head.{(column if projection == 'o_proj' else row) // head_dim}")
            else:
                names.append(f"layers.{layer}.self_attn.kv_head.{row // head_dim}")
    return names


def train_by_unit(
    model: Any,
    layers: Sequence[int],
    steps: Sequence[Batch],
    lr: float,
    granularity: str,
    probe_batches: Sequence[Batch],
    refresh_after: Sequence[int],
    options: dict[str, Any],
    replayed: int = 0,
) -> Training:
    """AdamW's formula with a learning rate of its own for every element; multipliers start at 1.

    With `replayed`, importances are the mean over the steps since the last refresh, on that many first rows of each.
    """
    parameters = trainable(model, layers)
    units = {
        name: units_of_elements(name, parameter.shape, granularity, model.config.head_dim)
        for name, parameter in parameters.items()
    }
    names = list(dict.fromkeys(unit for listed in units.values() for unit in listed))
    number = {unit: index for index, unit in enumerate(names)}
    index = {name: torch.tensor([number[unit] for unit in listed]) for name, listed in units.items()}
    factor = torch.ones(len(names), dtype=torch.float64)
    (beta1, beta2), result = options["betas"], Training()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    sums, sizes = torch.zeros(2, len(names), dtype=torch.float64)

    def add_importance(text: Batch) -> None:
        gradients = torch.autograd.grad(mean_loss(model, [text]), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            value = (parameter.detach().double() * gradient.double()).abs().flatten()
            sums.index_add_(0, index[name], value)
            sizes.index_add_(0, index[name], torch.ones_like(value))

    for step, batch in enumerate(steps):
        if replayed:
            add_importance((batch[0][:replayed], batch[1][:replayed]))
        loss = mean_loss(model, [batch])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        clip = min(1.0, options["clip_grad_norm"] / (float(norm) + 1e-6))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                first, second = moments[name]
                first.lerp_(gradient * clip, 1 - beta1)
                second.mul_(beta2).add_((gradient * clip) ** 2, alpha=1 - beta2)
                update = (first / (1 - beta1 ** (step + 1))) / (
                    (second / (1 - beta2 ** (step + 1))).sqrt() + options["eps"]
                )
                rate = lr * factor[index[name]].view(parameter.shape).float()
                parameter.sub_(rate * (update + options["weight_decay"] * parameter))
        result.losses.append(float(loss.detach()))
        if step in refresh_after:
            for probe in () if replayed else probe_batches:
                add_importance(probe)
            result.importances.append(dict(zip(names, (sums / sizes).tolist(), strict=True)))
            sums.zero_()
            sizes.zero_()
            result.multipliers.append(multipliers(result.importances[-1]))
            factor = torch.tensor([result.multipliers[-1][unit] for unit in names], dtype=torch.float64)
    result.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return result


# --- methods that give every parameter the same rate ----------------------------------------------------------------


def train_alike(
    model: Any,
    names: Sequence[str],
    steps: Sequence[Batch],
    learning_rates: Sequence[float],
    options: dict[str, Any],
) -> Training:
    """AdamW on the parameters `names`, everything else frozen."""
    parameters = {name: p.requires_grad_(name in names) for name, p in model.named_parameters()}
    chosen = [parameters[name] for name in names]
    clip = options["clip_grad_norm"]
    optimizer = torch.optim.AdamW(chosen, **{key: options[key] for key in ("betas", "weight_decay", "eps")})
    result = Training()
    for batch, lr in zip(steps, learning_rates, strict=True):
        optimizer.zero_grad()
        loss = mean_loss(model, [batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, clip)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        result.losses.append(float(loss.detach()))
    result.weights = {name: parameters[name].detach().clone() for name in names}
    return result
