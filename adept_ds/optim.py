"""AdamW whose learning rate has a multiplier per unit, under any partitioning.

DeepSpeed hands the optimizer flat tensors: this rank's slices of many parameters, back to back. `UnitAdamW` steps
views of such a tensor, one per run of elements that belongs to one unit, so nothing is copied, nothing is
communicated, and the moments stay the flat tensors that DeepSpeed's checkpoints know. A parameter group per unit
would do the same arithmetic, but DeepSpeed turns every group into a partition with its own norm all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

MULTIPLIERS_KEY = "unit_multipliers"
"""Key in the parameter group: there, DeepSpeed saves and restores it together with the optimizer."""


@dataclass(frozen=True)
class UnitSlice:
    """A run of a flat tensor's elements that belongs to one unit."""

    start: int
    stop: int
    unit: str


class UnitAdamW(torch.optim.AdamW):
    """AdamW with one learning-rate multiplier per unit.

    The multiplier scales the whole update, weight decay included: a unit with multiplier 0 does not move by one
    bit, while its moments go on. Elements outside all slices (padding) take part in nothing.

    Args:
        params, lr, betas, eps, weight_decay: as `torch.optim.AdamW`; one parameter group.
        units: names of all units; every multiplier starts at 1.
    """

    def __init__(
        self,
        params: Any,
        units: Sequence[str],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        if len(self.param_groups) != 1:
            raise ValueError("UnitAdamW takes one parameter group: units, not groups, carry the multipliers")
        self.param_groups[0][MULTIPLIERS_KEY] = dict.fromkeys(units, 1.0)
        self._slices: dict[int, list[UnitSlice]] = {}

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier of each unit (a copy)."""
        return dict(self.param_groups[0][MULTIPLIERS_KEY])

    def set_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Take new multipliers, in effect from the next step on. Raises `ValueError` unless every unit has one."""
        known = self.param_groups[0][MULTIPLIERS_KEY]
        if multipliers.keys() != known.keys():
            odd = sorted(multipliers.keys() ^ known.keys())
            raise ValueError(f"multipliers must name every unit exactly once; at fault: {odd[:3]}")
        self.param_groups[0][MULTIPLIERS_KEY] = {unit: float(multipliers[unit]) for unit in known}

    def bind(self, tensor: torch.Tensor, slices: Sequence[UnitSlice]) -> None:
        """Say which elements of a flat tensor belong to which unit.

        Raises:
            ValueError: slices overlap, leave the tensor or name an unknown unit.
        """
        end = 0
        for piece in slices:
            if piece.unit not in self.param_groups[0][MULTIPLIERS_KEY]:
                raise ValueError(f"unknown unit '{piece.unit}'")
            if not end <= piece.start < piece.stop <= tensor.numel():
                raise ValueError(f"elements {piece.start}:{piece.stop} of unit '{piece.unit}' overlap or do not exist")
            end = piece.stop
        self._slices[id(tensor)] = _merge_neighbours(slices)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_tensor(parameter, group)
        return loss

    def _step_tensor(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        flat = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weight, grad, exp_avg, exp_avg_sq = (tensor.view(-1) for tensor in flat if tensor is not None)
        multipliers = group[MULTIPLIERS_KEY]
        for multiplier, slices in self._slices_by_multiplier(parameter, multipliers).items():
            views = [[tensor[s.start : s.stop] for s in slices] for tensor in (weight, grad, exp_avg, exp_avg_sq)]
            adamw(
                views[0],
                views[1],
                views[2],
                views[3],
                max_exp_avg_sqs=[],
                # The functional form advances the step itself; every view starts from the step before this one.
                state_steps=[state["step"] - 1 for _ in slices],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"] * multiplier,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The stock state of `torch.optim.AdamW`, which universal checkpoints need."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _slices_by_multiplier(
        self, parameter: torch.Tensor, multipliers: Mapping[str, float]
    ) -> dict[float, list[UnitSlice]]:
        if id(parameter) not in self._slices:
            raise ValueError("step() got a tensor that was never bound; call bind() for every flat tensor first")
        grouped: dict[float, list[UnitSlice]] = {}
        for piece in self._slices[id(parameter)]:
            grouped.setdefault(multipliers[piece.unit], []).append(piece)
        return grouped


def _merge_neighbours(slices: Sequence[UnitSlice]) -> list[UnitSlice]:
    """Join touching slices of the same unit (weight and bias of a projection)."""
    merged: list[UnitSlice] = []
    for piece in slices:
        if merged and merged[-1].unit == piece.unit and merged[-1].stop == piece.start:
            merged[-1] = UnitSlice(merged[-1].start, piece.stop, piece.unit)
        else:
            merged.append(piece)
    return merged
