"""The ranks of a run, and the few small collectives that the program needs.

Control traffic (a handful of numbers, an error, a yes or no) goes over a gloo group on the CPU: it never waits
for an accelerator's stream, and sums are float64 on every device. Two go between the devices: of what every training
step finds out there (`sum_on_device`), and of large tensors (`slice_of_sum`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.files import writing

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the processes of a run, and how it speaks with them; by default it is alone."""

    rank: int = 0
    world_size: int = 1
    local_size: int = 1
    """Ranks on this host."""
    control: Any = None
    """Group of the small collectives below (see `groups`)."""
    of_main: Any = None
    """Group in which the others wait for what `on_main` does."""
    sign_of_life: float = 10.0
    """Seconds between two signs of life of rank 0's meanwhile."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Element-wise float64 sum over ranks: one all-reduce of len(values) * 8 bytes."""
        import torch

        total = torch.as_tensor(values, dtype=torch.float64).cpu().clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(total, group=self.control)
        return total

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, where `values` [n] are: one all-reduce between the devices, for which no host
        waits. By all ranks in the same order."""
        total = values.clone()
        if self.world_size > 1:
            import torch

            torch.distributed.all_reduce(total)
        return total

    def slice_of_sum(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's share of the element-wise sum over ranks of `values` [n]: ceil(n / ranks) elements, of which the
        last ranks' may be padding, 0.

        For what is large: one reduce-scatter between the devices, and no copy to the host. May be called in a backward
        pass, by all ranks in the same order.
        """
        if self.world_size == 1:
            return values
        import torch

        size = -(-values.numel() // self.world_size)
        padded = torch.nn.functional.pad(values, (0, size * self.world_size - values.numel()))
        share = padded.new_empty(size)
        torch.distributed.reduce_scatter_tensor(share, padded)
        return share

    def max(self, *values: float) -> list[float]:
        """Element-wise maximum over ranks, in one all-reduce."""
        import torch

        result = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            torch.distributed.all_reduce(result, op=torch.distributed.ReduceOp.MAX, group=self.control)
        return [float(value) for value in result]

    def all_equal(self, value: float) -> bool:
        """Whether every rank gave the same number; every rank gets the same answer."""
        highest, lowest = self.max(value, -value)
        return highest == -lowest

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            import torch

            torch.distributed.barrier(group=self.control)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give every rank its result; an error there ends `on_main` everywhere.

        For work that belongs to one process (writing files, looking at the disk), however long it takes: rank 0 tells
        the others every few seconds that it is still there, and they wait for its next word until the timeout. Without
        this, an error on rank 0 leaves the others waiting in a collective.

        Raises:
            AdeptError: as on rank 0; for any other error there, which rank 0 itself raises as it is, its text.
        """
        outcome: tuple[T | None, AdeptError | None] | None = None
        unexpected: Exception | None = None
        if self.is_main:
            with self._telling_the_others():
                try:
                    with writing():
                        outcome = action(), None
                except AdeptError as error:
                    outcome = None, error
                except Exception as error:
                    unexpected = error
                    outcome = None, AdeptError(f"rank 0 failed: {type(error).__name__}: {error}")
            self._word_of_main(outcome)
        while outcome is None:
            outcome = self._word_of_main(None)
        result, failure = outcome
        if unexpected is not None:
            raise unexpected
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    @contextmanager
    def _telling_the_others(self) -> Iterator[None]:
        """On rank 0: while it works alone, a thread gives signs of life."""
        if self.world_size == 1:
            yield
            return
        done = threading.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # a rank is gone: the next word will fail where it is seen
                while not done.wait(self.sign_of_life):
                    self._word_of_main(None)

        thread = threading.Thread(target=tell, name="sign of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _word_of_main(self, word: Any) -> Any:
        """What rank 0 says, on every rank; None: it is still at work."""
        words = [word]
        if self.world_size > 1:
            import torch

            torch.distributed.broadcast_object_list(words, src=0, group=self.of_main)
        return words[0]

    def on_each(self, action: Callable[[], T], remedy: str) -> T:
        """Run `action`, which reads files, on every rank; where one of them cannot, all end with the same error.

        Raises:
            InputError: naming the first rank that failed, and `remedy` where its error names none.
        """
        result, complaint = None, ""
        try:
            result = action()
        except InputError as error:
            complaint = str(error)  # which names a remedy itself
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}; {remedy}"
        failed = [(rank, text) for rank, text in enumerate(self.gather(complaint)) if text]
        if failed:
            raise InputError(f"rank {failed[0][0]}: {failed[0][1]}")
        return result  # type: ignore[return-value]
