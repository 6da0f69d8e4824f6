"""What a training run writes about itself: metrics and units, as JSON lines and for TensorBoard. Rank 0 only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from adept_ds.base.errors import MachineError, StopRequestedError
from adept_ds.base.files import write_bytes, writing
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import LogLine, log_line, read_log, scalars
from adept_ds.training.trackers import How
from adept_ds.training.tracking import Tracking
from adept_ds.units.registry import Unit

Line = TypeVar("Line", bound=LogLine)


class _StepOrRefresh(LogLine):
    """Of metrics.jsonl, as far as it tells which lines there should be."""

    loss: float | None = None
    refresh_seconds: float | None = None


class RunLog:
    """Appends records.

    Args:
        active: on other ranks than 0 every method does nothing.
        first_step: training (re)starts after this step. Later records are from a run that crashed after its last
            checkpoint: they are removed, so that every step appears once.
        say: is told of what a crash left half written, and of lines that are lost.
        tracking: follows what is written here.

    Raises:
        InputError: a line of an earlier start is damaged.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        first_step: int,
        config_text: str,
        *,
        active: bool = True,
        say: Callable[[str], None] = lambda line: None,
        tracking: Tracking | None = None,
    ) -> None:
        self._active, self._run_dir, self._tracking = active, run_dir, tracking
        self._late: dict[str, Any] | None = None
        if not active:
            return
        kept = _keep_until(run_dir.metrics, first_step, _StepOrRefresh, say)
        refreshes = {line.step for line in kept if line.refresh_seconds is not None}
        trained = set(range(1, first_step + 1))
        _say_what_is_lost(
            run_dir.metrics, trained - {line.step for line in kept if "loss" in line.model_fields_set}, say
        )
        for path, expected in ((run_dir.unit_importance, refreshes), (run_dir.unit_movement, refreshes - {0})):
            found = {line.step for line in _keep_until(path, first_step, LogLine, say)}
            _say_what_is_lost(path, expected - found, say)
        self._board = _Board(run_dir.tensorboard, first_step)
        self._board.write("text", "config", f"```yaml\n{config_text}\n```", first_step)
        if tracking is not None:
            tracking.start()

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: {"step", "loss", ...}.

        It is written at the next call, whichever that is: best while the device is busy with the step after it.
        """
        self.catch_up()
        self._late = record

    def catch_up(self) -> None:
        """Write the last step, if it is not: before whatever may be found on the disk later than it."""
        record, self._late = self._late, None
        if record is not None:
            self._write(record)

    def evaluation(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        self.catch_up()
        self._write({"step": step, "eval": results})

    def guard(self, step: int, record: dict[str, Any]) -> None:
        """What the guard found at an evaluation (see `training.guard`)."""
        self.catch_up()
        self._write({"step": step, "guard": record})

    def refresh(
        self,
        step: int,
        units: Sequence[Unit],
        importance: Sequence[float],
        multipliers: Sequence[float],
        seconds: float,
        domain_importance: Sequence[float] | None = None,
    ) -> None:
        """Importances and the multipliers that hold from the next step on.

        Args:
            domain_importance: where multipliers follow from importances for the domain too.
        """
        self.catch_up()
        if not self._active:
            return
        records = [
            {"unit": unit.name, "kind": unit.kind, "importance": value, "multiplier": multiplier}
            for unit, value, multiplier in zip(units, importance, multipliers, strict=True)
        ]
        for record, value in zip(records, domain_importance or (), strict=domain_importance is not None):
            record["domain_importance"] = value
        _append(self._run_dir.unit_importance, {"step": step, "units": records})
        self._show_units("multiplier", step, units, multipliers)
        self._write({"step": step, "refresh_seconds": seconds})

    def movement(
        self,
        step: int,
        since: int,
        units: Sequence[Unit],
        multipliers: Sequence[float],
        moved: Sequence[float],
        moved_since_start: Sequence[float],
    ) -> None:
        """L2 norms of how far units moved from step `since` to `step`, beside the multipliers that held meanwhile.

        TensorBoard gets the root mean square over a unit's elements since the start, so that sizes do not show.
        """
        self.catch_up()
        if not self._active:
            return
        records = [
            {"unit": unit.name, "kind": unit.kind, "numel": unit.numel, "multiplier": m}
            | {"moved": recent, "moved_since_start": total}
            for unit, m, recent, total in zip(units, multipliers, moved, moved_since_start, strict=True)
        ]
        _append(self._run_dir.unit_movement, {"step": step, "since": since, "units": records})
        rms = [total / unit.numel**0.5 for unit, total in zip(units, moved_since_start, strict=True)]
        self._show_units("movement", step, units, rms)

    def close(self, how: How = "finished") -> None:
        try:
            self.catch_up()
            if self._active:
                self._board.close()
        finally:
            if self._active and self._tracking is not None:
                self._tracking.finish(how)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error too: a thread of TensorBoard's that finds the disk full says so to whoever listens then."""
        stopped = kind is not None and issubclass(kind, StopRequestedError)
        with suppress(MachineError) if kind else nullcontext():
            self.close("stopped" if stopped else "failed" if kind else "finished")

    def _show_units(self, group: str, step: int, units: Sequence[Unit], values: Sequence[float]) -> None:
        """A curve for each unit, but of the heads or neurons of a layer their mean and a histogram."""
        parts: dict[str, list[float]] = {}
        for unit, value in zip(units, values, strict=True):
            parts.setdefault(f"{group}/{unit.place}", []).append(value)
        for tag, members in parts.items():
            self._board.write("scalar", tag, sum(members) / len(members), step)
            if len(members) > 1:
                self._board.write("histogram", tag, np.array(members), step)

    def _write(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and its numbers for TensorBoard; trackers read that file (see `tracking`)."""
        if not self._active:
            return
        _append(self._run_dir.metrics, record)
        for name, value in scalars(record).items():
            self._board.write("scalar", name, value, record["step"])


class _Board:
    """TensorBoard's files. What it cannot write shows at one of the next calls. Raises as `writing`."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        with writing(directory):
            self._writer = SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)

    def write(self, kind: str, *content: Any) -> None:
        with writing(self._directory):
            getattr(self._writer, f"add_{kind}")(*content)

    def close(self) -> None:
        with writing(self._directory):
            self._writer.close()


def check_logs(run_dir: RunDirectory) -> None:
    """Before anything is written: the lines of an earlier start can be read. Raises `InputError`: one is damaged."""
    for path in (run_dir.metrics, run_dir.unit_importance, run_dir.unit_movement):
        for _ in read_log(path, LogLine):
            pass


def _append(path: Path, record: dict[str, Any]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(log_line(record))


def _keep_until(path: Path, step: int, kind: type[Line], say: Callable[[str], None]) -> list[Line]:
    """Drop the records after `step`, and return the others; of step 0 itself (the start) nothing is kept, it is written
    again."""
    if not path.is_file():
        return []
    kept = [(line, record) for line, record in read_log(path, kind, say) if record.step <= step] if step else []
    write_bytes(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]


def _say_what_is_lost(path: Path, steps: Collection[int], say: Callable[[str], None]) -> None:
    """A log cannot be made again, and training does not need it."""
    if steps:
        first, last = min(steps), max(steps)
        which = f"step {first}" if first == last else f"steps {first} to {last}"
        say(f"'{path}' has lost lines of {which}: the report goes without them")
