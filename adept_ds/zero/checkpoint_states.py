"""What DeepSpeed would write into a checkpoint, handed over instead of written.

DeepSpeed (0.19.8) writes through `engine.checkpoint_engine` (runtime/checkpoint_engine/checkpoint_engine.py), and
copies two scripts beside its checkpoints on rank 0 alone, where a full disk would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adept_ds.zero.engine import Engine

_DIRECTORY = "checkpoint"


def checkpoint_states(engine: Engine, client_state: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's files by name, and what `torch.save` is to write there; tensors are the engine's own. Collective.

    What is frozen is left out. DeepSpeed's own tools take a checkpoint of these files.
    """
    from deepspeed.checkpoint.constants import (
        UNIVERSAL_CHECKPOINT_INFO,
        UNIVERSAL_CHECKPOINT_VERSION_KEY,
        UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    )

    # Without it ds_to_universal refuses stages 1 and 2.
    universal = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
    with _handed_over(engine) as states:
        engine.save_checkpoint(
            _DIRECTORY,
            tag=_DIRECTORY,
            client_state=universal | dict(client_state),
            exclude_frozen_parameters=True,
            save_latest=False,
        )
    return states


@contextmanager
def _handed_over(engine: Engine) -> Iterator[dict[str, Any]]:
    """Meanwhile the engine writes nothing."""
    collector, before = _Collector(), engine.checkpoint_engine
    engine.checkpoint_engine, engine._copy_recovery_script = collector, lambda folder: None
    try:
        yield collector.states
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script  # the class's shows again


class _Collector:
    """Stands for a `CheckpointEngine`."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.states[Path(path).name] = state_dict

    def create(self, info: Any) -> None: ...
    def commit(self, info: Any) -> None: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True
