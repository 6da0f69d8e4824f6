"""What surrounds the work of a command: output is diverted to logs, ranks meet, signals are noted."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_ds.base.activity import Teller
from adept_ds.base.errors import AdeptError, InputError, StopRequestedError
from adept_ds.base.files import NewDirectory, json_text, remove_abandoned_files, writing
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal, capture_output
from adept_ds.base.writer_lock import WriterLock
from adept_ds.config.resolved import ResolvedConfig
from adept_ds.ranks.launchers import LaunchedRank
from adept_ds.ranks.stopping import StopRequest

if TYPE_CHECKING:
    from adept_ds.ranks.collectives import Ranks
    from adept_ds.run.context import Context


@contextmanager
def run_session(settings: ResolvedConfig, launched: LaunchedRank, *, as_json: bool = False) -> Iterator[Context]:
    """Everything that a stage of a run needs; what libraries print goes to the run's logs."""
    log = settings.run_dir.log(launched.rank)
    try:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
    except InputError as error:
        raise InputError(f"run_dir: {error}") from None
    except OSError as error:
        root = settings.run_dir.root
        raise InputError(f"run_dir: '{root}' cannot be written ({error.strerror}); choose another") from None
    lock = WriterLock(settings.run_dir.lock, "run_dir")
    with _joined(log, launched, settings, as_json, lock) as (ranks, terminal, stop):
        from adept_ds.run.context import Context

        yield Context.of(settings, ranks, terminal, stop)


@contextmanager
def passing_session(
    settings: ResolvedConfig, launched: LaunchedRank, work_dir: Path | None, *, as_json: bool = False
) -> Iterator[Context]:
    """The same in a fresh directory that goes away at the end, for stages on a plain model.

    Args:
        work_dir: where it is made, on a file system that all hosts share; None: the system's place for such things,
            which is enough on one host.

    Raises:
        InputError: ranks are on several hosts, and no place is given.
    """
    if work_dir is None and launched.local_size < launched.world_size:
        raise InputError("--work-dir is missing; on several hosts, give a directory that all of them see")
    logs, fresh = Path(tempfile.mkdtemp(prefix="adept_log_")), None

    def make_place() -> Path:
        nonlocal fresh
        where = work_dir or Path(tempfile.gettempdir())
        try:
            fresh = NewDirectory(where / "adept_work")
        except InputError as error:
            raise InputError(f"--work-dir: {error}, or give another") from None
        except OSError as error:
            raise InputError(f"--work-dir: '{where}' cannot be written ({error.strerror}); give another") from None
        fresh.temporary.chmod(0o700)  # texts of the user, where others may look
        return fresh.temporary

    try:
        with _joined(logs / "log", launched, settings, as_json) as (ranks, terminal, stop):
            run_dir = RunDirectory(ranks.on_main(make_place))
            from adept_ds.run.context import Context

            yield Context.of(dataclasses.replace(settings, run_dir=run_dir), ranks, terminal, stop)
            ranks.barrier()  # nobody reads there any more
    except (AdeptError, KeyboardInterrupt):
        shutil.rmtree(logs)
        raise
    except Exception:
        sys.stderr.write(f"adept: what libraries said is in {logs}\n")
        raise
    else:
        shutil.rmtree(logs)
    finally:
        if fresh is not None:
            fresh.discard()


@contextmanager
def quiet_session(as_json: bool = False) -> Iterator[Terminal]:
    """For work on files: one process, libraries' chatter to a temporary file."""
    with tempfile.TemporaryDirectory() as folder, capture_output(Path(folder) / "log", is_main=True) as terminal:
        _tame_libraries()
        if as_json:
            terminal.mute()
        yield terminal


def show(terminal: Terminal, as_json: bool, result: Any, as_text: Callable[[], None] | None = None) -> None:
    """The result of a command: as JSON where that was asked for."""
    if as_json:
        terminal.console.print_json(json_text(result))
    elif as_text is not None:
        as_text()


@contextmanager
def _joined(
    log: Path, launched: LaunchedRank, settings: ResolvedConfig, as_json: bool, lock: WriterLock | None = None
) -> Iterator[tuple[Ranks, Terminal, StopRequest]]:
    with capture_output(log, is_main=launched.is_main) as terminal, _keep_trace(), ExitStack() as stack:
        _tame_libraries()
        if as_json:
            terminal.mute()

        teller: Teller | None = None

        def hold() -> None:
            nonlocal teller
            if lock is not None:
                stack.enter_context(lock.held(partial(terminal.waiting, "run_dir")))
                remove_abandoned_files(settings.run_dir.root)
                teller = stack.enter_context(Teller(settings.run_dir.activity, lock, launched.world_size))

        def leaving(code: int, line: str) -> None:
            if teller is not None:
                teller.end(code, line)

        if launched.world_size == 1:  # of several ranks the first one takes it, when they have met
            hold()
        minutes = settings.config.dist_timeout_minutes
        with terminal.console.status("starting"):
            from adept_ds.ranks.groups import join, leave
            from adept_ds.ranks.watch import watched

            say = partial(terminal.waiting, "start") if launched.speaks else _log
            ranks = join(launched, minutes, say)
            import adept_ds.run.context  # noqa: F401 - takes seconds
        with watched(launched, minutes, terminal.complain, log.parent, leaving), writing():
            if launched.world_size > 1:
                ranks.on_main(hold)
            stop = stack.enter_context(StopRequest(lock.ends if lock else lambda: None).listening())
            try:
                yield ranks, terminal, stop
            except StopRequestedError:
                leave()  # all ranks do: they have agreed to stop
                raise
            leave()  # not after another error: it would wait for peers that wait for this rank


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")


@contextmanager
def _keep_trace() -> Iterator[None]:
    """The traceback of an unexpected error belongs into the log as well as on the terminal."""
    try:
        yield
    except AdeptError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise


def _tame_libraries() -> None:
    """After installation nothing touches the network unless the user allows it; the log keeps what libraries say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.captureWarnings(True)
