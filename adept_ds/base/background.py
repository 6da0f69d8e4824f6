"""Work beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(action: Callable[[], T]) -> Future[T]:
    """By a thread that the end of the process does not wait for."""
    outcome = Future[T]()
    threading.Thread(target=run_into, args=(outcome, action), daemon=True).start()
    return outcome


def at_once(action: Callable[[], T]) -> Future[T]:
    """The same by the calling thread."""
    outcome = Future[T]()
    run_into(outcome, action)
    return outcome


def run_into(outcome: Future[T], action: Callable[[], T]) -> None:
    """Let `outcome` hold what `action` returns or raises."""
    try:
        outcome.set_result(action())
    except BaseException as error:
        outcome.set_exception(error)
