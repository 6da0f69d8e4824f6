"""Held-out losses of the base model and of the exported one (evaluation.json)."""

from __future__ import annotations

from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.run.ledger import Stage, stamp_corpus, stamp_model
from adept_ds.training.evaluation import evaluate
from adept_ds.zero.build import build_forward_engine
from adept_ds.zero.engine import release


def eval_stage(run: Context) -> dict[str, Any]:
    """Losses of both models, each loaded from disk as a user would."""
    config, output = run.settings.config, run.run_dir.evaluation
    if not run.corpora.held_out:
        run.terminal.stage("eval", "[dim]no held-out corpora (data.general_eval, data.domain_eval)[/]")
        return {}
    models = {"base": run.settings.model, "adapted": run.ranks.on_main(lambda: _exported(run))}

    def inputs() -> dict[str, Any]:
        data = config.data
        return {
            "models": [stamp_model(model) for model in models.values()],
            "corpora": [stamp_corpus(files) for files in (data.general_eval, data.domain_eval)],
            "data": [data.seq_len, data.eval_sequences, data.question_template, config.train.precision],
        }

    def make() -> None:
        results = {name: evaluate_model(run, model, f"evaluating {name}") for name, model in models.items()}
        run.ranks.on_main(lambda: write_json(output, results))

    if not run.ledger.once(Stage("eval", output, inputs), make):
        run.unchanged("eval")
    return dict(run.ranks.on_main(lambda: read_json(output)))


def evaluate_model(run: Context, model_dir: ModelDirectory, title: str) -> dict[str, Any]:
    """Loss and number of tokens of each held-out corpus."""
    model, device = build_forward_engine(run.engines, model_dir)
    micro_batch_size = run.settings.config.train.micro_batch_size
    with run.progress.together(title) as bar:
        results = evaluate(
            model, run.corpora.held_out, run.ranks, micro_batch_size=micro_batch_size, device=device, progress=bar
        )
    release(model)
    return results


def _exported(run: Context) -> ModelDirectory:
    if not run.run_dir.export.is_dir():
        raise InputError(f"eval: '{run.run_dir.export}' does not exist; run `adept export CONFIG` first")
    return ModelDirectory.read(run.run_dir.export)
