"""Held-out losses of the base model, of the exported one, and of models between them (docs/evaluation.md).

evaluation_base.json, document_losses_base.safetensors    stage eval_base: the same in every run on these texts
evaluation.json, document_losses.safetensors              stage eval: all models
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_bytes
from adept_ds.base.run_records import BaseEvaluation, CorpusLoss, DialLoss, Evaluation
from adept_ds.config.corpus_entries import corpus_sources
from adept_ds.evaluation.dials import dial_of
from adept_ds.evaluation.held_out import DocumentLosses, HeldOut, by_corpus, document_losses
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.run.identity import reading_settings
from adept_ds.run.ledger import Stage
from adept_ds.run.non_finite import naming_what_is_not_finite
from adept_ds.run.prerequisites import check_ready
from adept_ds.zero.build import build_forward_engine
from adept_ds.zero.engine import release


def eval_stage(run: Context) -> dict[str, Any]:
    """Losses of both models, each loaded from disk as a user would, and at the positions of `eval.dial`."""
    data = run.settings.config.data
    if not (data.general_eval or data.domain_eval):
        run.terminal.stage("eval", "[dim]no held-out corpora (data.general_eval, data.domain_eval)[/]")
        return {}
    adapted = run.ranks.on_main(lambda: _exported(run))
    files = run.run_dir
    base_stage = Stage(
        "eval_base",
        files.base_evaluation,
        lambda: {"model": run.identity.model(run.settings.model), **_texts(run)},
        also=(files.base_document_losses,),
    )
    stage = Stage("eval", files.evaluation, lambda: _inputs(run, adapted), also=(files.document_losses,))
    run.ledger.once(base_stage, lambda: _evaluate_base(run))
    if not run.ledger.once(stage, lambda: _evaluate_adapted(run, adapted)):
        run.unchanged("eval")
    return run.ranks.on_main(lambda: Evaluation.load(files.evaluation)).to_json()


def evaluate_model(run: Context, model_dir: ModelDirectory, title: str) -> dict[str, CorpusLoss]:
    """Losses of a model by held-out corpus. Raises `InputError` as `losses_of`."""
    (losses,) = losses_of(run, model_dir, title)
    return by_corpus(run.corpora.held_out_documents, losses)


def losses_of(
    run: Context, model_dir: ModelDirectory, title: str, positions: Sequence[float] = (1.0,)
) -> list[DocumentLosses]:
    """Losses of a model by document, at each position of the dial (1: as it is).

    Raises:
        InputError: a loss is no finite number; the message names the corpus, and the tensor that is to blame.
    """
    held_out = run.corpora.held_out_documents  # first: a mistake in a text shows before a model is loaded
    model, device = build_forward_engine(run.engines, model_dir)
    config = run.settings.config
    evaluator = Evaluator(model, device, run.ranks, config.train.micro_batch_size * config.data.seq_len)
    try:
        found = []
        for alpha in positions:
            where = title
            if alpha != 1:
                where = f"{title} at alpha={alpha:g}"
                dial_of(method_of(config).dial, model, model_dir, run.settings.model, run.precision).turn(alpha)
            with naming_what_is_not_finite(run, model_dir), run.progress.together(where) as bar:
                found.append(document_losses(evaluator, held_out, bar))
        return found
    finally:
        release(model)


def _evaluate_base(run: Context) -> None:
    held_out = run.corpora.held_out_documents
    (losses,) = losses_of(run, run.settings.model, "evaluating base")

    def write() -> None:
        _write_losses(run.run_dir.base_document_losses, held_out, {"base": losses})
        BaseEvaluation(corpora=by_corpus(held_out, losses)).save(run.run_dir.base_evaluation)

    run.ranks.on_main(write)


def _evaluate_adapted(run: Context, adapted: ModelDirectory) -> None:
    held_out, dial = run.corpora.held_out_documents, run.settings.config.eval.dial
    losses, *between = losses_of(run, adapted, "evaluating adapted", (1.0, *dial))
    positions = dict(zip(dial, between, strict=True))

    def write() -> None:
        base = BaseEvaluation.load(run.run_dir.base_evaluation)
        of_base = _read_losses(run.run_dir.base_document_losses, held_out, "base")
        named = {f"alpha={alpha:g}": of for alpha, of in positions.items()}
        _write_losses(run.run_dir.document_losses, held_out, {"base": of_base, "adapted": losses} | named)
        Evaluation(
            base=base.corpora,
            adapted=by_corpus(held_out, losses),
            dial=[DialLoss(alpha=alpha, corpora=by_corpus(held_out, of)) for alpha, of in positions.items()],
        ).save(run.run_dir.evaluation)

    run.ranks.on_main(write)


def _inputs(run: Context, adapted: ModelDirectory) -> dict[str, Any]:
    config = run.settings.config
    models = [run.identity.model(model) for model in (run.settings.model, adapted)]
    dial = [method_of(config).dial, config.eval.dial] if config.eval.dial else []
    return {"models": models, "dial": dial, **_texts(run)}


def _texts(run: Context) -> dict[str, Any]:
    """What models are evaluated on, and how."""
    data = run.settings.config.data
    corpora = {"data.general_eval": data.general_eval, "data.domain_eval": data.domain_eval}
    return {
        "corpora": [run.identity.corpus(key, entries) for key, entries in corpora.items()],
        "sources": [[source.title for source in corpus_sources(entries)] for entries in corpora.values()],
        "reading": reading_settings(data),
        "data": [data.seq_len, data.eval_sequences, run.settings.config.train.precision],
    }


def _write_losses(path: Path, held_out: HeldOut, models: Mapping[str, DocumentLosses]) -> None:
    tensors = {f"ids/{name}": documents.ids for name, documents in held_out.items()}
    tensors |= {f"tokens/{name}": documents.tokens for name, documents in held_out.items()}
    tensors |= {f"loss/{model}/{name}": of[name] for model, of in models.items() for name in held_out}
    write_bytes(path, save(tensors))


def _read_losses(path: Path, held_out: HeldOut, model: str) -> DocumentLosses:
    try:
        tensors = load_file(path)
        return {name: tensors[f"loss/{model}/{name}"] for name in held_out}
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(
            f"'{path}' is damaged ({error}); move it away, and `adept eval CONFIG` makes it again"
        ) from None


def _exported(run: Context) -> ModelDirectory:
    check_ready(run.settings.config, "eval")
    return ModelDirectory.read(run.run_dir.export)
