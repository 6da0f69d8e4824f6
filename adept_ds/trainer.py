"""Stage two: the training loop.

Everything that belongs to optimizer step N (its metrics, a refresh, an evaluation) happens before checkpoint N is
written, so a resumed run begins with step N + 1 and repeats nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adept_ds import zero
from adept_ds.checkpoint import Manifest, load_checkpoint, save_checkpoint, tag_of
from adept_ds.config import Config, TrainSection
from adept_ds.data import TrainingData
from adept_ds.distributed import local_size, max_over_ranks, rank, sum_over_ranks, world_size
from adept_ds.errors import StopRequestedError
from adept_ds.evaluation import EvalSet, evaluate
from adept_ds.flops import StepFlops
from adept_ds.importance import OnlineImportance, ProbeBatches, estimate_importance
from adept_ds.memory import free_memory_bytes, peak_memory_bytes
from adept_ds.movement import UnitMovement
from adept_ds.prefix import FrozenPrefix
from adept_ds.runlog import RunLog
from adept_ds.stopping import StopRequest
from adept_ds.terminal import Terminal
from adept_ds.unit_lr import UnitLR


def lr_factor(step: int, train: TrainSection) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of `train.lr`: warmup, then the schedule, to 0."""
    warmup = math.ceil(train.warmup_ratio * train.steps)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, train.steps - warmup)
    if train.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0 - share if train.schedule == "linear" else 1.0


def take_step(
    engine: Any, data: TrainingData, step: int, train: TrainSection, online: OnlineImportance | None
) -> tuple[float, float]:
    """Optimizer step `step` (from 0). Returns this rank's losses, summed over domain rows and over replayed ones.

    Args:
        online: sees the gradient of the replayed rows alone; they must then fill whole micro-batches of every rank.
    """
    domain_loss = replay_loss = 0.0
    batches = data.micro_batches(step, train, rank(), world_size())
    replayed = sum(rows[-1].replayed for rows in batches)
    add_replayed: Callable[[], None] | None = None
    for number, rows in enumerate(batches, start=1):
        input_ids, labels = (tensor.to(engine.device) for tensor in data.batch(rows))
        losses = engine(input_ids, labels) / (data.domain.seq_len - 1)  # blocks are full: all but the first token count
        backward = partial(engine.backward, losses.mean())
        if online and number == replayed:
            share = data.replayed / train.global_batch_size
            add_replayed = zero.end_segment(engine, backward, partial(online.observe, share))
        else:
            backward()
        if add_replayed and number == len(batches):
            add_replayed()
        engine.step()
        for row, loss in zip(rows, losses.detach().tolist(), strict=True):
            domain_loss, replay_loss = domain_loss + loss * (not row.replayed), replay_loss + loss * row.replayed
    return domain_loss, replay_loss


@dataclass
class Trainer:
    """One training run on one engine. `run` does everything; the rest are its steps."""

    config: Config
    engine: Any
    optimizer: torch.optim.Optimizer
    unit_lr: UnitLR
    data: TrainingData
    probe: ProbeBatches | None
    """Text of refreshes; None if they need none, or if there are none."""
    prefix: FrozenPrefix | None
    online: OnlineImportance | None
    movement: UnitMovement
    eval_sets: list[EvalSet]
    manifest_at: Callable[[int], Manifest]
    flops: StepFlops
    matmul_rate: float
    """Operations per second of one rank's device."""
    terminal: Terminal
    stop: StopRequest

    def __post_init__(self) -> None:
        self._checkpoints = self.config.run_dir / "checkpoints"

    def run(self, first_step: int, initial_importance: list[float] | None, config_text: str) -> None:
        """Train from `first_step` (0: from the start) to the end.

        Raises:
            StopRequestedError: a signal came; a checkpoint was written.
        """
        train = self.config.train
        log = RunLog(self.config.run_dir, first_step, config_text)
        with self.terminal.progress("training") as bar:
            if first_step:
                self._resume(first_step)
            else:
                self._start(log, initial_importance)
            for step in range(first_step, train.steps):
                record, stop_agreed = self._train_step(step)
                log.step(record)
                bar((step + 1) / train.steps, _progress_text(record, train.steps))
                if step == first_step:
                    self._keep_frozen_gathered()
                self._after_step(step + 1, log)
                is_last = step + 1 == train.steps
                if stop_agreed or is_last or (step + 1) % train.checkpoint_every == 0:
                    self._save(step + 1)
                if stop_agreed and not is_last:
                    log.close()
                    raise StopRequestedError(f"stopped after step {step + 1} of {train.steps}; checkpoint written")
        log.close()

    def _start(self, log: RunLog, importance: list[float] | None) -> None:
        """Multipliers and losses before the first step."""
        if importance is not None:
            multipliers = self.unit_lr.refresh(importance)
            log.refresh(0, self.unit_lr.registry.units, importance, multipliers, 0.0)
        self._evaluate(0, log)

    def _save(self, step: int) -> None:
        state = {"movement_since": self.movement.since, "online": self.online and self.online.state_dict()}
        save_checkpoint(
            self.engine,
            self._checkpoints,
            self.manifest_at(step),
            self.config.train.keep_checkpoints,
            state,
            lambda directory: self.movement.save(directory, step),
        )

    def _resume(self, step: int) -> None:
        state = load_checkpoint(self.engine, self._checkpoints, self.manifest_at(step))
        self.unit_lr.check_ranks_agree()
        self.movement.load(self._checkpoints / tag_of(step), step, state["movement_since"])
        if self.online:
            self.online.load_state_dict(state["online"])

    def _keep_frozen_gathered(self) -> None:
        """Use the memory that the first step left over; after it, because a step's peak is known then."""
        budget = self.config.train.keep_gathered_gib
        mine = free_memory_bytes(local_size()) / 2 if budget == "auto" else budget * 2**30
        (agreed,) = max_over_ranks(-mine)
        kept, frozen = zero.keep_frozen_gathered(self.engine, int(-agreed))
        if kept:
            self.terminal.stage("", f"{kept / 2**30:.2f} of {frozen / 2**30:.2f} GiB of frozen weights stay gathered")

    def _train_step(self, step: int) -> tuple[dict[str, Any], bool]:
        """One optimizer step: its record, and whether the ranks agreed to stop after it."""
        train = self.config.train
        start = time.perf_counter()
        lr = train.lr * lr_factor(step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        domain, replay = take_step(self.engine, self.data, step, train, self.online)
        domain, replay, stops = sum_over_ranks([domain, replay, float(self.stop.requested)]).tolist()
        seconds = time.perf_counter() - start
        size, replayed = train.global_batch_size, self.data.replayed
        tokens = size * self.data.domain.seq_len
        loss = (domain + replay) / size
        record = {
            "step": step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": _finite(self.engine.get_global_grad_norm()),
            "tokens": (step + 1) * tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops.total * tokens / seconds / (self.matmul_rate * world_size()),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if replayed:
            record |= {"domain_loss": domain / (size - replayed), "replay_loss": replay / replayed}
        if train.precision == "fp16":
            record |= {"loss_scale": zero.loss_scale(self.engine)}
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at step {step + 1}; lower train.lr")
        return record, stops > 0

    def _after_step(self, step: int, log: RunLog) -> None:
        config, units = self.config, self.unit_lr.registry.units
        is_last = step == config.train.steps
        refreshes = (self.probe or self.online) and step % config.importance.every == 0 and not is_last
        if refreshes or is_last:
            since, multipliers = self.movement.since, self.unit_lr.multipliers
            log.movement(step, since, units, multipliers, *self.movement.measure(step))
        if refreshes:
            start = time.perf_counter()
            importance = self._importance()
            if importance is not None:
                multipliers = self.unit_lr.refresh(importance)
                log.refresh(step, units, importance, multipliers, time.perf_counter() - start)
        if step % config.train.eval_every == 0 or is_last:
            self._evaluate(step, log)

    def _importance(self) -> list[float] | None:
        if self.online:
            return self.online.take()
        assert self.probe is not None
        return estimate_importance(self.engine, self.unit_lr.registry, self.probe, prefix=self.prefix)

    def _evaluate(self, step: int, log: RunLog) -> None:
        if not self.eval_sets:
            return
        with zero.outside_training(self.engine), self.terminal.progress("evaluating") as bar:
            results = evaluate(
                self.engine,
                self.eval_sets,
                batch_size=self.config.train.micro_batch_size,
                device=self.engine.device,
                progress=bar,
            )
        log.evaluation(step, results)
        losses = ", ".join(f"{name} {result['loss']:.4f}" for name, result in results.items())
        self.terminal.stage("", f"step {step}: held-out loss {losses}")


def _progress_text(record: dict[str, Any], steps: int) -> str:
    return f"step {record['step']}/{steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tokens/s"


def _finite(value: Any) -> float | None:
    """fp16 has no norm in a step that overflowed."""
    return None if value is None or not math.isfinite(value) else float(value)
