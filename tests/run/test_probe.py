"""The probe as a stage: what is kept, what makes it probe again, what it is compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.launching import adept
from harness.models import save_tiny_model
from harness.probe_worker import open_run, probe_config, small_workspace
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.config.schema import Config
from adept_ds.models.directory import ModelDirectory
from adept_ds.probing.estimators import ESTIMATORS, Estimator, name_of
from adept_ds.probing.model_size import model_size
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.selection import select_layers
from adept_ds.probing.stability import Agreement
from adept_ds.run.probe import probe_stage


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return small_workspace(tmp_path_factory.mktemp("probing"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """The model and method of every probe that really passes a model."""
    seen: list[tuple[Path, str]] = []
    real = Estimator.score

    def counting(estimator: Estimator, probe: Any, progress: Any, work: Any) -> LayerScores:
        seen.append((probe.model.path, name_of(estimator)))
        return real(estimator, probe, progress, work)

    monkeypatch.setattr(Estimator, "score", counting)
    return seen


def with_expansion(config: Config, **expand: Any) -> Config:
    return config.model_copy(update={"expand": type(config.expand)(**expand)})


def test_another_k_chooses_again_without_probing_again(
    workspace: Workspace, tmp_path: Path, passes: list[tuple[Path, str]]
) -> None:
    config = probe_config(workspace, tmp_path / "run", method="taylor", stability=None)
    first = probe_stage(open_run(config))
    second = probe_stage(open_run(with_expansion(config, k=3)))
    assert len(passes) == 1
    assert (len(first.selected), len(second.selected)) == (2, 3)
    assert first.layers == second.layers, "standard errors included, to the last bit"
    assert first.stability is None
    halves = probe_stage(open_run(probe_config(workspace, tmp_path / "run", method="taylor")))
    assert len(passes) == 1, "halves come out of the same scores"
    assert halves.stability is not None and halves.stability.against == "halves"


def test_the_command_compares_all_methods_and_prints_json_and_nothing_else(
    workspace: Workspace, tmp_path: Path
) -> None:
    config = workspace.config(tmp_path / "run", probe={"corpus": [str(workspace.root / "general.jsonl")]})
    result = adept(1, "probe", config, "--method", "all", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["methods"].keys() == set(ESTIMATORS)
    assert found["selected"] == found["methods"]["mask"]["selected"]
    assert '<section id="methods"' in (tmp_path / "run" / "report.html").read_text()
    bad = adept(1, "probe", config, "--method", "magic")
    assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
    assert "probe.method: 'magic'" in bad.stderr


def test_a_rule_decides_by_the_scores_of_the_probe_and_its_file_says_why(
    workspace: Workspace, tmp_path: Path, passes: list[tuple[Path, str]]
) -> None:
    config = probe_config(workspace, tmp_path / "run", method="taylor", stability=None)
    for section in ({"k": "auto"}, {"k": "auto", "rule": "threshold", "threshold": 0.9}, {"k": 1, "choose": "highest"}):
        result = probe_stage(open_run(with_expansion(config, **section)))
        expected = select_layers(
            ExpandSection(**section), result.deltas, model_size(ModelDirectory.read(workspace.model)), 0
        )
        assert result.selected == expected.layers
        record = read_json(tmp_path / "run" / "layer_importance.json")
        assert record["selected"] == list(expected.layers)
        assert record["selection"]["reason"] == expected.reason
        assert record["selection"]["rules"] == expected.rules
    assert len(passes) == 1


@pytest.mark.parametrize("change", ["weight", "template", "method", "sequences"])
def test_what_the_scores_depend_on_makes_a_new_probe(
    workspace: Workspace, tmp_path: Path, passes: list[tuple[Path, str]], change: str
) -> None:
    config = probe_config(workspace, tmp_path / "run", method="taylor", stability=None)
    probe_stage(open_run(config))
    if change == "template":
        data = config.data.model_copy(update={"question_template": "{{ question }}"})
        config = config.model_copy(update={"data": data})
    else:
        corpus = [*config.probe.corpus[:1], {"files": [str(workspace.root / "domain.jsonl")], "weight": 0.5}]
        changes: dict[str, dict[str, Any]] = {
            "weight": {"corpus": corpus},
            "method": {"method": "mask"},
            "sequences": {"sequences": 6},
        }
        options = {"method": "taylor", "stability": None} | changes[change]
        config = probe_config(workspace, tmp_path / "run", **options)
    probe_stage(open_run(config))
    assert len(passes) == 2


def test_another_corpus_and_another_model_are_compared_with(
    workspace: Workspace, tmp_path: Path, passes: list[tuple[Path, str]]
) -> None:
    """With the same corpus, or a copy of the model, everything agrees; a model with other weights agrees less."""
    same = tmp_path / "same_model"
    shutil.copytree(workspace.model, same)
    different = save_tiny_model(tmp_path / "different", initializer_range=0.3)
    plain: dict[str, Any] = {"corpus": [str(workspace.root / "general.jsonl")], "method": "taylor"}
    found: dict[str, Agreement] = {}
    for name, stability in {
        "corpus": {"corpus": plain["corpus"]},
        "same": {"model": str(same)},
        "different": {"model": str(different)},
    }.items():
        result = probe_stage(open_run(probe_config(workspace, tmp_path / "run", **plain, stability=stability)))
        assert result.stability is not None
        found[name] = result.stability
        assert result.stability.selected[0] == result.selected
    assert [model for model, _ in passes] == [workspace.model, workspace.model, same, different]
    assert (found["corpus"].against, found["corpus"].name) == ("corpus", "general")
    assert (found["same"].against, found["same"].name) == ("model", str(same))
    for name in ("corpus", "same"):
        assert (found[name].jaccard, found[name].kendall_tau) == (1.0, pytest.approx(1.0))
    tau = found["different"].kendall_tau
    assert tau is not None and tau < 1
    probe_stage(open_run(probe_config(workspace, tmp_path / "run", **plain, stability={"model": str(different)})))
    assert len(passes) == 4, "kept like the first probe"


@pytest.mark.parametrize("method", ["mask", "gradient"])
def test_halves_that_would_be_empty_are_refused_before_any_pass(
    workspace: Workspace, tmp_path: Path, passes: list[tuple[Path, str]], method: str
) -> None:
    config = probe_config(workspace, tmp_path / "run", method=method, sequences=2)
    with pytest.raises(InputError, match=r"^probe\.stability: halves needs two .*raise probe\.sequences"):
        probe_stage(open_run(config))
    assert passes == []
    assert not (tmp_path / "run" / "layer_importance.json").exists()
