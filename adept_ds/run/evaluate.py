"""Held-out losses of the base model, of the exported one, and of models between them (docs/evaluation.md).

Stages of the ledger:
    eval_base    evaluation_base.json, document_losses_base.safetensors: the same in every run on these texts
    eval         evaluation.json, document_losses.safetensors: all models
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_bytes
from adept_ds.base.run_records import Accuracy, BaseEvaluation, CorpusLoss, DialLoss, Evaluation
from adept_ds.config.corpus_entries import corpus_sources
from adept_ds.evaluation.held_out import DocumentLosses, HeldOut, SourceName, by_corpus, document_losses
from adept_ds.evaluation.questions import accuracies
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.context import Context
from adept_ds.run.identity import reading_settings
from adept_ds.run.ledger import Stage
from adept_ds.run.loaded import evaluator_of, turned
from adept_ds.run.non_finite import naming_what_is_not_finite
from adept_ds.run.prerequisites import check_ready
from adept_ds.run.score_tasks import tasks_stage


def eval_stage(run: Context) -> dict[str, Any]:
    """What is found out of both models, each loaded from disk as a user would, and at the positions of `eval.dial`.

    Returns:
        As `Evaluation.to_json`, if there is held-out text; and what models score on tasks, if there are some.
    """
    config = run.settings.config
    holds_out = bool(config.data.general_eval or config.data.domain_eval)
    if not (holds_out or config.eval.scores_tasks):
        run.terminal.stage("eval", "[dim]no held-out corpora (data.general_eval, data.domain_eval)[/]")
        return {}
    adapted = run.ranks.on_main(lambda: _exported(run))
    results = _losses(run, adapted).to_json() if holds_out else {}
    return results | ({"tasks": tasks_stage(run, adapted).models} if config.eval.scores_tasks else {})


def _losses(run: Context, adapted: ModelDirectory) -> Evaluation:
    files = run.run_dir
    evaluate_base(run)
    stage = Stage("eval", files.evaluation, lambda: _inputs(run, adapted), also=(files.document_losses,))
    if not run.ledger.once(stage, partial(_evaluate_adapted, run, adapted)):
        run.unchanged("eval")
    return run.ranks.on_main(lambda: Evaluation.load(files.evaluation))


def evaluate_base(run: Context) -> None:
    """Unless it was, on these texts."""
    files = run.run_dir
    stage = Stage(
        "eval_base",
        files.base_evaluation,
        lambda: {"model": run.identity.model(run.settings.model), **held_out_texts(run)},
        also=(files.base_document_losses,),
    )
    run.ledger.once(stage, partial(_evaluate_base, run))


def base_losses(run: Context) -> DocumentLosses:
    """Of the base, by document, on every rank; evaluated, unless they are known."""
    evaluate_base(run)
    held_out = run.corpora.held_out_documents
    return run.ranks.on_main(lambda: _read_losses(run.run_dir.base_document_losses, held_out, "base"))


@dataclass(frozen=True)
class Found:
    """Of one model."""

    losses: DocumentLosses
    accuracies: Mapping[SourceName, Accuracy]

    def by_corpus(self, held_out: HeldOut) -> dict[str, CorpusLoss]:
        return by_corpus(held_out, self.losses, self.accuracies)


def evaluate_model(run: Context, model_dir: ModelDirectory, title: str) -> dict[str, CorpusLoss]:
    """Of a model by held-out corpus. Raises `InputError` as `find`."""
    (found,) = find(run, model_dir, title)
    return found.by_corpus(run.corpora.held_out_documents)


def find(
    run: Context,
    model_dir: ModelDirectory,
    title: str,
    positions: Sequence[float] = (1.0,),
    unfinished: Unfinished | None = None,
) -> list[Found]:
    """Losses and accuracies of a model at each position of the dial (1: as it is), the first of which is 1.

    Args:
        unfinished: where they are kept, pass by pass.

    Raises:
        InputError: a loss is no finite number; the message names the corpus, and the tensor that is to blame.
    """
    held_out, questions = run.corpora.held_out_documents, run.corpora.held_out_questions
    unfinished = unfinished or Unfinished()
    with evaluator_of(run, model_dir) as evaluator:  # after texts: a mistake in one shows before a model is loaded
        found = []
        for where in turned(run, evaluator, model_dir, title, positions):
            with naming_what_is_not_finite(run, model_dir), run.progress.together(where) as bar:
                losses = document_losses(evaluator, held_out, bar, work=unfinished.work(where))
            asking = f"{where}: questions"
            with run.progress.together(asking) as bar:
                found.append(Found(losses, accuracies(evaluator, questions, bar, unfinished.work(asking))))
        return found


def _evaluate_base(run: Context, unfinished: Unfinished) -> None:
    held_out = run.corpora.held_out_documents
    (found,) = find(run, run.settings.model, "evaluating base", unfinished=unfinished)

    def write() -> None:
        _write_losses(run.run_dir.base_document_losses, held_out, {"base": found.losses})
        BaseEvaluation(corpora=found.by_corpus(held_out)).save(run.run_dir.base_evaluation)

    run.ranks.on_main(write)


def _evaluate_adapted(run: Context, adapted: ModelDirectory, unfinished: Unfinished) -> None:
    held_out, dial = run.corpora.held_out_documents, run.settings.config.eval.dial
    found, *between = find(run, adapted, "evaluating adapted", (1.0, *dial), unfinished)
    positions = dict(zip(dial, between, strict=True))

    def write() -> None:
        base = BaseEvaluation.load(run.run_dir.base_evaluation)
        losses = {"base": _read_losses(run.run_dir.base_document_losses, held_out, "base"), "adapted": found.losses}
        losses |= {f"alpha={alpha:g}": at.losses for alpha, at in positions.items()}
        _write_losses(run.run_dir.document_losses, held_out, losses)
        Evaluation(
            base=base.corpora,
            adapted=found.by_corpus(held_out),
            dial=[DialLoss(alpha=alpha, corpora=at.by_corpus(held_out)) for alpha, at in positions.items()],
        ).save(run.run_dir.evaluation)

    run.ranks.on_main(write)


def _inputs(run: Context, adapted: ModelDirectory) -> dict[str, Any]:
    config = run.settings.config
    models = [run.identity.model(model) for model in (run.settings.model, adapted)]
    dial = [method_of(config).dial, config.eval.dial] if config.eval.dial else []
    return {"models": models, "dial": dial, **held_out_texts(run)}


def held_out_texts(run: Context) -> dict[str, Any]:
    """What models are evaluated on, and how."""
    data = run.settings.config.data
    corpora = {"data.general_eval": data.general_eval, "data.domain_eval": data.domain_eval}
    return {
        "corpora": [run.identity.corpus(key, entries) for key, entries in corpora.items()],
        "sources": [[source.title for source in corpus_sources(entries)] for entries in corpora.values()],
        "reading": reading_settings(data),
        "data": [data.seq_len, data.eval_sequences, run.precision_name],
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
    config, export = run.settings.config, run.run_dir.export
    check_ready(config, "eval")
    makes = "export" if config.dial is None else "dial"
    run.identity.check_as_written(export, f"`adept {makes} CONFIG` makes it again, and keeps this one aside")
    return ModelDirectory.read(export)
