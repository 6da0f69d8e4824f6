"""Copies to the host are counted where there is no device, by who asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_copies import HostCopies

from adept_ds.models.head_loss import shifted_labels


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: 1 if x[1] else 2,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
    ],
)
def test_what_the_host_asks_of_a_tensor_is_a_copy(ask: Callable[[torch.Tensor], Any]) -> None:
    numbers = torch.arange(4.0)
    with HostCopies() as copies:
        ask(numbers)
    assert len(copies.seen) == 1
    assert numbers.tolist() == [0, 1, 2, 3], "methods are as they were"


def test_what_follows_from_a_copy_alone_is_on_the_host() -> None:
    numbers = torch.arange(4.0)
    with HostCopies() as copies:
        copied = numbers.cpu()
        assert (copied[1:] + 1).tolist() == [2, 3, 4]
        assert bool((copied >= 0).all())
        assert len(copies.seen) == 1
        (copied + numbers).tolist()
    assert len(copies.seen) == 2, "a tensor that has to do with one on the device is there"


def test_arithmetic_asks_for_nothing_and_a_whole_wait_counts() -> None:
    from deepspeed.accelerator import get_accelerator

    with HostCopies() as copies:
        shifted_labels(torch.ones(2, 3, dtype=torch.int64)).sum().add_(1).sqrt()
        assert copies.seen == []
        get_accelerator().synchronize()
    assert len(copies.seen) == 1


def test_a_copy_is_known_by_the_function_that_asked() -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    with HostCopies() as copies:
        find_packed_sequence_indices(torch.arange(5).unsqueeze(0))
    assert copies.by_place() == {"transformers/masking_utils.py find_packed_sequence_indices": 1}
    assert (copies.of("transformers"), copies.of("adept_ds")) == (1, 0)
