"""Stage one: which layers does general competence hardly need? (layer_importance.json)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adept_ds.base.files import write_json
from adept_ds.config.corpus_entries import CorpusSource
from adept_ds.config.layer_sections import Stability
from adept_ds.methods.shape import method_of
from adept_ds.models.flops import planned_step_flops
from adept_ds.probing.decision import Reference, check_halves, check_noise, result_of, select
from adept_ds.probing.estimators import ESTIMATORS, Probe
from adept_ds.probing.model_size import model_size
from adept_ds.probing.passes import PassProgress
from adept_ds.probing.result import LayerImportance
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.stability import rank_correlations
from adept_ds.ranks.unfinished import Unfinished, Work
from adept_ds.run.context import Context
from adept_ds.run.expand import check_same_model
from adept_ds.run.identity import reading_settings
from adept_ds.run.ledger import Stage
from adept_ds.run.non_finite import naming_what_is_not_finite


def probe_stage(run: Context) -> LayerImportance:
    """Estimate the importance of every layer, and choose which are copied."""
    section = run.settings.config.probe
    run.ranks.on_main(lambda: check_same_model(run))
    probe = _probe(run)
    if section.stability == "halves":
        check_halves(probe)
    if probe.expand.tie_break == "cost":
        check_noise(probe)
    scores = _layer_scores(run, probe, section.corpus)
    reference = _reference(run, probe) if isinstance(section.stability, Stability) else None

    def decide() -> LayerImportance:
        result = result_of(probe, scores, reference)
        result.save(run.run_dir.layer_importance)
        return result

    result = run.ranks.on_main(decide)
    selection = result.selection
    what = "least important" if selection and selection.choose == "lowest" else "chosen"
    run.terminal.stage("probe", f"base loss {result.base_loss:.4f}, {what} layers {list(result.selected)}")
    if selection and (selection.rule is not None or selection.tie_break is not None):
        run.terminal.stage("probe", selection.reason)
    if result.stability is not None:
        run.terminal.stage("probe", result.stability.sentence())
    return result


def compare_methods(run: Context, result: LayerImportance) -> dict[str, Any]:
    """All estimators on the probe's text (layer_methods.json), beside `result`, what `probe_stage` has just found."""
    probe, methods = _probe(run), {}
    for method in ESTIMATORS:
        of_method = replace(probe, section=probe.section.model_copy(update={"method": method}))
        scores = _layer_scores(run, of_method, probe.section.corpus, "" if method == result.method else method)
        selected = run.ranks.on_main(partial(select, probe, scores.deltas))
        methods[method] = {"deltas": scores.deltas, "selected": selected, "seconds": scores.seconds}
    found = {"methods": methods, "spearman": rank_correlations(methods)}
    run.ranks.on_main(lambda: write_json(run.run_dir.layer_methods, found))
    return found


def _probe(run: Context) -> Probe:
    config = run.settings.config
    sample = run.corpora.general.sample(config.probe.sequences, config.probe.seed)

    def cost(layers: Sequence[int]) -> float:
        size, copied = model_size(run.settings.model), method_of(config).makes_copies
        passed, head, seq_len = size.layer_passed, size.head_passed, config.data.seq_len
        return planned_step_flops(passed, layers, size.attention_width, head, seq_len, copied=copied).total

    return Probe(run.engines, config.probe, config.expand, config.probe.seed, run.settings.model, sample, cost)


def _reference(run: Context, probe: Probe) -> Reference:
    """Scores of another corpus or model."""
    section, other = run.settings.config.probe, run.settings.reference_model
    assert isinstance(section.stability, Stability)
    if section.stability.corpus is not None:
        corpus = run.corpora.for_probing("probe.stability.corpus", section.stability.corpus)
        sample = corpus.sample(section.sequences, probe.seed)
        scores = _layer_scores(run, replace(probe, sample=sample), section.stability.corpus, "corpus")
        return Reference("corpus", ", ".join(sample.names), scores)
    assert other is not None
    scores = _layer_scores(run, replace(probe, model=other), section.corpus, "model")
    return Reference("model", str(section.stability.model), scores)


def _layer_scores(
    run: Context, probe: Probe, corpus: Sequence[Path | CorpusSource], reference: str = ""
) -> LayerScores:
    """From the file, if it was made from these very inputs; another k then needs no second probe."""
    config, section = run.settings.config, probe.section
    key = "probe.stability.corpus" if reference == "corpus" else "probe.corpus"
    output = run.run_dir.layer_scores(reference)

    def inputs() -> dict[str, Any]:
        keys = {"method", "sequences", "seq_len", *ESTIMATORS[section.method].depends_on}
        return {
            # Tokenised for one, probed by the other.
            "models": [run.identity.model(run.settings.model), run.identity.model(probe.model)],
            "probe": section.model_dump(mode="json", include=keys),
            "corpus": run.identity.corpus(key, corpus),
            "reading": reading_settings(config.data),
            "seed": probe.seed,
            "precision": run.precision_name,
        }

    def make(unfinished: Unfinished) -> None:
        scores = _passes(run, probe, unfinished.work(f"probing, {section.method}"))
        run.ranks.on_main(lambda: scores.save(output))

    if not run.ledger.once(Stage(f"probe{reference and '_'}{reference}", output, inputs), make):
        run.unchanged("probe")
    return run.ranks.on_main(lambda: LayerScores.load(output))


def _passes(run: Context, probe: Probe, work: Work) -> LayerScores:
    method = probe.section.method
    with naming_what_is_not_finite(run, probe.model), run.terminal.progress(f"probing, {method}") as bar:
        check = run.progress.stop.checked("probing", bar, run.ranks)
        return ESTIMATORS[method].score(probe, PassProgress(probe.model.num_layers, check, bar), work)
