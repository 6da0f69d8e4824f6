"""What a run is at, from its files alone, whoever looks and from wherever they are seen.

Nothing is written, and nothing is expected to be whole: files may be written this moment, by another host. Whether
somebody works there is told by the lock (`base.writer_lock`), what at by activity.json (`base.activity`), how far
training is by the end of metrics.jsonl.
"""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic_core import from_json

from adept_ds.base.activity import Activity, Bar
from adept_ds.base.errors import EXIT_STOPPED, InputError
from adept_ds.base.lifeline import LAUNCHER, announced_launcher, is_running
from adept_ds.base.records import Record
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag, manifest_of
from adept_ds.base.run_records import newest_lines
from adept_ds.base.writer_lock import LEASE, Holder

State = Literal["running", "stopping", "silent", "finished", "unfinished", "stopped", "failed", "killed", "not begun"]
"""running, stopping: somebody works there, or was asked to stop and writes a checkpoint. silent: its process is there,
and gives no sign of life. finished: nothing is left to do. unfinished: the last command there is done, the run is not.
stopped: on request. failed: the last command said why. killed: it said nothing."""

_STAGES = ("probe", "places", "expand", "train", "dial", "export", "eval", "tasks")
"""In their order."""

_PACE_STEPS = 50
"""The newest ones, by which speed is judged."""


class Held(Record):
    """A held-out loss."""

    step: int
    loss: float


class RunStatus(Record):
    """What there is to say; what is not known is None."""

    run: str
    state: State
    why: str
    """One line about the state, with what to do where something is."""
    by: Holder | None
    """Who works there, or did last."""
    ranks: int | None
    seen_seconds: float | None
    """Since who works there gave a sign of life."""
    moved_seconds: float | None
    """Since what is done went on."""
    stage: str | None
    """Of who works there."""
    doing: tuple[Bar, ...]
    done: tuple[str, ...]
    """Stages whose results are there."""
    step: int
    steps: int | None
    """Of training: taken, and all of them."""
    loss: float | None
    lr: float | None
    tokens: int | None
    tokens_per_second: float | None
    """Median of the newest steps."""
    left_seconds: float | None
    """Until training is over: by its pace since it was started, evaluations and checkpoints included; of a run in which
    nobody works, of its steps alone."""
    held_out: dict[str, Held]
    """By corpus."""
    skipped_steps: int
    checkpoint: int | None
    """Step of the newest one."""
    checkpoint_seconds: float | None
    """Its age."""
    guard: str | None
    """Why the guard has ended training."""


class Sign(NamedTuple):
    """Of whoever works in a directory, or did."""

    state: State
    why: str
    activity: Activity | None
    by: Holder | None
    seen_seconds: float | None


def is_run(directory: Path) -> bool:
    """Whether a run has left anything there."""
    run = RunDirectory(directory)
    files = (run.activity, run.lock, run.config, run.metrics, run.ledger, run.evaluation)
    return any(file.is_file() for file in files) or run.log(0).parent.is_dir()


def read_status(directory: Path, now: float | None = None) -> RunStatus:
    """Of a run's directory.

    Args:
        now: seconds since 1970.

    Raises:
        InputError: no run has written anything there.
    """
    if not is_run(directory):
        found = "is no run directory" if directory.is_dir() else "is no directory"
        raise InputError(f"'{directory}' {found}; give the run_dir of a run, or the study_dir of a study")
    now = time.time() if now is None else now
    run = RunDirectory(directory)
    sign = read_sign(run.lock, run.activity, now)
    facts, steps, guard = _training(run), _num_steps(run), _json(run.guard).get("reason")
    trained = bool(steps and facts["step"] >= steps) or guard is not None
    done = _done(run, trained=trained)
    state, why = sign.state, sign.why
    if state in ("finished", "not begun"):
        is_done = trained and "export" in done
        state, why = ("finished", why) if is_done else _not_finished(run, sign, facts["step"], steps)
    works = state in ("running", "stopping", "silent")
    activity = sign.activity
    bars = activity.bars if activity and works else ()
    left = next((bar.left_seconds for bar in bars if bar.title == "training"), None)
    if left is None and steps and not trained:
        left = facts["step_seconds"] and facts["step_seconds"] * (steps - facts["step"])
    kept = checkpoint_steps(run.checkpoints)
    return RunStatus(
        run=str(directory),
        state=state,
        why=why,
        by=sign.by,
        ranks=activity.ranks if activity else None,
        seen_seconds=sign.seen_seconds if works else None,
        moved_seconds=_since(activity.moved, now) if activity and works else None,
        stage=(activity.stage or None) if activity and works else None,
        doing=bars,
        done=done,
        step=facts["step"],
        steps=steps,
        loss=facts["loss"],
        lr=facts["lr"],
        tokens=facts["tokens"],
        tokens_per_second=facts["tokens_per_second"],
        left_seconds=left,
        held_out=facts["held_out"],
        skipped_steps=facts["skipped_steps"],
        checkpoint=kept[-1] if kept else None,
        checkpoint_seconds=_age(manifest_of(run.checkpoints / checkpoint_tag(kept[-1])), now) if kept else None,
        guard=guard,
    )


def read_sign(lock: Path, activity_file: Path, now: float) -> Sign:
    """Whether somebody works in the directory of this lock, and if not, how the last one ended."""
    activity: Activity | None = None
    with suppress(InputError):
        activity = Activity.load(activity_file)
    age = _age(lock, now)
    if age is None:
        return Sign(*_ended(activity, activity_file), activity, activity.by if activity else None, None)
    holder: Holder | None = None
    with suppress(InputError):
        holder = Holder.load(lock.with_name(f"{lock.name}.json"))
    if activity is not None and (holder is None or (holder.process, holder.since) != _who(activity.by)):
        activity = None  # of whoever was there before
    return Sign(*_working(holder, activity, age), activity, holder, age)


def _who(by: Holder) -> tuple[str, str]:
    return by.process, by.since


def _working(holder: Holder | None, activity: Activity | None, age: float) -> tuple[State, str]:
    """Of a directory whose lock is there."""
    again = "the same command takes over, and goes on from what is kept"
    if holder is None:
        if age <= LEASE:
            return "running", "somebody works here, and has not said who"
        return "killed", f"whoever worked here has given no sign of life for {words_of(age)}; {again}"
    if activity and activity.ended:  # and is about to leave
        return _end_of(activity)
    seen_from_here = announced_launcher({LAUNCHER: holder.process}) is not None
    if seen_from_here and not is_running(holder.pid):
        return "killed", f"{holder} is gone, and said nothing: kill -9, out of memory, or the machine; {again}"
    if age > LEASE and seen_from_here:
        return "silent", (
            f"{holder} is there, but has given no sign of life for {words_of(age)}: it is stopped, or its disk does "
            "not answer, or this is a copy of its directory"
        )
    if age > LEASE:
        return "killed", f"{holder} has given no sign of life for {words_of(age)}; {again}"
    if holder.ends:
        return "stopping", f"{holder} was asked to stop, and writes down what it has"
    return "running", f"{holder}"


def _ended(activity: Activity | None, file: Path) -> tuple[State, str]:
    """Of a directory whose lock is not there."""
    if activity is None:
        return "not begun", f"nobody works here; how the last command ended is not known ('{file.name}')"
    if activity.ended is None:
        return "failed", f"{activity.by} ended, and could not write down how; look at the disk, and at logs/"
    return _end_of(activity)


def _end_of(activity: Activity) -> tuple[State, str]:
    assert activity.ended is not None
    code, reason, at = activity.ended.code, activity.ended.reason, activity.ended.at
    command = f"`{activity.by.command}` ended {at}"
    if code == 0:
        return "finished", command
    if code == EXIT_STOPPED:
        return "stopped", f"{command}: {reason}; the same command goes on"
    return "failed", f"{command} with exit code {code}: {reason}"


def _not_finished(run: RunDirectory, sign: Sign, step: int, steps: int | None) -> tuple[State, str]:
    """Of a run in which nobody works, and whose last command did what it had to, or did not say."""
    config = f"`adept run {run.config}` goes on" if run.config.is_file() else "`adept run CONFIG` goes on"
    if sign.activity is None and not any(file.exists() for file in (run.config, run.metrics, run.ledger)):
        return "not begun", "nothing is written yet: its ranks have not met, or ended before"
    trained = f"; training is at step {step} of {steps or '?'}" if step else ""
    return "unfinished", f"{sign.why}{trained}; {config}"


def _done(run: RunDirectory, *, trained: bool) -> tuple[str, ...]:
    known = {"train": trained, "expand": run.expansion.is_file()} | dict.fromkeys(_json(run.ledger), True)
    return tuple(name for name in _STAGES if known.get(name))


def _training(run: RunDirectory) -> dict[str, Any]:
    """How far it is, by the newest lines of its log."""
    newest: dict[str, Any] | None = None
    seconds, speeds, held_out, skipped = list[float](), list[float](), dict[str, Held](), None
    for line in newest_lines(run.metrics):
        if "loss" in line:
            newest = newest or line
            if skipped is None and isinstance(line.get("skipped_steps"), int):
                skipped = line["skipped_steps"]
            if len(seconds) < _PACE_STEPS and not line.get("skipped"):
                seconds += _numbers(line.get("seconds"))
                speeds += _numbers(line.get("tokens_per_second"))
        elif isinstance(line.get("eval"), dict):
            for name, result in line["eval"].items():
                loss = _numbers(result.get("loss") if isinstance(result, dict) else None)
                if loss and name not in held_out:
                    held_out[name] = Held(step=line["step"], loss=loss[0])
    newest = newest or {}
    return {
        "step": newest.get("step", 0),
        "loss": _number(newest.get("loss")),
        "lr": _number(newest.get("lr")),
        "tokens": newest["tokens"] if isinstance(newest.get("tokens"), int) else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "step_seconds": statistics.fmean(seconds) if seconds else None,
        "held_out": held_out,
        "skipped_steps": skipped or 0,
    }


def _num_steps(run: RunDirectory) -> int | None:
    """Of training: by the configuration, or where a single stage was run, by the newest checkpoint."""
    found: Any = None
    with suppress(Exception):  # of many kinds, for a file that is being written or was damaged
        found = yaml.safe_load(run.config.read_bytes())["train"]["steps"]
    if not isinstance(found, int):
        for step in reversed(checkpoint_steps(run.checkpoints)):
            settings = _json(manifest_of(run.checkpoints / checkpoint_tag(step))).get("settings")
            found = settings.get("train.steps") if isinstance(settings, dict) else None
            break
    return found if isinstance(found, int) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = from_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _age(file: Path, now: float) -> float | None:
    """Seconds since it was written, by this host's clock; None: it is not there."""
    try:
        return max(0.0, now - file.stat().st_mtime)
    except OSError:
        return None


def _since(moment: str, now: float) -> float | None:
    try:
        return max(0.0, now - datetime.fromisoformat(moment).timestamp())
    except ValueError:
        return None


def _numbers(value: Any) -> list[float]:
    number = _number(value)
    return [] if number is None else [number]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def words_of(seconds: float) -> str:
    """'35 s', '12 min', '3.4 h', '2.1 d'."""
    for size, unit, most in ((1, "s", 90), (60, "min", 90), (3600, "h", 48)):
        if seconds < most * size:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"
