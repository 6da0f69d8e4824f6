"""How many tokens' logits are held at once where a head's loss is formed chunk by chunk.

Every chunk of c tokens reads the head's weight [V, D], of e bytes an element, twice: for logits, and for the gradient
of what enters the head. For n tokens that is

    n / c * 2 V D e  bytes,

beside about 40 n V that their logits move themselves, whatever c is (written by the product, read and written in
float32 by what makes a loss and a gradient of them). With V = 128,256, D = 4096, bf16 and n = 4096, logits move 21 GB
and the weight

    c = 130 (64 MiB of logits)    67 GB, in 32 chunks
    c = 2,048 (2.5 GiB)           4.2 GB, in two

A product is limited by memory as long as its 2 c V D operations on V D e bytes, 2 c / e for each byte, are fewer than
the device can do in the time: some 300 on an accelerator, which 130 tokens in bf16 do not reach; 10 to 50 on a CPU.

So an accelerator gives a thirty-second part of its memory to a chunk, and a CPU, whose memory is that of all ranks of
the host, what it always did. A run that goes on forms the same chunks: they follow from the device, not from what of
its memory happens to be free.
"""

from __future__ import annotations

import torch

from adept_ds.models.device import device_memory_bytes

_SHARE = 32
"""Of an accelerator's memory, that is not given to a chunk for one that is."""


def tokens_at_once(tokens: int, weight: torch.Tensor, bytes_per_logit: int, logits_on_cpu: int) -> int:
    """How many of so many tokens a chunk has: about as many in each, since small products are slow ones.

    Args:
        weight: of the head. [vocab, dim]
        bytes_per_logit: that are held together, all intermediate results included.
        logits_on_cpu: so many are held at once there.
    """
    memory = device_memory_bytes(weight.device)
    logits = logits_on_cpu if memory is None else memory // _SHARE // bytes_per_logit
    most = max(1, logits // weight.shape[0])
    return -(-tokens // -(-tokens // most)) if tokens else 1


def bytes_per_logit(weight: torch.Tensor, divisor: float, cap: float | None) -> int:
    """What `head_logits` and the gradient after it hold: the head's own output or the gradient in its precision, logits
    and log-probabilities in float32, and what a divisor or a cap makes of them."""
    product = 0 if weight.dtype == torch.float32 else weight.element_size()
    return product + 8 + (4 if divisor != 1 else 0) + (8 if cap is not None else 0)
