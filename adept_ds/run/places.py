"""Stage one by gain: what would copies do at each place? (place_scores.json, place_benefits.json)"""

from __future__ import annotations

from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.probing.place_gradients import weigh_places
from adept_ds.probing.places import PlaceBenefits, PlaceScores, choose_places
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.context import Context
from adept_ds.run.expand import check_same_model
from adept_ds.run.identity import reading_settings
from adept_ds.run.ledger import Stage
from adept_ds.run.non_finite import naming_what_is_not_finite


def places_stage(run: Context) -> PlaceBenefits:
    """Weigh all places, and choose those that are copied at."""
    run.ranks.on_main(lambda: check_same_model(run))
    scores = _place_scores(run)

    def decide() -> PlaceBenefits:
        found = choose_places(run.settings.config.expand, scores)
        found.save(run.run_dir.place_benefits)
        return found

    found = run.ranks.on_main(decide)
    losses = f"base loss {found.domain.loss:.4f} on domain text, {found.general.loss:.4f} on general text"
    run.terminal.stage("probe", f"{losses}, copies behind layers {list(found.selected)}")
    run.terminal.stage("probe", found.reason)
    return found


def _place_scores(run: Context) -> PlaceScores:
    """From the file, if it was made from these very inputs; another k or weight then needs no second pass."""
    config, output = run.settings.config, run.run_dir.place_scores

    def inputs() -> dict[str, Any]:
        return {
            "model": run.identity.model(run.settings.model),
            "probe": config.probe.model_dump(mode="json", include={"sequences", "seq_len", "seed"}),
            "domain": run.identity.corpus("data.domain", config.data.domain),
            "general": run.identity.corpus("probe.corpus", config.probe.corpus),
            "reading": reading_settings(config.data),
            "precision": run.precision_name,
        }

    def make(unfinished: Unfinished) -> None:
        scores = _weigh(run, unfinished)
        run.ranks.on_main(lambda: scores.save(output))

    if not run.ledger.once(Stage("places", output, inputs), make):
        run.unchanged("probe")
    return run.ranks.on_main(lambda: _read(run))


def _read(run: Context) -> PlaceScores:
    """Raises `InputError`: the file is damaged, or of another model after all."""
    output, num_layers = run.run_dir.place_scores, run.settings.model.num_layers
    scores = PlaceScores.load(output)
    if len(scores.gains) != num_layers:
        raise InputError(
            f"'{output}' is damaged ({len(scores.gains)} gains of {num_layers} layers); {PlaceScores.remedy()}"
        )
    return scores


def _weigh(run: Context, unfinished: Unfinished) -> PlaceScores:
    probe, model = run.settings.config.probe, run.settings.model
    domain, general = (
        corpus.sample(probe.sequences, probe.seed) for corpus in (run.corpora.domain_of_probe, run.corpora.general)
    )
    with naming_what_is_not_finite(run, model), run.terminal.progress("weighing places") as bar:
        check = run.progress.stop.checked("probing", bar, run.ranks)
        return weigh_places(
            run.engines,
            model,
            domain,
            general,
            micro_batch_size=probe.micro_batch_size,
            check=check,
            move=bar,
            unfinished=unfinished,
        )
