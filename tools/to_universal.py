"""Make a universal checkpoint, which DeepSpeed loads at any ZeRO stage and on any number of ranks.

    python tools/to_universal.py runs/math OUT                     # a run: its newest checkpoint, or the guard's best
    python tools/to_universal.py some/output/global_step100 OUT    # what DeepSpeed wrote by itself, at stages 1 to 3

Then, in a program of your own, with {"checkpoint": {"load_universal": true}} in its DeepSpeed configuration:

    engine.load_checkpoint("OUT")

It holds what trains: weights in fp32, moments, steps, settings of parameter groups, and what the training program
saved. Frozen weights stay those that the engine was made with. A run of adept-ds needs none: it goes on from its
checkpoints as they are, on any ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversions import parser_of, run

from adept_ds.base.terminal import Terminal


def convert(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from adept_ds.run.conversion import convert_to_universal, find_checkpoint

    found = find_checkpoint(arguments.checkpoint, arguments.step)
    with terminal.progress("converting") as bar:
        state = convert_to_universal(found.directory, arguments.out, bar, overwrite=arguments.overwrite)
    terminal.say(
        f"{len(state.parameters)} tensors with their moments, written by {state.world_size} ranks under "
        f"ZeRO-{state.zero_stage}, in {found.directory}; universal checkpoint in {arguments.out}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run, or a DeepSpeed checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new directory")
    parser.add_argument(
        "--step",
        type=int,
        help="of a run's checkpoint; by default the newest, or the best where the guard has ended training",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the directory of an earlier conversion")
    run(parser, convert)


if __name__ == "__main__":
    main()
