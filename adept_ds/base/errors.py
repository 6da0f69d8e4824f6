"""What can end a command, and the exit code each end has.

0 done; 2 bad input (`InputError`); 3 stopped on request, and nothing lost (`StopRequestedError`); 4 the machine failed
(`MachineError`); 130 interrupted before there was anything to lose; what a signal ends by itself, as before the ranks
have met, has its code (docs/launching.md); anything else is a bug and shows its traceback.
"""

from __future__ import annotations

EXIT_BAD_INPUT = 2


EXIT_STOPPED = 3


EXIT_MACHINE = 4


EXIT_INTERRUPTED = 130
"""Ctrl-C before there was anything to lose."""


MOST_CHARACTERS = 1000
"""Of a message about input."""

_BEGINNING, _END = 700, 250


class AdeptError(Exception):
    """Base of every error that adept-ds raises on purpose."""


class InputError(AdeptError, ValueError):
    """The user's input cannot work. The message is one line: the key, the value and the remedy."""

    def __init__(self, message: str) -> None:
        """Whatever of the input stands in it: line breaks and control characters are escaped, and what is long is cut
        in its middle, since it begins with the key and ends with the remedy."""
        super().__init__(_one_line(message))


class DamagedError(InputError):
    """What was written is not there as it was written. Who can makes it again, or goes on without it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        """`remedy` is for the user, where nobody can."""
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = str(InputError(reason))


class UnreachedError(InputError):
    """Rank 0 is not where it should be: on its own host rank 1 says so."""


class NonFiniteLossError(InputError):
    """A loss is NaN or infinite. Raised on every rank; who knows which model it is of looks for the reason."""


class StopRequestedError(AdeptError):
    """A signal asked the run to stop; training wrote a checkpoint first, long stages what they had done."""


class MachineError(AdeptError):
    """A disk is full or broken, or a rank was lost: neither the input nor the program is at fault. What was written
    before is whole, and the same command goes on from there. The message is one line, as that of an `InputError`."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class LostRankError(AdeptError):
    """Another rank has ended, or hangs, so that this one cannot go on.

    Attributes:
        line: what the user has to know; None where it was said already, by that rank or another one of this host.
        code: of the exit: that of the lost rank where it ended by itself, else `EXIT_MACHINE`.
    """

    def __init__(self, line: str | None, code: int = EXIT_MACHINE) -> None:
        super().__init__(line or "another rank has ended, and said why")
        self.line, self.code = line, code


class UnitMismatchError(AdeptError):
    """Ranks disagree about a unit (its multiplier or its elements); the message names the unit."""


class LayoutError(AdeptError):
    """DeepSpeed is not inside as the version that this program was written against."""


def exit_code(error: BaseException) -> int:
    """That a command ends with for it."""
    if isinstance(error, LostRankError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    codes = {InputError: EXIT_BAD_INPUT, StopRequestedError: EXIT_STOPPED, MachineError: EXIT_MACHINE}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def _one_line(message: str) -> str:
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
    return line if len(line) <= MOST_CHARACTERS else f"{line[:_BEGINNING]} ... {line[-_END:]}"
