"""The process in which templates are rendered: alone, with the kernel's limits on its time and memory.

A template may be somebody else's, and what it does to time and memory cannot be read off it: texts multiply, loops and
macros call each other, and one call inside the interpreter is interrupted by neither thread nor signal handler. A
process is. It serves one template, record after record, a line of JSON each way, and ends with its parent. A record
costs it some 50 microseconds; the start, a tenth of a second.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1
"""Of the processor, for a record; the kernel counts whole ones, so it can become one more."""

MEMORY_MIB = 512
"""Of the process, with the interpreter's own."""

OUTPUT_CHARACTERS = 1 << 22
"""Of a text."""


@dataclass(frozen=True)
class Rendered:
    """A text, or why there is none."""

    text: str | None
    reason: str = ""
    exceeds: bool = False
    """Whether it is a limit that it failed at."""


class TemplateProcess:
    """A template in a process of its own, which starts anew after a record that ended it."""

    def __init__(self, template: str, variables: Sequence[str]) -> None:
        self._template = template
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({tuple(variables)!r})"
        self._command = [sys.executable, "-c", program]
        self._lock = threading.Lock()
        self.refusal = self._start()
        """What is wrong with the template, whatever the record; None: nothing."""

    def render(self, values: Mapping[str, Any]) -> Rendered:
        """The template with these variables."""
        with self._lock:
            try:
                return Rendered(*self._ask(values))
            except _EndedError as end:
                self._start()
                return Rendered(None, str(end), exceeds=True)

    def close(self) -> None:
        """End the process."""
        self._end()

    def _start(self) -> str | None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._end = weakref.finalize(self, _end, self._process, os.getpid())
        try:
            refusal: str | None = self._ask(self._template)
        except _EndedError as end:
            return f"cannot be compiled: {end}; simplify it"
        return refusal

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            return json.loads(answer)
        self._end()
        if self._process.returncode == -signal.SIGXCPU:
            raise _EndedError(f"it takes more than {SECONDS} s")
        raise _EndedError("it ends the process that renders it")


class _EndedError(Exception):
    """The process is gone; the message says why."""


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    if os.getpid() == owner:  # not in a process forked from it, which has a copy of this object
        process.kill()
        process.wait()


# --- inside the process --------------------------------------------------------------------------------------------

ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
"""A template can read its variables and nothing else; the same record is the same text each time."""
del ENVIRONMENT.filters["random"], ENVIRONMENT.globals["lipsum"]

_LIMITS = {
    MemoryError: f"it needs more than {MEMORY_MIB} MiB of memory",
    OverflowError: "it makes a text or a number that is too large",
    RecursionError: "it is nested, or calls itself, too deeply",
}


def serve(variables: Sequence[str]) -> None:
    """Answer requests until there are no more.

    The first is the template; its answer is what is wrong with it, or null. Each further one are variables, and its
    answer the fields of `Rendered`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _lower(resource.RLIMIT_AS, MEMORY_MIB << 20)
    _lower(resource.RLIMIT_CORE, 0)
    template: Template | None = None
    for line in sys.stdin.buffer:
        _limit_time()
        request: Any = json.loads(line)
        answer: Any
        if template is None:
            template, answer = _compiled(request, variables)
        else:
            answer = _rendered(template, request)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard))


def _limit_time() -> None:
    """The kernel ends the process if it still works on this record in `SECONDS`, in whatever call it is."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + SECONDS)


def _compiled(text: str, variables: Sequence[str]) -> tuple[Template | None, str | None]:
    """The template, and what is wrong with it. Constant expressions are computed already here."""
    try:
        used = meta.find_undeclared_variables(ENVIRONMENT.parse(text))
        template = ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        return None, f"does not parse as a Jinja template (line {error.lineno}: {error.message}); correct it"
    except tuple(_LIMITS) as error:
        return None, f"cannot be compiled: {_LIMITS[type(error)]}; simplify it"
    except Exception as error:  # whatever Python thinks of code that was made from it
        return None, f"cannot be compiled ({error}); correct it"
    unknown = sorted(used - {*variables} - ENVIRONMENT.globals.keys())
    if unknown:
        return template, f"names '{unknown[0]}'; variables are {', '.join(variables)}"
    if used.isdisjoint(variables):
        return template, "would render every question the same; write for example {{ question }}"
    return template, None


def _rendered(template: Template, values: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """The fields of `Rendered`."""
    parts, size = [], 0
    try:
        for part in template.generate(values):
            parts.append(part)
            size += len(part)
            if size > OUTPUT_CHARACTERS:
                return None, f"it writes more than {OUTPUT_CHARACTERS} characters", True
    except tuple(_LIMITS) as error:
        return None, _LIMITS[type(error)], True
    except Exception as error:  # whatever an expression of the user's can raise
        return None, str(error), False
    return "".join(parts), "", False
