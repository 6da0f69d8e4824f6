"""Places by gain as a stage: what is kept, what makes it weigh again, what follows from it; and broken ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.inprocess import run_here
from harness.launching import adept
from harness.marks import slow
from harness.places_worker import places_config, places_workspace
from harness.probe_worker import open_run, probe_config
from harness.workspace import Workspace, write_corpus

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.config.schema import Config
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.flops import planned_step_flops
from adept_ds.probing.estimators import Estimator
from adept_ds.probing.model_size import model_size
from adept_ds.probing.places import PlaceScores, choose_places
from adept_ds.probing.scores import LayerScores
from adept_ds.run import places
from adept_ds.run.expand import expand_stage
from adept_ds.run.places import _read, places_stage
from adept_ds.run.prerequisites import check_ready
from adept_ds.run.probe import probe_stage


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = places_workspace(tmp_path_factory.mktemp("places"), ("llama",))
    for name in ("general_heldout", "domain_heldout"):
        write_corpus(workspace.root / f"{name}.jsonl", 7, documents=10)
    return workspace


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The model of every pass over both texts."""
    seen: list[Path] = []
    real = places.weigh_places

    def counting(engines: Any, model_dir: ModelDirectory, *texts: Any, **options: Any) -> PlaceScores:
        seen.append(model_dir.path)
        return real(engines, model_dir, *texts, **options)

    monkeypatch.setattr(places, "weigh_places", counting)
    return seen


def test_another_choice_follows_without_weighing_again(
    workspace: Workspace, tmp_path: Path, weighed: list[Path]
) -> None:
    first = places_stage(open_run(places_config(workspace, tmp_path / "run")))
    scores = PlaceScores.load(tmp_path / "run" / "place_scores.json")
    assert len(first.selected) == 2 and len(first.places) == 5
    for section in ({"k": 3}, {"harm_weight": 0.0}, {"min_distance": 3}):
        config = places_config(workspace, tmp_path / "run", **section)
        found = places_stage(open_run(config))
        assert found == choose_places(config.expand, scores)
        assert read_json(tmp_path / "run" / "place_benefits.json")["selected"] == list(found.selected)
    assert weighed == [workspace.root / "llama"]


@pytest.mark.parametrize("change", ["domain", slow("general"), slow("sequences")])
def test_what_gains_depend_on_makes_them_be_weighed_again(
    workspace: Workspace, tmp_path: Path, weighed: list[Path], change: str
) -> None:
    config = places_config(workspace, tmp_path / "run")
    places_stage(open_run(config))
    other = write_corpus(tmp_path / "other.jsonl", 9)
    data, probe = config.data, config.probe
    if change == "domain":
        data = data.model_copy(update={"domain": [other]})
    else:
        probe = probe.model_copy(update={"corpus": [other]} if change == "general" else {"sequences": 5})
    places_stage(open_run(config.model_copy(update={"data": data, "probe": probe})))
    assert len(weighed) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gains": [1.0, 2.0], "harms": [1.0, 2.0]}, "2 gains of 5 layers"),
        slow({"gains": [1.0]}, "1 gains and 5 harms"),
        slow({"seconds": "long"}, "seconds"),
    ],
    ids=str,
)
def test_a_damaged_file_is_named_and_made_again(
    workspace: Workspace, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config, file = places_config(workspace, tmp_path / "run"), tmp_path / "run" / "place_scores.json"
    places_stage(open_run(config))
    whole = read_json(file)
    file.write_text(json.dumps(whole | change))
    with pytest.raises(InputError, match=rf"place_scores\.json' is damaged \(.*{words}.*move it away, and places are"):
        _read(open_run(config))
    places_stage(open_run(config))
    assert read_json(file) | {"seconds": 0} == whole | {"seconds": 0}


def test_copies_stand_where_their_gains_put_them(workspace: Workspace, tmp_path: Path) -> None:
    config = places_config(workspace, tmp_path / "run")
    with pytest.raises(InputError, match=r"place_benefits\.json' does not exist; run `adept probe CONFIG` first"):
        check_ready(config, "expand")
    selected = places_stage(open_run(config)).selected
    assert expand_stage(open_run(config)).source_indices == list(selected)


def test_the_command_weighs_and_shows_and_draws(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(
        tmp_path / "run", model=str(workspace.root / "llama"), expand={"k": 2, "choose": "gain", "min_distance": 2}
    )
    result = adept(1, "probe", config, "--json", "--out", tmp_path / "found.json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == read_json(tmp_path / "run" / "place_benefits.json") == read_json(tmp_path / "found.json")
    assert not (tmp_path / "run" / "layer_importance.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page.split('<section id="places"')[1].split("</section>")[0]
    again = adept(1, "probe", config, "--out", tmp_path / "found.json")
    assert again.returncode == 0, again.stderr
    assert "unchanged, not run again" in again.stderr + again.stdout
    assert "harm (general)" in again.stdout
    bad = run_here(["probe", str(config), "--method", "all"], tmp_path)
    assert (bad.code, len(bad.err.splitlines())) == (2, 1)
    assert "--method: all is about deltas" in bad.err
    plan = " ".join(run_here(["show", str(config)], tmp_path).out.split())
    assert "weigh places on 7 sequences of 24 tokens of data.domain and of probe.corpus" in plan
    assert "choose 2 by gain - 1 x harm, 2 layers apart" in plan
    other = workspace.config(tmp_path / "other", model=str(workspace.root / "llama"), expand={"tie_break": "cost"})
    plan = " ".join(run_here(["show", str(other)], tmp_path).out.split())
    assert "choose 2 layers, of those within noise the cheapest" in plan


def test_a_whole_run_trains_copies_at_these_places(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(
        tmp_path / "run",
        model=str(workspace.root / "llama"),
        expand={"k": 2, "choose": "gain"},
        train={"steps": 2, "eval_every": 2, "checkpoint_every": 2},
    )
    result = adept(1, "run", config)
    assert result.returncode == 0, result.stderr[-3000:]
    run_dir = tmp_path / "run"
    selected = read_json(run_dir / "place_benefits.json")["selected"]
    assert [copy["source"] for copy in read_json(run_dir / "expanded" / "expansion.json")["copies"]] == selected
    assert not (run_dir / "layer_importance.json").exists()
    again = adept(1, "run", run_dir / "config.yaml")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "finished before, not run again" in again.stdout + again.stderr


def with_tie_break(config: Config) -> Config:
    return config.model_copy(update={"expand": type(config.expand)(k=2, tie_break="cost")})


def test_the_probe_plans_what_a_broken_tie_saves(workspace: Workspace, tmp_path: Path) -> None:
    config = probe_config(workspace_of(workspace), tmp_path / "run", method="taylor", stability="halves")
    plain = probe_stage(open_run(config))
    found = probe_stage(open_run(with_tie_break(config)))
    assert found.selection is not None and found.selection.tie_break is not None
    tie = found.selection.tie_break
    assert tie.lowest == plain.selected
    size = model_size(ModelDirectory.read(workspace.root / "llama"))
    for layers, planned in ((found.selected, tie.flops), (plain.selected, tie.flops_of_lowest)):
        flops = planned_step_flops(size.layer_passed, layers, size.attention_width, size.head_passed, 32)
        assert planned == flops.total
    assert tie.flops is not None and tie.flops_of_lowest is not None and tie.flops <= tie.flops_of_lowest
    assert min(found.selected) >= min(plain.selected)
    assert found.stability == plain.stability, "choices are compared before ties are broken"
    replicates = LayerScores.load(tmp_path / "run" / "layer_scores.safetensors").replicates(config.probe.seed)
    assert replicates is not None
    last = max(plain.selected, key=lambda layer: plain.deltas[layer])
    shares = (replicates > replicates[:, [last]]).mean(0)
    assert set(tie.tied) == {last} | {layer for layer, share in enumerate(shares) if 0.05 < share < 0.95}


def test_a_tie_needs_two_sequences_of_every_source_before_any_pass(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimator, "score", lambda *_: pytest.fail("passed a model"))
    config = probe_config(workspace_of(workspace), tmp_path / "run", method="mask", sequences=2, stability=None)
    with pytest.raises(InputError, match=r"^expand\.tie_break: cost needs two sequences of every source"):
        probe_stage(open_run(with_tie_break(config)))


def workspace_of(workspace: Workspace) -> Workspace:
    """Under the names that `probe_config` knows."""
    model = workspace.root / "model"
    if not model.exists():
        model.symlink_to(workspace.root / "llama")
    return workspace
