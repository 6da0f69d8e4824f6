"""Held-out losses of the base model and of the exported one (evaluation.json)."""

from __future__ import annotations

from typing import Any

from adept_ds.base.files import write_json
from adept_ds.base.run_records import Evaluation
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.run.identity import reading_settings
from adept_ds.run.ledger import Stage
from adept_ds.run.non_finite import naming_what_is_not_finite
from adept_ds.run.prerequisites import check_ready
from adept_ds.training.evaluation import evaluate
from adept_ds.zero.build import build_forward_engine
from adept_ds.zero.engine import release


def eval_stage(run: Context) -> dict[str, Any]:
    """Losses of both models, each loaded from disk as a user would."""
    config, output = run.settings.config, run.run_dir.evaluation
    data = config.data
    if not (data.general_eval or data.domain_eval):
        run.terminal.stage("eval", "[dim]no held-out corpora (data.general_eval, data.domain_eval)[/]")
        return {}
    models = {"base": run.settings.model, "adapted": run.ranks.on_main(lambda: _exported(run))}

    def inputs() -> dict[str, Any]:
        corpora = {"data.general_eval": data.general_eval, "data.domain_eval": data.domain_eval}
        return {
            "models": [run.identity.model(model) for model in models.values()],
            "corpora": [run.identity.corpus(key, entries) for key, entries in corpora.items()],
            "reading": reading_settings(data),
            "data": [data.seq_len, data.eval_sequences, config.train.precision],
        }

    def make() -> None:
        results = {name: evaluate_model(run, model, f"evaluating {name}") for name, model in models.items()}
        run.ranks.on_main(lambda: write_json(output, results))

    if not run.ledger.once(Stage("eval", output, inputs), make):
        run.unchanged("eval")
    return run.ranks.on_main(lambda: Evaluation.load(output)).to_json()


def evaluate_model(run: Context, model_dir: ModelDirectory, title: str) -> dict[str, Any]:
    """Loss and number of tokens of each held-out corpus.

    Raises:
        InputError: a loss is no finite number; the message names the corpus, and the tensor that is to blame.
    """
    held_out = run.corpora.held_out  # first: a mistake in a text shows before a model is loaded
    model, device = build_forward_engine(run.engines, model_dir)
    micro_batch_size = run.settings.config.train.micro_batch_size
    try:
        with naming_what_is_not_finite(run, model_dir), run.progress.together(title) as bar:
            return evaluate(model, held_out, run.ranks, micro_batch_size=micro_batch_size, device=device, progress=bar)
    finally:
        release(model)


def _exported(run: Context) -> ModelDirectory:
    check_ready(run.settings.config, "eval")
    return ModelDirectory.read(run.run_dir.export)
