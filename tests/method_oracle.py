"""Methods that train a whole model in plain PyTorch, one process: what they share. See `oracle`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch

Parameters = dict[str, torch.nn.Parameter]
PerUnit = dict[str, float]


def gradients(model: Any, batch: oracle.Batch) -> dict[str, torch.Tensor]:
    """Of the mean loss over a batch, for every parameter."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(oracle.mean_loss(model, [batch]), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def unit_means(values: dict[str, torch.Tensor]) -> PerUnit:
    """Mean over the elements of each unit; those of parameters are given."""
    of_unit: dict[str, list[torch.Tensor]] = {}
    for name, elements in values.items():
        of_unit.setdefault(oracle.unit_of(name), []).append(elements.double().flatten())
    return {unit: float(torch.cat(elements).mean()) for unit, elements in of_unit.items()}


def products(model: Any, found: dict[str, torch.Tensor]) -> PerUnit:
    """|w g|, its mean over each unit."""
    return unit_means(
        {name: (p.detach().double() * found[name].double()).abs() for name, p in model.named_parameters()}
    )


def importance(model: Any, batches: Sequence[oracle.Batch]) -> PerUnit:
    """Mean of |w g| over each unit's elements, averaged over batches."""
    of_batches = [products(model, gradients(model, batch)) for batch in batches]
    return {unit: sum(values[unit] for values in of_batches) / len(batches) for unit in of_batches[0]}


def top(values: PerUnit, share: float) -> set[str]:
    """The units above the quantile, norms apart."""
    chosen = set()
    for norms in (True, False):
        group = {unit: value for unit, value in values.items() if ("norm" in unit) == norms}
        limit = torch.tensor(list(group.values()), dtype=torch.float64).quantile(1 - share)
        chosen |= {unit for unit, value in group.items() if value > limit}
    return chosen


def by_role(general: set[str], domain: set[str], units: Sequence[str], values: dict[str, float]) -> PerUnit:
    """`values` of units that are important to one side only, to both (shared), or to neither (idle)."""
    names = {(True, False): "general", (False, True): "domain", (True, True): "shared", (False, False): "idle"}
    return {unit: values[names[unit in general, unit in domain]] for unit in units}


def train(
    model: Any,
    steps: Sequence[oracle.Batch],
    learning_rates: Sequence[float],
    options: dict[str, Any],
    *,
    factors: Callable[[int], PerUnit | None] = lambda step: None,
    term: Callable[[Parameters], torch.Tensor] = lambda parameters: torch.zeros(()),
    see: Callable[[dict[str, torch.Tensor]], None] = lambda gradients: None,
) -> oracle.Training:
    """AdamW on every parameter, a group each.

    Args:
        factors: of learning rates, by unit, asked before each step; None: as before, at first 1.
        term: of the loss; where clipping and the update see it, `losses` leave it out.
        see: gets the gradient of each step, before it is clipped.
    """
    parameters, result = dict(model.named_parameters()), oracle.Training()
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "name": name, "factor": 1.0} for name, parameter in parameters.items()],
        **{key: options[key] for key in ("betas", "weight_decay", "eps")},
    )
    for step, (batch, lr) in enumerate(zip(steps, learning_rates, strict=True)):
        new = factors(step)
        for group in optimizer.param_groups:
            group["factor"] = new[oracle.unit_of(group["name"])] if new else group["factor"]
            group["lr"] = lr * group["factor"]
        optimizer.zero_grad()
        loss = oracle.mean_loss(model, [batch])
        (loss + term(parameters)).backward()
        see({name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None})
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), options["clip_grad_norm"])
        optimizer.step()
        result.losses.append(float(loss.detach()))
    result.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return result
