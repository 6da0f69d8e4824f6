"""Ready scripts that start a run: `adept launch` (see docs/launching.md).

Those of Slurm and deepspeed need the checkout's folder launch/: the first is its slurm.sbatch with other numbers, the
second calls its local.sh or multinode.sh.
"""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adept_ds.base.errors import InputError

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
"""If it is one: of an installed package, what it is installed in."""


class Scheduler(str, Enum):  # noqa: UP042 - Python 3.10 has no StrEnum
    """What starts ranks."""

    SLURM = "slurm"
    DEEPSPEED = "deepspeed"
    MPI = "mpi"
    TORCHRUN = "torchrun"


@dataclass(frozen=True)
class Start:
    """A run, and the ranks that it is to have."""

    nodes: int
    per_node: int
    """Ranks."""
    gpus_per_node: int
    arguments: Sequence[str]
    """Of `adept run`."""
    directory: Path
    """In which relative paths are meant."""
    python: str
    hosts: Sequence[str] = ()
    """By name, rank 0's first; Slurm chooses them."""
    sbatch: Sequence[str] = ()
    """More options of sbatch, each as '--name=value' or '--name'."""

    @property
    def size(self) -> str:
        """In words."""
        ranks = f"{self.per_node} rank{'s' * (self.per_node > 1)}"
        return f"{self.nodes} hosts with {ranks} each" if self.nodes > 1 else f"one host with {ranks}"


def launch_folder(needed: str, who: str) -> Path:
    """The checkout's launch/.

    Args:
        needed: a file of it.
        who: needs it, for the message.

    Raises:
        InputError: the package was installed without a checkout.
    """
    folder = _CHECKOUT / "launch"
    if not (folder / needed).is_file():
        raise InputError(
            f"{who}: '{folder / needed}' is not there; run adept from a checkout (`pip install -e`), which has launch/"
        )
    return folder


def script_of(scheduler: Scheduler, start: Start) -> str:
    """The whole text. Raises `InputError`: see `launch_folder`."""
    if scheduler is Scheduler.SLURM:
        name = "slurm.sbatch" if start.gpus_per_node else "slurm_cpu.sbatch"
        folder = launch_folder(name, "--scheduler slurm")
        return _slurm_script((folder / name).read_text(encoding="utf-8"), start)
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    hosts = start.hosts or ["localhost"]
    calls_launch = scheduler is Scheduler.DEEPSPEED
    return env.get_template(f"{scheduler.value}.sh.j2").render(
        size=start.size,
        nodes=start.nodes,
        named=bool(start.hosts),
        per_node=start.per_node,
        hosts=list(map(shlex.quote, hosts)),
        slots=[shlex.quote(f"{host}:{start.per_node}") for host in hosts],
        directory=shlex.quote(str(start.directory)),
        exports=_exports(start),
        python=shlex.quote(start.python),
        arguments=shlex.join(start.arguments),
        launch=shlex.quote(str(launch_folder("multinode.sh", "--scheduler deepspeed"))) if calls_launch else "",
        # Ranks of torchrun have to know it beforehand; two runs on a host should differ.
        port=20000 + zlib.crc32(shlex.join(start.arguments).encode()) % 10000,
    )


def _slurm_script(template: str, start: Start) -> str:
    """A script of launch/ with these numbers in its #SBATCH lines, and with its arguments inside."""
    options = {"nodes": f"{start.nodes}", "ntasks-per-node": f"{start.per_node}", "chdir": f"{start.directory}"}
    if start.gpus_per_node:
        options["gpus-per-node"] = f"{start.gpus_per_node}"
    for option in start.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        options[name] = value
    first, _, body = template.partition("\n\n")
    body = _with_options(body, options)
    inside = "\n".join([*_exports(start), f"set -- {shlex.join(start.arguments)}"])
    begin = "set -euo pipefail\n"
    assert body.count(begin) == 1
    return (
        f"{first.splitlines()[0]}\n# Written by `adept launch`: {start.size}, by Slurm. Submit it: sbatch THIS_FILE\n\n"
        + body.replace(begin, f"{begin}{inside}\n")
    )


def _with_options(text: str, options: Mapping[str, str]) -> str:
    """Replaced where there is a line for them, else behind the last one."""
    lines, left = list[str](), dict(options)
    for line in text.splitlines():
        match = re.match(r"#SBATCH --([a-z-]+)(=|$)", line)
        lines.append(_option(match[1], left.pop(match[1])) if match and match[1] in left else line)
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    lines[last + 1 : last + 1] = [_option(name, value) for name, value in left.items()]
    return "\n".join(lines) + "\n"


def sbatch_line(option: str) -> str:
    """'#SBATCH --name=value'. sbatch ends a value at a space and a line at '#', unless they are quoted, and takes what
    is behind a backslash as it is.

    Args:
        option: '--name=value', with any value, or '--name'.
    """
    name, equals, value = option.partition("=")
    if re.search(r"[^\w@%+:,./=\[\]-]", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH {name}{equals}{value}"


def _option(name: str, value: str) -> str:
    return sbatch_line(f"--{name}={value}" if value else f"--{name}")


def _exports(start: Start) -> list[str]:
    chosen = {"ADEPT_PYTHON": start.python} | ({} if start.gpus_per_node else {"DS_ACCELERATOR": "cpu"})
    return [f"export {name}={shlex.quote(value)}" for name, value in chosen.items()]
