"""Stage one: four estimators on real ranks, against their formulas in plain PyTorch.

The ranks do everything in one process group per world size (harness/probe_worker.py), under ZeRO-3 with every parameter
cut. Two sources of different weight, one of which ends in a padded block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import oracle
import pytest
import torch
from harness.launching import ROOT, launch
from harness.marks import slow
from harness.packing import rows
from harness.probe_worker import open_run, probe_config, small_workspace
from harness.workspace import Workspace
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from adept_ds.base.files import read_json
from adept_ds.config.layer_sections import ProbeSection
from adept_ds.data.mixture import Sample
from adept_ds.probing.estimators import ESTIMATORS, Estimator, Passes, Probe, name_of
from adept_ds.probing.passes import PassProgress
from adept_ds.probing.result import LayerImportance
from adept_ds.ranks.unfinished import Work
from adept_ds.run.probe import probe_stage

WORLD_SIZES = [1, 2, slow(3)]
WEIGHTS = (1.0, 2.5)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return small_workspace(tmp_path_factory.mktemp("probing"))


class Roots(dict[int, Path]):
    """The directory of each world size's runs, one per method, made when it is asked for."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        super().__init__()
        self._workspace, self._folder = workspace, folder

    def __missing__(self, world_size: int) -> Path:
        root = self._folder / f"ranks{world_size}"
        root.mkdir()
        result = launch(world_size, ["-m", "harness.probe_worker", str(self._workspace.root), str(root)])
        assert result.returncode == 0, result.stderr
        return self.setdefault(world_size, root)


@pytest.fixture(scope="module")
def roots(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return Roots(workspace, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def sample(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    config = probe_config(workspace, tmp_path_factory.mktemp("sample") / "run")
    return open_run(config).corpora.general.sample(config.probe.sequences, config.probe.seed)


def batches_of(sample: Sample, source: int) -> list[oracle.Batch]:
    return [rows(sample.blocks, [i]) for i, of in zip(sample.indices, sample.sources, strict=True) if of == source]


def mixed(value: Callable[[list[oracle.Batch]], Any], sample: Sample) -> Any:
    """A mean loss, or a derivative of one, over the sources by their weights."""
    parts = [weight * value(batches_of(sample, source)) for source, weight in enumerate(WEIGHTS)]
    return sum(parts) / sum(WEIGHTS)


def bypass_derivatives(model: Any, batches: Sequence[oracle.Batch]) -> np.ndarray:
    """Of the loss by a gate per layer that leads from the layer's output (0) to its input (1), at 0."""
    layers: Any = model.model.layers
    gates = torch.zeros(len(layers), requires_grad=True)
    for layer, gate in zip(layers, gates, strict=True):
        layer.forward = lambda hidden, *args, forward=layer.forward, gate=gate, **kwargs: torch.lerp(
            forward(hidden, *args, **kwargs), hidden, gate
        )
    (derivatives,) = torch.autograd.grad(oracle.mean_loss(model, batches), gates)
    for layer in layers:
        del layer.forward
    return derivatives.double().numpy()


def gradient_scores(model: Any, batches: Sequence[oracle.Batch], score: Callable[[Any, Any], Any]) -> np.ndarray:
    """[batches, layers] from whole gradients of each global batch's mean token loss."""
    num_layers, rows = len(model.model.layers), []
    parameters = oracle.trainable(model, range(num_layers))
    for batch in batches:
        gradients = torch.autograd.grad(oracle.mean_loss(model, [batch]), list(parameters.values()))
        row = np.zeros(num_layers)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            row[int(name.split(".")[2])] += float(score(parameter.detach().double(), gradient.double()).sum())
        rows.append(row)
    return np.array(rows)


@pytest.fixture(scope="module")
def expected(workspace: Workspace, sample: Sample) -> dict[str, np.ndarray]:
    """The deltas of every method by its formula."""
    model = oracle.load(workspace.model)
    chunks = [sample.indices[start : start + 5] for start in (0, 5, 10)]
    batches = [rows(sample.blocks, chunk) for chunk in chunks]
    mask = mixed(lambda part: np.array(oracle.layer_deltas(model, part)[1]), sample)
    scores = {
        "gradient": gradient_scores(model, batches, lambda weight, grad: (weight * grad).abs()),
        "fisher": gradient_scores(model, batches, lambda weight, grad: grad**2),
    }
    taylor = mixed(lambda part: bypass_derivatives(model, part), sample)
    return {"mask": mask, "taylor": taylor} | {name: rows.mean(0) for name, rows in scores.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("method", list(ESTIMATORS))
def test_every_method_is_its_formula_at_any_number_of_ranks(
    roots: dict[int, Path], expected: dict[str, np.ndarray], method: str, world_size: int
) -> None:
    """float32 against float32: losses of 5.6 to rounding, twice; sums of thousands of products to 1e-5."""
    record = read_json(roots[world_size] / method / "layer_importance.json")
    deltas = [layer["delta"] for layer in record["layers"]]
    assert record["method"] == method
    if method in ("mask", "taylor"):
        assert deltas == pytest.approx(expected[method], abs=4e-6)
        assert [layer["loss"] for layer in record["layers"]] == pytest.approx(record["base_loss"] + np.array(deltas))
    else:
        assert deltas == pytest.approx(expected[method], rel=1e-5)
        assert {layer["loss"] for layer in record["layers"]} == {None}
    assert np.ptp(deltas) > 1e-2, "the layers must differ for this to mean anything"


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("method", list(ESTIMATORS))
def test_everything_else_in_the_result_is_the_same_at_any_number_of_ranks(
    roots: dict[int, Path], workspace: Workspace, sample: Sample, method: str, world_size: int
) -> None:
    base = mixed(lambda part: float(oracle.mean_loss(oracle.load(workspace.model), part).detach()), sample)
    single = read_json(roots[1] / method / "layer_importance.json")
    assert single["base_loss"] == pytest.approx(base, abs=2e-6)
    assert single["tokens"] == sum(sample.tokens())
    assert [(source["name"], source["weight"]) for source in single["sources"]] == [("general", 1.0), ("second", 2.5)]
    assert sum(source["sequences"] for source in single["sources"]) == single["sequences"] == 12
    other = read_json(roots[world_size] / method / "layer_importance.json")
    for key in ("tokens", "sequences", "sources", "selected", "selection"):
        assert other[key] == single[key], key
    assert other["stability"]["selected"] == single["stability"]["selected"]
    errors = [[layer["standard_error"] for layer in record["layers"]] for record in (single, other)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4, abs=1e-6)  # float32 passes, spreads of 1e-2


def test_scores_are_kept_by_sequence_and_add_up_to_the_deltas(roots: dict[int, Path], sample: Sample) -> None:
    """Two ranks: each sequence's row stands at its place, whoever computed it."""
    for method in ("mask", "taylor"):
        files = [load_file(roots[world_size] / method / "layer_scores.safetensors") for world_size in (1, 2)]
        for name in ("losses", "tokens", "sources", "weights", "scores"):
            np.testing.assert_allclose(files[1][name], files[0][name], rtol=0, atol=2e-4, err_msg=name)  # sums of 130
        assert files[1]["tokens"].tolist() == sample.tokens()
        assert files[1]["sources"].tolist() == list(sample.sources)
        assert np.ptp(files[1]["losses"]) > 1


def test_the_sample_holds_a_padded_block(sample: Sample) -> None:
    """Otherwise the tests above would not see a mean that is weighted wrongly."""
    assert len(set(sample.tokens())) == 2
    assert sorted(set(sample.sources)) == [0, 1]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_report_progress_in_step(roots: dict[int, Path], world_size: int) -> None:
    """Stopping communicates: a rank that asked more often than another would wait for ever."""
    counts = read_json(roots[world_size] / "progress.json")
    per_rank = {1: 6, 2: 3, 3: 2}[world_size]  # twelve sequences in twos
    assert counts["mask"] == counts["taylor"] == [per_rank] * world_size
    assert counts["gradient"] == counts["fisher"] == [3] * world_size


def test_methods_are_compared_on_the_same_text(roots: dict[int, Path], expected: dict[str, np.ndarray]) -> None:
    record = read_json(roots[2] / "mask" / "layer_methods.json")
    assert list(record["methods"]) == list(ESTIMATORS)
    for method, found in record["methods"].items():
        assert found["deltas"] == pytest.approx(expected[method], rel=1e-5, abs=4e-6)
        assert found["seconds"] > 0
        assert len(found["selected"]) == 2
        if method != "mask":
            correlation = spearmanr(expected["mask"], expected[method]).statistic
            assert record["spearman"][method] == pytest.approx(correlation)


def test_mask_and_taylor_gather_each_layer_as_a_whole_and_no_oftener_than_it_is_needed(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Mask: once, though the stack of variants passes a layer in up to three chunks. Taylor: once more for the backward
    pass, as the norm and the tied head; the embedding has none. One batch on each of two ranks: DeepSpeed has not seen
    another, and gathers nothing ahead.
    """
    output = tmp_path / "found.pt"
    result = launch(2, ["-m", "harness.gathering_worker", str(workspace.root), str(output), "mask", "taylor"])
    assert result.returncode == 0, result.stderr
    found = torch.load(output)
    model = oracle.load(workspace.model)
    layer, embedding, norm = (
        sum(8 * -(-parameter.numel() // 2) for parameter in module.parameters())  # float32, cut in two with padding
        for module in (model.model.layers[0], model.model.embed_tokens, model.model.norm)
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert found["mask"] == [embedding, *[layer] * 5, norm, embedding]
    assert found["taylor"] == [*found["mask"], embedding, norm, *[layer] * 5]


# --- the table of estimators ---------------------------------------------------------------------------------------


def test_the_configuration_allows_the_estimators_of_the_table_and_no_other() -> None:
    assert get_args(ProbeSection.model_fields["method"].annotation) == tuple(ESTIMATORS)
    assert [name_of(estimator) for estimator in ESTIMATORS.values()] == list(ESTIMATORS)
    for name, estimator in ESTIMATORS.items():
        assert estimator.measures, name
        assert ProbeSection.model_fields.keys() >= set(estimator.depends_on), name


class Numbered(Estimator):
    """Says that the higher of two neighbours is needed less."""

    measures = "half of the layer's number, from the top"
    in_nats = False
    depends_on = ("max_stack_tokens",)

    def __init__(self) -> None:
        self.times = 0

    def passes(self, probe: Probe, progress: PassProgress, work: Work) -> Passes:
        self.times += len([*work.steps(1, progress.batch)])
        tokens = torch.tensor(probe.sample.tokens(), dtype=torch.float64)
        halves = torch.arange(probe.model.num_layers, 0, -1, dtype=torch.float64) / 2
        return 3 * tokens, torch.outer(tokens, halves)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_an_estimator_that_is_added_to_the_table_is_probed_with_kept_and_chosen_by(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = Numbered()
    monkeypatch.setitem(ESTIMATORS, "numbered", added)

    def probed(**keys: Any) -> LayerImportance:
        config = probe_config(workspace, tmp_path / "run", **keys)
        # As if the schema allowed it too.
        section = config.probe.model_copy(update={"method": "numbered"})
        return probe_stage(open_run(config.model_copy(update={"probe": section})))

    result = probed()
    assert result.method == "numbered"
    assert result.measures == added.measures
    assert result.deltas == pytest.approx([2.5, 2.0, 1.5, 1.0, 0.5])
    assert result.selected == (3, 4)
    assert result.base_loss == pytest.approx(3)
    assert {layer.loss for layer in result.layers} == {None}, "in_nats"
    assert [layer.standard_error for layer in result.layers] == pytest.approx([0] * 5, abs=1e-12)
    assert result.stability is not None and result.stability.jaccard == 1
    assert LayerImportance.load(tmp_path / "run" / "layer_importance.json") == result
    probed(batch_sequences=4)
    assert added.times == 1, "its scores do not depend on this key"
    probed(max_stack_tokens=999)
    assert added.times == 2


def test_documentation_names_every_method_and_key() -> None:
    text = (ROOT / "docs" / "probing.md").read_text()
    for word in (*ESTIMATORS, "batch_sequences", "question_template", "stability", "layer_scores.safetensors"):
        assert word in text
