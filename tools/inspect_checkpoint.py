"""Say what is in a checkpoint, who trained what, and whether every file is as it was written.

    python tools/inspect_checkpoint.py runs/math                          # all models and checkpoints of a run
    python tools/inspect_checkpoint.py runs/math/checkpoints/step_100 --json
    python tools/inspect_checkpoint.py some/output/global_step100         # what DeepSpeed wrote by itself

It reads checkpoints of any ZeRO stage, universal ones, models with and without copies, and delta packages. Where hashes
are recorded (manifests, marks of outputs), every byte is read and compared. Something damaged is exit code 2.
"""
# Not inspect.py: a file of that name beside a script is imported in the place of the standard library's.

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from conversions import parser_of, run
from rich.markup import escape
from rich.table import Table

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.cli.session import show

if TYPE_CHECKING:
    from adept_ds.run.inspection import Found, Held


def look(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from adept_ds.run.inspection import inspect

    with terminal.progress("reading") as bar:
        found = inspect(arguments.path, bar)
    show(terminal, arguments.json, [each.to_json() for each in found], lambda: _print(found, terminal))
    damaged = [each.damage for each in found if each.damage]
    if damaged:
        more = f" ({len(damaged) - 1} more like this)" if damaged[1:] else ""
        raise InputError(f"{damaged[0]}{more}")


def _print(found: list[Found], terminal: Terminal) -> None:
    for each in found:
        table = Table(title=escape(f"{each.kind}  {each.path}"), title_justify="left", show_header=False, box=None)
        for what, text in _lines(each).items():
            table.add_row(f"[bold cyan]{what}[/]", escape(text))
        terminal.console.print(table)
        terminal.console.print()


def _lines(found: Found) -> dict[str, str]:
    """What is said of it, by what it is about."""
    training, proof = found.training, f"every byte is as it was written, by {found.proof}"
    lines = {
        "written by": found.written_by or "nothing says by whom",
        "size": f"{found.num_bytes / 2**20:,.1f} MiB",
        "hashes": found.damage or (proof if found.proof else "none recorded: nothing to compare with"),
    }
    if training is not None:
        method = (training.method or {}).get("name", "nothing says by which method")
        lines["trained"] = f"{method}, to step {training.step if training.step is not None else 'unknown'}"
        lines["ranks"] = (
            f"{training.ranks} under ZeRO-{training.zero_stage}, {training.precision or 'precision unknown'}"
        )
        lines["optimizer"] = (
            f"{', '.join(training.optimizer_state) or 'no state'}; lr {_listed(training.learning_rates)}"
        )
        lines |= {f"rank {rank}": f"wrote {size / 2**20:,.1f} MiB" for rank, size in training.by_rank.items()}
        lines |= {"from model": training.start} if training.start else {}
    lines |= {name: _counted(held) for name, held in found.by_layer.items()}
    if found.trained is not None:
        lines["in all"] = f"{_counted(found.trained)} that trained"
    if found.kind == "checkpoint":
        frozen = found.frozen.tensors if found.frozen else 0
        none = "none in it: no model by itself, tools/zero_to_hf.py joins it to one"
        lines["frozen"] = f"{frozen} tensors" if frozen else none
    elif found.frozen is not None:
        lines["tensors"] = f"{_counted(found.frozen)}, {', '.join(found.dtypes)}"
    lines |= {"family": found.model_type} if found.model_type else {}
    lines |= {"copies": _of_copies(found)} if found.copies else {}
    lines |= {"fingerprint": found.fingerprint} if found.fingerprint else {}
    return lines | ({"of its base": found.base_fingerprint} if found.base_fingerprint else {})


def _counted(held: Held) -> str:
    return f"{held.tensors} tensors, {held.elements:,} elements"


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers) or "unknown"


def _of_copies(found: Found) -> str:
    alphas = found.alphas or (None,) * len(found.copies)
    return ", ".join(
        f"layer {copy} of {source}" + ("" if alpha is None else f" at alpha {alpha:g}")
        for (copy, source), alpha in zip(found.copies.items(), alphas, strict=False)
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("path", metavar="PATH", type=Path, help="a run, a checkpoint, a model or a delta package")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    run(parser, look)


if __name__ == "__main__":
    main()
