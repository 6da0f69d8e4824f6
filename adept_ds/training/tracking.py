"""Trackers of a run (`logging`), on rank 0: a process beside it that reads what the run writes (see `follower`).

Training calls none of them, and waits for none of them but at its end, for `PATIENCE` seconds at most. Whatever that
process does or fails to do, training does not notice.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from adept_ds.base.digests import json_digest
from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.config.schema import Config
from adept_ds.training.follower import Job, Memory
from adept_ds.training.trackers import TRACKERS, How

PATIENCE = 15.0
"""Seconds that trackers have for the last records when training has ended."""

_SAID_AFTER, _LEAVES = 3.0, 5.0
"""Seconds until it is said that they are waited for; that the process has to leave after `PATIENCE`."""

# Launchers find the ranks of a run by variables that begin with ADEPT_LAUNCH; this process is none.

_SAME = {"run_dir", "logging", "checkpoint", "dist_timeout_minutes"}
"""Keys by which two trainings do not differ."""


class Tracking:
    """What `logging` asks for; nothing, if it asks for nothing.

    Args:
        say: is told of trackers that fail, from another thread.
    """

    def __init__(self, config: Config, run_dir: RunDirectory, first_step: int, say: Callable[[str], None]) -> None:
        tree = config.model_dump(mode="json")
        self._say, self._notes = say, run_dir.tracking
        self._process: subprocess.Popen[str] | None = None
        self._finishing = threading.Event()
        self._job = Job(
            run_dir=str(run_dir.root),
            title=run_dir.root.name or str(run_dir.root),
            config=tree,
            config_digest=json_digest({key: value for key, value in tree.items() if key not in _SAME}),
            first_step=first_step,
            lr=config.train.lr,
            steps=config.train.steps,
            patience=PATIENCE,
            targets={key: target for key, target in tree["logging"].items() if target is not None},
        )

    def start(self) -> None:
        """When nothing of an earlier start is in the log any more."""
        if not self._job.targets:
            return
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "adept_ds.training.follower"],
                env={name: value for name, value in os.environ.items() if not name.startswith("ADEPT_LAUNCH")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
                start_new_session=True,  # signals are for the run; and all that it starts can be ended with it
            )
        except OSError as error:
            self._say(f"logging: nobody is told, since no process can be started ({error.strerror})")
            return
        self._reader = threading.Thread(target=self._read, args=(process,), name="tracking", daemon=True)
        self._reader.start()
        _tell(process, self._job.model_dump_json())

    def finish(self, how: How) -> None:
        """Wait until trackers have what the run has written, but not for long."""
        process, self._process = self._process, None
        if process is None:
            return
        self._finishing.set()
        _tell(process, how)
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        if not _ends(process, _SAID_AFTER):
            names, most = ", ".join(self._job.targets), max(0.0, self._job.patience - _SAID_AFTER)
            self._say(f"waiting for {names} to take what is left, {most:.0f} s at most")
            if not _ends(process, most + _LEAVES):
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        self._reader.join(_LEAVES)

    def tell_the_rest(self) -> None:
        """Of training that was over before: to those that have not been told all of it."""
        memory = Memory()
        with suppress(InputError):
            memory = Memory.load(self._notes)
        told = {name: known.target for name, known in memory.trackers.items() if known.ended == "finished"}
        lasting = {kind.name for kind in TRACKERS if kind.remembers}
        wanted = self._job.targets.items()
        targets = {name: target for name, target in wanted if name in lasting and told.get(name) != target}
        self._job = self._job.model_copy(update={"targets": targets})
        self.start()
        self.finish("finished")

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Of the thread: what the process says to the user."""
        assert process.stdout is not None
        for line in process.stdout:
            self._say(line.rstrip("\n"))
        code = process.wait()
        if not self._finishing.is_set():
            self._say(f"logging: nobody is told any more, since that process ended with {code}; its log says why")


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # it has ended
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _ends(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
