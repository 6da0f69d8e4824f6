"""Whom a run is shown to beside its own files: Weights & Biases, MLflow, Prometheus. Each by its public interface.

A tracker may take its time and may fail: it is used in a process of its own (see `follower`), and what it did not take
is given to it again. Read from wandb 0.2x, MLflow 3 and Prometheus' text format 0.0.4.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from adept_ds.base.files import write_bytes
from adept_ds.base.run_records import scalars

How = Literal["finished", "stopped", "failed", "killed"]
"""How training ended; killed: it did not say."""

Records = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""


class Tracker(ABC):
    """One of them.

    Args:
        target: what the configuration says.
        title: of the run, for people.
        facts: to be told once: the configuration, and what is known of training.
        steps: of all of training.
    """

    name: ClassVar[str]
    remembers: ClassVar[bool] = True
    """Whether it keeps what it was told before an interruption."""

    def __init__(self, target: str, title: str, place: Path, facts: Mapping[str, Any], steps: int) -> None:
        self.target, self._title, self._place, self._facts, self._steps = target, title, place, facts, steps

    def new_name(self) -> str:
        """By which it will know the run; empty where the tracker says it in `begin`."""
        return ""

    @abstractmethod
    def begin(self, name: str) -> str:
        """Open the run of this name, or a new one; its name."""

    @abstractmethod
    def send(self, records: Records) -> None:
        """Tell what is new, in its order."""

    @abstractmethod
    def end(self, how: How) -> None:
        """Everything was told."""


class Wandb(Tracker):
    """Weights & Biases. WANDB_MODE=offline, and all else of its environment, mean what they mean."""

    name = "wandb"

    def new_name(self) -> str:
        return uuid.uuid4().hex[:12]

    def begin(self, name: str) -> str:
        import wandb

        entity, _, project = self.target.rpartition("/")
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            id=name,
            resume="allow",
            name=self._title,
            dir=str(self._place),
            config=dict(self._facts),
            allow_val_change=True,
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")
        return name

    def send(self, records: Records) -> None:
        for record in records:
            self._run.log({"step": record["step"], **scalars(record)})

    def end(self, how: How) -> None:
        import wandb

        self._run.finish(exit_code=0 if how == "finished" else 1)
        wandb.teardown()


class Mlflow(Tracker):
    """MLflow, by its client. The experiment is `MLFLOW_EXPERIMENT_NAME`, else 'adept-ds'."""

    name = "mlflow"
    _id = ""
    _ENDS: ClassVar[dict[How, str]] = {
        "finished": "FINISHED",
        "stopped": "KILLED",
        "failed": "FAILED",
        "killed": "KILLED",
    }

    def begin(self, name: str) -> str:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        if "://" not in self.target and self.target != "databricks":  # folders, which MLflow only keeps up
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self.target)
        if name:
            self._client.update_run(name, status="RUNNING")
            self._id = name
            return name
        if not self._id:  # else it was made before something failed
            self._id = self._client.create_run(self._experiment(), run_name=self._title).info.run_id
        self._tell_facts(self._id)
        return self._id

    def _experiment(self) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "adept-ds")
        found = self._client.get_experiment_by_name(title)
        return found.experiment_id if found is not None else self._client.create_experiment(title)

    def _tell_facts(self, name: str) -> None:
        from mlflow.entities import Param

        params = [Param(key, value[:500]) for key, value in flat(self._facts)]
        for start in range(0, len(params), 100):  # no more in a request
            self._client.log_batch(name, params=params[start : start + 100])

    def send(self, records: Records) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(re.sub(r"[^\w./ -]", "_", key), float(value), now, record["step"])
            for record in records
            for key, value in scalars(record).items()
        ]
        for start in range(0, len(metrics), 500):
            self._client.log_batch(self._id, metrics=metrics[start : start + 500])

    def end(self, how: How) -> None:
        self._client.set_terminated(self._id, status=self._ENDS[how])


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text, as they stand on a command line; without those that are not set."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


class Prometheus(Tracker):
    """A text file for node_exporter's textfile collector: the newest value of each number, written whole."""

    name = "prometheus"
    remembers = False

    _KINDS: ClassVar[dict[str, tuple[str, str]]] = {
        "up": ("gauge", "1 while training goes on, 0 when it has ended; a killed run leaves 1"),
        "told_timestamp_seconds": ("gauge", "When this file was written, in seconds since 1970"),
        "step": ("gauge", "Steps that were taken"),
        "steps": ("gauge", "Steps of the whole training"),
        "loss": ("gauge", "Loss of the newest step, in nats per token; NaN where it is no number"),
        "learning_rate": ("gauge", "Base learning rate of the newest step"),
        "gradient_norm": ("gauge", "Gradient norm of the newest step"),
        "tokens_total": ("counter", "Tokens that were trained on, interruptions included"),
        "tokens_per_second": ("gauge", "Of the newest step, over all ranks"),
        "mfu_ratio": ("gauge", "Share of the device's measured rate of operations that the newest step used"),
        "peak_memory_bytes": ("gauge", "Of rank 0"),
        "skipped_steps": ("gauge", "Steps that were skipped so far"),
        "held_out_loss": ("gauge", "Newest held-out loss by corpus, in nats per token"),
        "general_rise": ("gauge", "Rise of a general source above the base, in nats per token, by the guard"),
        "general_rise_lower": ("gauge", "Its lower confidence limit"),
    }
    """Behind adept_train_."""

    _OF_STEPS: ClassVar[dict[str, str]] = {
        "train/lr": "learning_rate",
        "train/grad_norm": "gradient_norm",
        "train/tokens": "tokens_total",
        "train/tokens_per_second": "tokens_per_second",
        "train/mfu": "mfu_ratio",
        "train/peak_memory_bytes": "peak_memory_bytes",
        "train/skipped_steps": "skipped_steps",
    }

    def begin(self, name: str) -> str:
        self._values: dict[tuple[str, str, str], float] = {}
        self._set("steps", self._steps)
        self._write(up=True)
        return name

    def send(self, records: Records) -> None:
        for record in records:
            self._take(record)
        self._write(up=True)

    def end(self, how: How) -> None:
        self._write(up=False)

    def _take(self, record: Mapping[str, Any]) -> None:
        if "loss" in record:
            self._set("step", record["step"])
            loss = record["loss"]
            self._set("loss", math.nan if loss is None else loss)
        for corpus, result in record.get("eval", {}).items():
            self._set("held_out_loss", _value(result["loss"]), corpus=corpus)
        for source, limits in record.get("guard", {}).get("general", {}).items():
            self._set("general_rise", _value(limits["rise"]), source=source)
            self._set("general_rise_lower", _value(limits["lower"]), source=source)
        for key, value in scalars(record).items():
            if key in self._OF_STEPS:
                self._set(self._OF_STEPS[key], value)

    def _set(self, metric: str, value: float, **label: str) -> None:
        ((key, text),) = label.items() or [("", "")]
        self._values[metric, key, text] = value

    def _write(self, *, up: bool) -> None:
        self._set("up", float(up))
        self._set("told_timestamp_seconds", time.time())
        lines = list[str]()
        for metric, (kind, help_text) in self._KINDS.items():
            found = [(key, text, value) for (name, key, text), value in self._values.items() if name == metric]
            if found:
                lines += [f"# HELP adept_train_{metric} {help_text}", f"# TYPE adept_train_{metric} {kind}"]
            for key, text, value in found:
                labels = {"run": self._title} | ({key: text} if key else {})
                shown = ",".join(f'{name}="{_escaped(of)}"' for name, of in labels.items())
                lines.append(f"adept_train_{metric}{{{shown}}} {_shown(value)}")
        write_bytes(Path(self.target), "".join(f"{line}\n" for line in lines).encode(errors="replace"))


def _value(number: float | None) -> float:
    return math.nan if number is None else number


def _escaped(text: str) -> str:
    """In a label, a backslash, a quote and the end of a line have another meaning."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _shown(value: float) -> str:
    return "NaN" if math.isnan(value) else repr(value)


TRACKERS: tuple[type[Tracker], ...] = (Wandb, Mlflow, Prometheus)
"""By the keys of the section `logging`."""
