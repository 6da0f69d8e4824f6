"""How long training stands still for a checkpoint: as DeepSpeed writes it, with proof, and so in the background.

    python tools/bench_checkpoint.py --folder /data
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py --zero 2

Sixteen trainable Llama layers of SmolLM2's size: 57 M elements, 0.7 GB of weights and moments. The ways take turns, so
that all see the same machine; medians are printed. Written in the background a checkpoint stands in the way twice,
where it is copied to the host's memory and where it is published; what it takes from the steps between is shown too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_step import LAYERS, ONE_SEQUENCE, write_model

from adept_ds.base.files import sync_tree
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.training.checkpoint import CheckpointManifest
from adept_ds.training.checkpoint_writer import CheckpointWriter, Retention
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import Engine


@dataclass(frozen=True)
class Saved:
    """One checkpoint, in seconds."""

    still: float
    """That training stood still."""
    whole: float
    """From its beginning until it is there."""
    step: float | None = None
    """Of a training step meanwhile."""


def timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


@dataclass
class Bench:
    engine: Engine
    ranks: Ranks
    folder: Path
    saved: int = 0

    def step(self) -> float:
        """One of training."""
        tokens = torch.arange(64).unsqueeze(0)

        def train() -> None:
            self.engine.backward(self.engine(tokens, tokens).sum())
            self.engine.step()

        return timed(train)

    def by_deepspeed(self) -> Saved:
        """To the disk, as any other: without that it would be in memory alone."""
        self.saved += 1
        place = self.folder / "plain"

        def save() -> None:
            self.engine.save_checkpoint(str(place), tag=f"step_{self.saved}", exclude_frozen_parameters=True)
            sync_tree(place / f"step_{self.saved}")
            self.ranks.barrier()

        seconds = timed(save)
        return Saved(seconds, seconds)

    def with_proof(self, *, background: bool) -> Saved:
        self.saved += 1
        manifest = CheckpointManifest(
            step=self.saved, world_size=self.ranks.world_size, zero_stage=3, fingerprint="", settings={}
        )
        writer = CheckpointWriter(self.engine, self.folder / "proved", self.ranks, Retention(1), background=background)
        begun = time.perf_counter()
        still, steps = timed(lambda: writer.save(manifest, {}, lambda files: None)), []
        while background and self.ranks.sum([float(writer.is_written)]).item() < self.ranks.world_size:
            steps.append(self.step())
        still += timed(writer.finish)
        return Saved(still, time.perf_counter() - begun, statistics.median(steps) if steps else None)


def build(model: ModelDirectory, ranks: Ranks, stage: int) -> Engine:
    settings = EngineSettings({"zero_optimization": {"stage": stage}}, torch.float32, ranks)
    shape = StepShape(ranks.world_size, ONE_SEQUENCE.micro_batch_size, 1, ONE_SEQUENCE.clip_grad_norm)
    trains = layers_train(model.family, range(LAYERS))
    return build_training_engine(settings, model, trains, lambda parameters: torch.optim.AdamW(parameters), shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, choices=[1, 2, 3], default=3, help="stage")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default where temporary files are")
    options = parser.parse_args()
    ranks = join(rank_from_environment(os.environ))
    fresh = tempfile.TemporaryDirectory(dir=options.folder) if ranks.is_main else None
    folder = Path(ranks.gather(fresh.name if fresh else "")[0])
    ranks.on_main(lambda: bool(write_model(folder / "model")))
    bench = Bench(build(ModelDirectory.read(folder / "model"), ranks, options.zero), ranks, folder)
    ways: dict[str, Callable[[], Saved]] = {
        "DeepSpeed alone": bench.by_deepspeed,
        "with proof": lambda: bench.with_proof(background=False),
        "with proof, in the background": lambda: bench.with_proof(background=True),
    }
    found: dict[str, list[Saved]] = {name: [] for name in ways}
    bench.step()
    usual = []
    for _ in range(options.rounds):
        for name, save in ways.items():
            usual.append(bench.step())
            found[name].append(save())
    if ranks.is_main:
        size = sum(path.stat().st_size for path in (folder / "proved").rglob("*") if path.is_file())
        print(f"{size / 1e9:.2f} GB on {ranks.world_size} ranks under ZeRO-{options.zero}, medians of {options.rounds}")
        print(f"a step otherwise takes {statistics.median(usual):.2f} s")
        for name, saves in found.items():
            still, whole = (statistics.median(getattr(save, of) for save in saves) for of in ("still", "whole"))
            steps = [save.step for save in saves if save.step is not None]
            meanwhile = f", a step meanwhile {statistics.median(steps):.2f} s" if steps else ""
            print(f"{name}: training stands still {still:.2f} s; on the disk after {whole:.2f} s{meanwhile}")
    ranks.barrier()
    leave()
    if fresh is not None:
        fresh.cleanup()


if __name__ == "__main__":
    main()
