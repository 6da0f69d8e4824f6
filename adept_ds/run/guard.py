"""The guard of a run: held-out documents under the model that trains, paired with those under the base."""

from __future__ import annotations

from adept_ds.base.digests import json_digest
from adept_ds.base.guard_record import Reading
from adept_ds.base.progress import ProgressCallback
from adept_ds.config.dial_section import fewest_documents
from adept_ds.evaluation.held_out import DocumentLosses, by_corpus, document_losses
from adept_ds.evaluation.rises import Pairs, check_halves
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.run.context import Context
from adept_ds.run.evaluate import base_losses, held_out_texts
from adept_ds.run.ledger import plain
from adept_ds.training.guard import Guard, Measured
from adept_ds.zero.engine import Engine


def check_guard_texts(run: Context) -> None:
    """Held-out documents are enough to tell anything by. Raises `InputError`."""
    section = run.settings.config.guard
    if section is not None:
        check_halves(run.corpora.held_out_documents, fewest_documents(section.confidence), "guard")


def losses_of_base(run: Context) -> DocumentLosses | None:
    """What the guard compares with, if there is one; to be asked for before the engine that trains is there."""
    return base_losses(run) if run.settings.config.guard else None


def make_guard(run: Context, engine: Engine, base: DocumentLosses | None) -> Guard | None:
    """What the section `guard` says, for the engine that trains."""
    config, ranks = run.settings.config, run.ranks
    if config.guard is None or base is None:
        return None
    held_out = run.corpora.held_out_documents
    pairs = Pairs(held_out, base, config.guard.confidence)
    evaluator = Evaluator(engine, engine.device, ranks, config.train.micro_batch_size * config.data.seq_len)

    def measure(progress: ProgressCallback) -> Measured:
        losses = document_losses(evaluator, held_out, progress)
        corpora = {name: {"loss": of.loss, "tokens": of.tokens} for name, of in by_corpus(held_out, losses).items()}
        # Rank 0 alone: ranks that computed limits by themselves could disagree in a last bit.
        return Measured(corpora, ranks.on_main(lambda: _reading(pairs, losses)))

    return Guard(config.guard, measure, ranks.on_main(lambda: _digest_of_texts(run)))


def _digest_of_texts(run: Context) -> str:
    """Of what is in them, whatever sources are called."""
    return json_digest(plain({key: value for key, value in held_out_texts(run).items() if key != "sources"}))


def _reading(pairs: Pairs, losses: DocumentLosses) -> Reading:
    """On one half, as positions of the dial are chosen: the other half has chosen nothing."""
    return Reading(general=pairs.limits(losses, "validation"), domain=pairs.domain_loss(losses, "validation"))
