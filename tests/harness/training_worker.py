"""What one rank does in test_other_ranks.py: the training of several runs, one after the other in one process group.

Usage: python -m harness.training_worker CONFIG...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from adept_ds.base.terminal import Terminal
from adept_ds.config.loading import load_config
from adept_ds.config.resolved import resolve
from adept_ds.methods.shape import method_of
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.context import Context
from adept_ds.run.expand import expand_stage
from adept_ds.run.pipeline import prepare_data
from adept_ds.run.train import train_stage


def main() -> None:
    ranks = join(rank_from_environment(os.environ))
    terminal = Terminal(sys.stdout if ranks.is_main else None)
    for file in sys.argv[1:]:
        settings = resolve(load_config(Path(file)), "train", ranks.world_size)
        run = Context.of(settings, ranks, terminal, StopRequest())
        prepare_data(run)
        if method_of(settings.config).makes_copies:
            expand_stage(run)
        train_stage(run)


if __name__ == "__main__":
    main()
