"""AdamW that steps views of DeepSpeed's flat partitions, each with its unit's multiplier.

Units that are whole runs of elements are stepped in one fused call per distinct multiplier, without copying anything;
units that are rows or columns (heads, neurons) in chunks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adept_ds.units.multipliers import UnitMultipliers, with_gradient
from adept_ds.units.placement import Tile

_CPU_CHUNK = 1 << 16
"""Elements whose weight, gradient, moments and copy stay in a core's cache while they are stepped and rescaled."""


class UnitAdamW(torch.optim.AdamW):
    """AdamW with one learning-rate multiplier per unit (see `UnitMultipliers`); elements of no unit stay as they are.

    Args:
        params, lr, betas, eps, weight_decay: as `torch.optim.AdamW`; one parameter group.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        if len(self.param_groups) != 1:
            raise ValueError("UnitAdamW takes one parameter group: units, not groups, carry the multipliers")
        self.multipliers = UnitMultipliers(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in with_gradient(self):
            self._step_tensor(parameter)
        return loss

    def _step_tensor(self, parameter: torch.Tensor) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        flat = [tensor.view(-1) for tensor in tensors if tensor is not None]
        slices = self.multipliers.slices_of(parameter)
        exact, factors = self.multipliers.by_index(parameter.device)
        runs_of_factor: dict[float, list[tuple[int, int]]] = {}
        for unit_slice in slices:
            if unit_slice.is_uniform:
                factor = exact[unit_slice.placement.first] * unit_slice.lr_ratio
                runs_of_factor.setdefault(factor, []).append((unit_slice.start, unit_slice.stop))
        for factor, runs in runs_of_factor.items():
            views = [[tensor[start:stop] for start, stop in _merge_neighbours(runs)] for tensor in flat]
            self._fused_step(views, state["step"], factor)
        for unit_slice in slices:
            if not unit_slice.is_uniform:
                for tile in unit_slice.tiles:
                    views = [[tile.view(tensor[unit_slice.start : unit_slice.stop])] for tensor in flat]
                    held_back = 1.0 - tile.spread(factors)
                    self._step_tile(views, state["step"], tile, held_back, unit_slice.lr_ratio)

    def _step_tile(
        self,
        views: list[list[torch.Tensor]],
        step: torch.Tensor,
        tile: Tile,
        held_back: torch.Tensor,
        lr_ratio: float,
    ) -> None:
        """Step a tile whole, then take back each row's or column's share.

        In chunks of rows: what was copied, stepped and taken back chunk by chunk crosses the memory bus once.
        """
        is_cpu = held_back.device.type == "cpu"
        rows = max(1, _CPU_CHUNK // tile.columns) if is_cpu else tile.rows
        for first in range(0, tile.rows, rows):
            chunk = [[view[first : first + rows] for view in group] for group in views]
            weight = chunk[0][0]
            old = weight.clone()
            self._fused_step(chunk, step, lr_ratio)
            weight.lerp_(old, held_back[first : first + rows] if tile.axis == 0 else held_back)

    def _fused_step(self, views: list[list[torch.Tensor]], step: torch.Tensor, factor: float) -> None:
        group = self.param_groups[0]
        # What torch.optim.AdamW(fused=True) itself ends in. The functional form around it sorts tensors by device
        # first: 80 microseconds a call, as much as the arithmetic of a chunk.
        torch._fused_adamw_(
            views[0],
            views[1],
            views[2],
            views[3],
            [],
            [step] * len(views[0]),
            lr=group["lr"] * factor,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
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


def _merge_neighbours(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join touching runs (weight and bias of a projection): fewer and longer views."""
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
