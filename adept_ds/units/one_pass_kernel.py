"""The AdamW pass of `one_pass` as one Triton kernel.

Each program goes through a block of `BLOCK` elements of one segment: it reads the segment's numbers once, tells the
unit of each element from them, reads that unit's multiplier, and reads and writes weight and moments once. 28 bytes an
element, and 4 for a block. Integers beyond 32 bits are those of the block alone: divisions of 64 bits are slow there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from adept_ds.units.segments import BLOCK, Segments


def by_triton(
    flat: list[torch.Tensor],
    segments: Segments,
    multipliers: torch.Tensor,
    correction: torch.Tensor,
    group: Mapping[str, Any],
) -> None:
    """A `one_pass.Pass`; on the host too, by Triton's interpreter (TRITON_INTERPRET=1)."""
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    number = segments.stops.numel()
    if not segments.num_blocks:
        return
    adamw_kernel[(segments.num_blocks,)](
        *flat,
        multipliers,
        correction,
        segments.blocks,
        segments.block_table,
        segments.table,
        segments.ratios,
        number,
        lr,
        lr * group["weight_decay"],
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        float(group["eps"]),
        size=BLOCK,
    )


@triton.jit
def adamw_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    multipliers_ptr,
    correction_ptr,
    blocks_ptr,
    block_table_ptr,
    table_ptr,
    ratios_ptr,
    number,
    lr,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    size: tl.constexpr,
):
    """See `Segments` for what its tables hold."""
    block = tl.program_id(0)
    segment = tl.load(blocks_ptr + block)
    start = tl.load(block_table_ptr + segment)
    first_block = tl.load(block_table_ptr + number + segment)
    stop = tl.load(block_table_ptr + 2 * number + segment)
    shift = tl.load(table_ptr + segment)
    modulus = tl.load(table_ptr + number + segment)
    divisor = tl.load(table_ptr + 2 * number + segment).to(tl.int32)
    count = tl.load(table_ptr + 3 * number + segment).to(tl.int32)
    first = tl.load(table_ptr + 4 * number + segment)

    begin = start + (block - first_block) * size
    lane = tl.arange(0, size)
    at = begin + lane
    inside = at < stop
    place = (((begin + shift) % modulus).to(tl.int32) + lane) % modulus.to(tl.int32)
    unit = first + place // divisor % count
    factor = tl.load(multipliers_ptr + unit, mask=inside, other=0.0) * tl.load(ratios_ptr + segment)

    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0) * beta1 + grad * rest1
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=1.0) * beta2 + grad * grad * rest2
    root = tl.sqrt_rn(exp_avg_sq) * tl.load(correction_ptr + 1) + eps
    update = tl.div_rn(exp_avg, root) * tl.load(correction_ptr)  # rounded as everywhere else, not approximated
    weight = weight * (1.0 - factor * decay) - factor * lr * update
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
