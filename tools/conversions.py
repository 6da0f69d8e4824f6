"""What the tools for conversion have in common: how they are called, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from adept_ds.base.errors import EXIT_BAD_INPUT, EXIT_MACHINE, AdeptError, InputError, MachineError
from adept_ds.base.files import disk_failure
from adept_ds.base.terminal import Terminal
from adept_ds.cli.session import quiet_session

Work = Callable[[argparse.Namespace, Terminal], None]


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Args: text: the tool's docstring, with an example."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(parser: argparse.ArgumentParser, work: Work) -> None:
    """Do the work, quietly but for what it says; one line and an exit code where it cannot be done."""
    arguments = parser.parse_args()
    name = Path(parser.prog).stem
    try:
        with quiet_session(getattr(arguments, "json", False)) as terminal:
            work(arguments, terminal)
    except InputError as error:
        _end(name, error, EXIT_BAD_INPUT)
    except MachineError as error:
        _end(name, error, EXIT_MACHINE)
    except AdeptError as error:
        _end(name, error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        failure = disk_failure(error)
        if failure is None:
            raise
        _end(name, failure, EXIT_MACHINE)


def _end(name: str, message: object, code: int) -> None:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(code)
