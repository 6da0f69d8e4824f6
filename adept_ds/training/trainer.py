"""Stage two: the training loop.

Everything that belongs to optimizer step N (its metrics, a refresh, an evaluation) happens before checkpoint N is
written, so a resumed run begins with step N + 1 and repeats nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.markup import escape

from adept_ds.base.errors import NonFiniteLossError, StopRequestedError
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag
from adept_ds.base.terminal import Terminal
from adept_ds.config.schema import Config
from adept_ds.data.ahead import BatchesAhead
from adept_ds.data.training_data import TrainingData
from adept_ds.models.device import free_memory_bytes, peak_memory_bytes
from adept_ds.models.flops import StepFlops
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.training.anchor import Anchor
from adept_ds.training.checkpoint import UNIT_NAMES, CheckpointManifest, load_checkpoint
from adept_ds.training.checkpoint_choice import put_aside
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.training.checkpoint_writer import CheckpointWriter, Retention
from adept_ds.training.copy_dropout import CopyDropout
from adept_ds.training.evaluation import EvalSet, evaluate
from adept_ds.training.guard import Guard
from adept_ds.training.movement import UnitMovement
from adept_ds.training.rule import Refresh, TrainingRule
from adept_ds.training.run_log import RunLog
from adept_ds.training.skipping import Skips, in_words
from adept_ds.training.step import accumulate_gradient, lr_factor, update_weights
from adept_ds.training.tracking import Tracking
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.engine import Engine, set_learning_rate
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import loss_scale
from adept_ds.zero.layout import trained_weights_are_finite
from adept_ds.zero.outside_training import outside_training


@dataclass
class Trainer:
    """One training run on one engine. `run` does everything; the rest are its steps."""

    config: Config
    run_dir: RunDirectory
    ranks: Ranks
    engine: Engine
    unit_lr: UnitLR
    data: TrainingData
    rule: TrainingRule
    """What the method adds."""
    movement: UnitMovement
    eval_sets: list[EvalSet]
    manifest_at: Callable[[int], CheckpointManifest]
    copy_dropout: CopyDropout
    flops_without: Callable[[frozenset[int]], StepFlops]
    """Of a step that goes around these layers."""
    matmul_rate: float
    """Operations per second of one rank's device."""
    terminal: Terminal
    stop: StopRequest
    anchor: Anchor | None = None
    guard: Guard | None = None
    _tokens: int = 0
    """Trained on so far, interruptions included."""
    _save_is_due: bool = False

    def __post_init__(self) -> None:
        self._skips = Skips(self.config.train)
        self._batches = BatchesAhead(self.data, self.config.train, self.ranks, self.engine.device)

    @cached_property
    def _writer(self) -> CheckpointWriter:
        train, how = self.config.train, self.config.checkpoint
        retention = Retention(max(2, train.keep_checkpoints), how.keep_every * train.checkpoint_every)
        return CheckpointWriter(self.engine, self.run_dir.checkpoints, self.ranks, retention, background=how.background)

    def run(self, first_step: int, config_text: str) -> None:
        """Train from `first_step` (0: from the start) to the end.

        Raises:
            StopRequestedError: a signal came; a checkpoint was written, unless the last steps were skipped.
            NonFiniteLossError: too many steps in a row were skipped, or the last one was, or weights are no numbers, or
                an evaluation or a refresh met what is none; a checkpoint of weights that are broken was put aside.
        """
        train = self.config.train
        with (
            RunLog(
                self.run_dir,
                first_step,
                config_text,
                active=self.ranks.is_main,
                say=self._say,
                tracking=Tracking(self.config, self.run_dir, first_step, self._say) if self.ranks.is_main else None,
            ) as self._log,
            self.terminal.progress("training", together=True) as bar,
            self._checkpoints(),
        ):
            if first_step:
                self._resume(first_step)
            else:
                self._start()
            for step in range(first_step, train.steps):
                record, stop_agreed, written = self._train_step(step)
                if written:
                    self._writer.finish()
                self._log.step(record)
                if "skipped" in record:
                    self._check_skipped(step + 1, record)
                bar((step + 1) / train.steps, _progress_text(record, train.steps))
                if step == first_step:
                    self._keep_frozen_gathered()
                self._after_step(step + 1)
                is_last = step + 1 == train.steps
                if self.guard and self.guard.stops:
                    self._end_by_guard(step + 1)
                    break
                self._save_is_due |= stop_agreed or (step + 1) % train.checkpoint_every == 0
                if is_last or (self._save_is_due and self._may_save(step + 1)):
                    self._save(step + 1)
                if stop_agreed and not is_last:
                    self._writer.finish()
                    done = "the last steps were skipped" if self._skips.in_a_row else "checkpoint written"
                    raise StopRequestedError(f"stopped after step {step + 1} of {train.steps}; {done}")
            self._writer.finish()

    @contextmanager
    def _checkpoints(self) -> Iterator[None]:
        """Of a checkpoint that is still being written nothing stays where training ends with an error; but where all
        ranks end alike, because of a loss, it is completed: it is what to go on from."""
        try:
            yield
        except NonFiniteLossError:
            self._writer.finish()
            raise
        finally:
            self._writer.discard()

    def _say(self, line: str) -> None:
        self.terminal.stage("train", escape(line))

    def _start(self) -> None:
        """Multipliers and losses before the first step."""
        self._refresh(self.rule.start, 0)
        self._evaluate(0)

    def _may_save(self, step: int) -> bool:
        """Not behind a step that was skipped, but for the last one."""
        return step == self.config.train.steps or not self._skips.in_a_row

    def _save(self, step: int) -> None:
        self._log.catch_up()
        if self.ranks.max(0.0 if trained_weights_are_finite(self.engine) else 1.0)[0]:
            raise self._given_up(f"weights are no numbers after step {step}", step)
        self._save_is_due = False
        state = {
            "movement_since": self.movement.since,
            "rule": self.rule.state_dict(),
            "tokens": self._tokens,
            "skips": self._skips.state_dict(),
        }
        if self.guard:
            state |= {"guard": self.guard.state_dict()}

        def more(files: CheckpointFiles) -> None:
            self.movement.save(files, step)
            self.rule.save(files)
            if self.ranks.is_main:
                files.add_json(UNIT_NAMES, self.unit_lr.registry.names)

        self._writer.save(self.manifest_at(step), state, more, stays={self.guard.best} if self.guard else set())

    def _end_by_guard(self, step: int) -> None:
        assert self.guard is not None
        self._save(step)
        self._writer.finish()
        record = self.guard.stop(step)
        self.ranks.on_main(lambda: record.save(self.run_dir.guard))

    def _resume(self, step: int) -> None:
        state = load_checkpoint(self.engine, self.run_dir.checkpoints, self.manifest_at(step), self.ranks)
        self._tokens = state["tokens"]
        self.unit_lr.check_ranks_agree()
        checkpoint = self.run_dir.checkpoints / checkpoint_tag(step)
        self.movement.load(checkpoint, step, state["movement_since"])
        self.rule.load(checkpoint, state["rule"])
        if "skips" in state:  # of an older version not
            self._skips.load_state_dict(state["skips"])
        if self.guard and "guard" in state:
            there = self.ranks.on_main(lambda: checkpoint_steps(self.run_dir.checkpoints))
            self.guard.load_state_dict(state["guard"], there)

    def _keep_frozen_gathered(self) -> None:
        """Use the memory that the first step left over; after it, because a step's peak is known then."""
        budget = self.config.train.keep_gathered_gib
        mine = free_memory_bytes(self.ranks.local_size) / 2 if budget == "auto" else budget * 2**30
        (agreed,) = self.ranks.max(-mine)
        kept, frozen = keep_frozen_gathered(self.engine, int(-agreed))
        if kept:
            self.terminal.stage("", f"{kept / 2**30:.2f} of {frozen / 2**30:.2f} GiB of frozen weights stay gathered")

    def _train_step(self, step: int) -> tuple[dict[str, Any], bool, bool]:
        """One optimizer step: its record, whether the ranks agreed to stop after it, and whether all of them have
        written a checkpoint that is to be published.

        The host waits for the device once, for a handful of numbers that say all of it (see `update_weights`).
        """
        train = self.config.train
        start = time.perf_counter()
        lr = train.lr * lr_factor(step, train) * (self.guard.factor if self.guard else 1.0)
        set_learning_rate(self.engine, lr)
        batch = self._batches.of_step(step)
        further = self.anchor.backward_passes(step) if self.anchor else []
        with self.copy_dropout.of_step(step) as bypassed:
            domain, replay = accumulate_gradient(self.engine, batch, self.rule.online, further)
        anchor = self.anchor.take() if self.anchor else torch.zeros_like(domain)
        terms = self.rule.before_update()
        self._log.catch_up()  # while the device computes
        own = {"domain": domain, "replay": replay, "anchor": anchor, **self._signs(domain), **terms}

        def seen(told: Mapping[str, float]) -> float:
            """What is looked at as the loss."""
            loss = (told["domain"] + told["replay"]) / batch.predicted
            return loss if math.isfinite(told["anchor"]) else told["anchor"]

        told, grad_norm = update_weights(
            self.engine, self.ranks, own, lambda told: self._skips.largest_norm(seen(told))
        )
        skipped = self._skips.decide(seen(told), grad_norm)
        if skipped:
            self.rule.take_back()
        seconds = time.perf_counter() - start
        operations = self.flops_without(bypassed).total * batch.tokens
        operations += self.anchor.operations(step) if self.anchor else 0.0
        self._tokens += batch.tokens
        record: dict[str, Any] = {
            "step": step + 1,
            "loss": (told["domain"] + told["replay"]) / batch.predicted,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": self._tokens,
            "seconds": seconds,
            "tokens_per_second": batch.tokens / seconds,
            "mfu": operations / seconds / (self.matmul_rate * self.ranks.world_size),
            "peak_memory_bytes": peak_memory_bytes(),
            **{name: told[name] for name in terms},
        }
        if batch.replay_predicted:
            record |= {"domain_loss": told["domain"] / (batch.predicted - batch.replay_predicted)}
            record |= {"replay_loss": told["replay"] / batch.replay_predicted}
        if train.copy_dropout:
            record |= {"bypassed": sorted(bypassed)}
        if self.anchor:
            record |= self.anchor.record(step, told["anchor"])
        if train.precision == "fp16":
            record |= {"loss_scale": loss_scale(self.engine)}
        if skipped:
            record |= {"skipped": skipped, "skipped_steps": self._skips.total}
            if skipped == "loss":
                on_ranks = self.ranks.gather(float(domain + replay + anchor))
                record |= {"ranks": [rank for rank, of in enumerate(on_ranks) if not math.isfinite(of)]}
        return record, told["stop"] > 0, told["written"] == self.ranks.world_size

    def _signs(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """What this rank wants the others to know after the step; it rides along with the losses."""
        signs = {"stop": self.stop.requested, "written": self._writer.is_written}
        return {name: torch.full_like(like, float(sign)) for name, sign in signs.items()}

    def _check_skipped(self, step: int, record: dict[str, Any]) -> None:
        """Raises `NonFiniteLossError`: it was one too many in a row."""
        ranks, count = record.get("ranks", []), self._skips.in_a_row
        on_some = 0 < len(ranks) < self.ranks.world_size
        what = in_words(record["skipped"], ranks if on_some else ())
        self.terminal.stage("", f"step {step} is skipped on all ranks: {what}")
        ends_so = step == self.config.train.steps and count > 0 and not record["skipped"].endswith("spike")
        if count >= self.config.train.max_skipped or ends_so:
            why = "training would end like this" if ends_so else "train.max_skipped"
            which = (
                f"step {step} was skipped"
                if count == 1
                else f"steps {step - count + 1} to {step} were skipped, the last"
            )
            raise self._given_up(f"{which} since its {what} ({why})", step - count, of_the_machine=on_some)

    def _given_up(self, what: str, step: int, *, of_the_machine: bool = False) -> NonFiniteLossError:
        """Of weights as they are after step `step`; a checkpoint of these is put aside.

        Args:
            of_the_machine: weights are not to blame, since the same ones gave numbers on other ranks.
        """
        lr, checkpoints = self.config.train.lr, self.run_dir.checkpoints
        self._log.catch_up()
        self._writer.finish()
        if not of_the_machine:
            self.ranks.on_main(lambda: put_aside(checkpoints, step, "broken"))
        left = self.ranks.on_main(lambda: checkpoint_steps(checkpoints))
        goes_on = f"it goes on after step {left[-1]}" if left else "it begins anew"
        remedy = "look at the machine" if of_the_machine else "lower it"
        return NonFiniteLossError(f"train.lr: with {lr:g}, {what}; {remedy}, and run the same command again: {goes_on}")

    def _after_step(self, step: int) -> None:
        is_last = step == self.config.train.steps
        refreshes = not is_last and self.rule.refreshes_after(step)
        if refreshes or is_last:
            since, multipliers = self.movement.since, self.unit_lr.multipliers
            moved = self.movement.measure(step)
            self._log.movement(step, since, self.unit_lr.registry.units, multipliers, *moved)
        if refreshes:
            self._refresh(self.rule.refresh, step)
        every = self.config.train.eval_every
        if is_last or (every and step % every == 0):
            self._evaluate(step)

    def _refresh(self, refresh: Callable[[], Refresh | None], step: int) -> None:
        start = time.perf_counter()
        try:
            found = refresh()
        except ValueError as error:
            raise self._given_up(f"after step {step}, {error}", step) from None
        if found is not None:
            seconds = time.perf_counter() - start
            units = self.unit_lr.registry.units
            self._log.refresh(step, units, found.importance, found.multipliers, seconds, found.domain_importance)

    def _evaluate(self, step: int) -> None:
        if not (self.eval_sets and self.config.train.eval_every):
            return
        with outside_training(self.engine), self.terminal.progress("evaluating", together=True) as bar:
            try:
                found = self.guard.measure(bar) if self.guard else None
                results = found.corpora if found else self._losses_of_blocks(bar)
            except NonFiniteLossError as error:
                raise self._given_up(f"after step {step}, {error}", step) from None
        self._log.evaluation(step, results)
        losses = ", ".join(f"{name} {result['loss']:.4f}" for name, result in results.items())
        self.terminal.stage("", f"step {step}: held-out loss {losses}")
        if self.guard and found:
            self._log.guard(step, self.guard.judge(step, found.reading, is_kept=self._may_save(step)))
            if self.guard.complaint:
                self.terminal.stage("guard", self.guard.words())
            self._save_is_due |= self.guard.keeps_best and self.guard.best == step > 0

    def _losses_of_blocks(self, progress: ProgressCallback) -> dict[str, dict[str, Any]]:
        return evaluate(
            self.engine,
            self.eval_sets,
            self.ranks,
            micro_batch_size=self.config.train.micro_batch_size,
            device=self.engine.device,
            progress=progress,
        )


def _progress_text(record: dict[str, Any], steps: int) -> str:
    return f"step {record['step']}/{steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tokens/s"
