"""How many logits are held at once: by the memory of the device, and on a CPU as ever."""

from __future__ import annotations

import math

import pytest
import torch

from adept_ds.models import head_chunks
from adept_ds.models.device import device_memory_bytes
from adept_ds.models.head_chunks import bytes_per_logit, tokens_at_once

VOCABULARY, DIM, TOKENS = 128_256, 4096, 4096


def weight_traffic(chunk: int, tokens: int = TOKENS) -> float:
    """GB of a bf16 head that are read for the losses and gradients of so many tokens."""
    return math.ceil(tokens / chunk) * 2 * VOCABULARY * DIM * 2 / 1e9


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """That of a large model in bf16 on a device of 80 GiB."""
    monkeypatch.setattr(head_chunks, "device_memory_bytes", lambda device: 80 * 2**30)
    return torch.empty(VOCABULARY, DIM, dtype=torch.bfloat16, device="meta")


def test_a_large_vocabulary_is_no_reason_to_read_the_head_many_times(head: torch.Tensor) -> None:
    """The figures of the docstring."""
    chunk = tokens_at_once(TOKENS, head, bytes_per_logit(head, 1.0, None), 1 << 24)
    assert chunk == 2048
    assert weight_traffic((1 << 24) // VOCABULARY) == pytest.approx(67, abs=1)
    assert weight_traffic(chunk) == pytest.approx(4.2, abs=0.05)


def test_a_chunk_keeps_within_its_share_of_memory_whatever_is_done_to_logits(head: torch.Tensor) -> None:
    for transform in ((1.0, None), (3.0, None), (1.0, 30.0), (3.0, 30.0)):
        each = bytes_per_logit(head, *transform)
        chunk = tokens_at_once(1 << 30, head, each, 1)
        assert 0.99 * 80 * 2**30 / 32 < chunk * VOCABULARY * each <= 80 * 2**30 / 32


def test_on_a_cpu_it_is_a_number_of_logits_and_chunks_are_about_as_large() -> None:
    head = torch.empty(49152, 8)
    assert device_memory_bytes(head.device) is None
    logit = bytes_per_logit(head, 1.0, None)
    assert (1 << 24) // 49152 == 341
    chunks = [tokens_at_once(tokens, head, logit, 1 << 24) for tokens in (340, 341, 342, 512, 1024)]
    assert chunks == [340, 341, 171, 256, 256]
    assert tokens_at_once(7, head, 4, 1) == 1, "one token at least"
