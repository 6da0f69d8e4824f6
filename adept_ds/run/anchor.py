"""What training is anchored to: a sample of a corpus, or text that the base writes (anchor_text.safetensors)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from adept_ds.base.files import write_bytes
from adept_ds.config.anchor_section import AnchorSection
from adept_ds.config.checks import anchor_shape, first_token
from adept_ds.data.anchor_text import AnchorText
from adept_ds.data.blocks import Blocks
from adept_ds.methods.shape import Start
from adept_ds.models.anchor_passes import AnchorPasses
from adept_ds.models.flops import count_anchor_flops
from adept_ds.models.next_token import NextToken
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.context import Context
from adept_ds.run.ledger import Stage
from adept_ds.training.anchor import Anchor
from adept_ds.training.sampled_text import Writer
from adept_ds.zero.build import build_forward_engine
from adept_ds.zero.engine import Engine, release

_TOKENS, _TOKEN = "tokens", np.int32


def anchor_text_stage(run: Context) -> None:
    """Let the base write the text, where it shall: with an engine of its own, before that which trains is there."""
    section = run.settings.config.anchor
    if section is None or section.text != "sampled":
        return
    run.ledger.once(_stage(run, section), partial(_sample, run, section))


def make_anchor(run: Context, engine: Engine, start: Start) -> Anchor | None:
    """What the section `anchor` says, for the engine that trains; every rank has to ask for it.

    Raises:
        InputError: see `Corpora.anchor`.
    """
    config, family = run.settings.config, start.model.family
    section = config.anchor
    if section is None:
        return None
    text = _text(run, section)
    passes = AnchorPasses(engine.module, family, start.layers, section.kind)
    hidden_size: Any = engine.module.config.hidden_size  # type: ignore[union-attr]
    block_bytes = passes.num_states * text.blocks.seq_len * hidden_size * run.precision.itemsize
    flops = count_anchor_flops(engine.module, family, text.blocks.seq_len, start.layers, section.kind)
    return Anchor(engine, passes, text, section.weight, run.ranks, (section.cache_mib << 20) // block_bytes, flops)


def _text(run: Context, section: AnchorSection) -> AnchorText:
    config, ranks = run.settings.config, run.ranks
    if section.text == "sampled":
        blocks = read_anchor_text(run.run_dir.anchor_text, ranks)
        indices = tuple(range(len(blocks)))
    else:
        sample = run.corpora.anchor.sample(section.sequences, config.probe.seed)
        blocks, indices = sample.blocks, sample.indices
    _, rows = anchor_shape(config, ranks.world_size)
    return AnchorText(blocks, indices, config.anchored, rows, config.train.seed)


def read_anchor_text(file: Path, ranks: Ranks) -> Blocks:
    """What the base wrote. Raises `InputError`, on every rank: it is damaged."""

    def read() -> np.ndarray:
        tokens: np.ndarray = load_file(file)[_TOKENS].numpy()
        if tokens.ndim != 2 or not tokens.size or tokens.dtype != _TOKEN or tokens.min() < 0:
            raise ValueError(f"{_TOKENS}: {tokens.dtype}{tokens.shape}, or a negative number")
        return tokens

    return Blocks.of_rows(ranks.on_each(read, f"move '{file}' away, and the base writes it again"))


def _stage(run: Context, section: AnchorSection) -> Stage:
    config = run.settings.config

    def inputs() -> dict[str, Any]:
        return {
            "model": run.identity.model(run.settings.model),
            "sequences": section.sequences,
            "seq_len": config.data.seq_len,
            "seed": config.probe.seed,
            "precision": str(run.precision),
        }

    return Stage("anchor_text", run.run_dir.anchor_text, inputs)


def _sample(run: Context, section: AnchorSection, unfinished: Unfinished) -> None:
    config, base = run.settings.config, run.settings.model
    begins_with, next_token = first_token(base), None
    assert begins_with is not None

    def prepare(model: torch.nn.Module) -> None:
        nonlocal next_token
        next_token = NextToken(model, base.family)

    model, device = build_forward_engine(run.engines, base, prepare)
    assert next_token is not None
    writer = Writer(model, next_token.begin, begins_with, device, run.ranks)
    doing = "writing anchor text"
    with run.progress.together(doing) as bar:
        work = unfinished.work(doing)
        tokens = writer.write(section.sequences, config.data.seq_len, config.probe.seed, bar, work)
    release(model)
    run.ranks.on_main(lambda: write_bytes(run.run_dir.anchor_text, save({_TOKENS: tokens})))
    run.terminal.stage("anchor", f"the base wrote {len(tokens)} sequences of {config.data.seq_len} tokens")
