"""Stage one: four estimators on real ranks, against their formulas in plain PyTorch; corpora, errors, stability.

The ranks do everything in one process group per world size (tests/probe_worker.py), under ZeRO-3 with every parameter
cut. Two sources of different weight, one of which ends in a padded block.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import FAMILY_OPTIONS, ROOT, Workspace, adept, launch, save_tiny_model, write_corpus
from probe_worker import open_run, probe_config
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from torch.utils._python_dispatch import TorchDispatchMode

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.config.schema import Config, ExpandSection
from adept_ds.data.mixture import Mixture, Sample, share_out
from adept_ds.models import head_loss as loss_module
from adept_ds.models.directory import family_of
from adept_ds.models.loading import load_causal_lm
from adept_ds.probing.estimators import METHODS, _tapped, install_taps
from adept_ds.probing.model_size import model_size
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.selection import select_layers
from adept_ds.probing.stability import compare, rank_correlations
from adept_ds.probing.sweep import PassProgress, bypass_losses, install_layer_sweep
from adept_ds.run import stages
from adept_ds.run.stages import probe_stage

WORLD_SIZES = [1, 2, 3]
WEIGHTS = (1.0, 2.5)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("probing")
    save_tiny_model(root / "model")
    write_corpus(root / "general.jsonl", 0)
    write_corpus(root / "domain.jsonl", 1, documents=3)
    return Workspace(root)


@pytest.fixture(scope="module")
def roots(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directory of each world size's runs, one per method."""
    found = {}
    for world_size in WORLD_SIZES:
        found[world_size] = tmp_path_factory.mktemp(f"ranks{world_size}")
        result = launch(world_size, ["tests/probe_worker.py", str(workspace.root), str(found[world_size])])
        assert result.returncode == 0, result.stderr
    return found


@pytest.fixture(scope="module")
def sample(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    config = probe_config(workspace, tmp_path_factory.mktemp("sample") / "run")
    return open_run(config).probe_corpus.sample(config.probe.sequences, config.train.seed)


def batches_of(sample: Sample, source: int) -> list[oracle.Batch]:
    return [sample.blocks.batch([i]) for i, of in zip(sample.indices, sample.sources, strict=True) if of == source]


def mixed(value: Callable[[list[oracle.Batch]], Any], sample: Sample) -> Any:
    """A mean loss, or a derivative of one, over the sources by their weights."""
    parts = [weight * value(batches_of(sample, source)) for source, weight in enumerate(WEIGHTS)]
    return sum(parts) / sum(WEIGHTS)


def bypass_derivatives(model: Any, batches: Sequence[oracle.Batch]) -> np.ndarray:
    """Of the loss by a gate per layer that leads from the layer's output (0) to its input (1), at 0."""
    layers = model.model.layers
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
    batches = [sample.blocks.batch(chunk) for chunk in chunks]
    mask = mixed(lambda part: np.array(oracle.layer_deltas(model, part)[1]), sample)
    scores = {
        "gradient": gradient_scores(model, batches, lambda weight, grad: (weight * grad).abs()),
        "fisher": gradient_scores(model, batches, lambda weight, grad: grad**2),
    }
    taylor = mixed(lambda part: bypass_derivatives(model, part), sample)
    return {"mask": mask, "taylor": taylor} | {name: rows.mean(0) for name, rows in scores.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
def test_everything_else_in_the_result_is_the_same_at_any_number_of_ranks(
    roots: dict[int, Path], workspace: Workspace, sample: Sample, method: str
) -> None:
    base = mixed(lambda part: float(oracle.mean_loss(oracle.load(workspace.model), part).detach()), sample)
    single = read_json(roots[1] / method / "layer_importance.json")
    assert single["base_loss"] == pytest.approx(base, abs=2e-6)
    assert single["tokens"] == sum(sample.tokens())
    assert [(source["name"], source["weight"]) for source in single["sources"]] == [("general", 1.0), ("second", 2.5)]
    assert sum(source["sequences"] for source in single["sources"]) == single["sequences"] == 12
    for world_size in WORLD_SIZES[1:]:
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
    assert list(record["methods"]) == list(METHODS)
    for method, found in record["methods"].items():
        assert found["deltas"] == pytest.approx(expected[method], rel=1e-5, abs=4e-6)
        assert found["seconds"] > 0
        assert len(found["selected"]) == 2
        if method != "mask":
            correlation = spearmanr(expected["mask"], expected[method]).statistic
            assert record["spearman"][method] == pytest.approx(correlation)


# --- estimators in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS))
def test_taylor_is_the_inner_product_of_gradient_and_change_in_every_family(tmp_path: Path, model_type: str) -> None:
    """Against the gradients that autograd keeps for Hugging Face's own forward and loss."""
    from transformers import AutoModelForCausalLM

    directory, products = save_tiny_model(tmp_path / "model", model_type), {}
    input_ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    family = family_of(directory)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, inputs: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        after.retain_grad()
        passed.append((inputs[0], after))

    for layer in family.layer_modules(plain):
        layer.register_forward_hook(keep)
    loss = plain(input_ids=input_ids, use_cache=False).logits[:, :-1].float().transpose(1, 2)
    torch.nn.functional.cross_entropy(loss, input_ids[:, 1:], reduction="sum").backward()
    wanted = [-(after.grad * (after - before)).sum((1, 2)) for before, after in passed]

    model = load_causal_lm(directory, torch.float32).eval()
    install_taps(model, family, products)
    model(input_ids, input_ids).sum().backward()
    assert sorted(products) == list(range(5))
    for position, want in enumerate(wanted):
        # float32 sums of 240 products in another order, of losses of about 60 nats a row
        torch.testing.assert_close(products[position].float(), want.detach(), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_returns_a_tuple_is_tapped_at_its_first_entry() -> None:
    products: dict[int, torch.Tensor] = {}
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    after, weights = _tapped(lambda h: (h * 1.5, "attention"), products, 7, hidden)
    (after * torch.tensor([1.0, 2.0]).view(2, 1, 1)).sum().backward()
    assert weights == "attention"
    # dL/dh_out is 1 and 2, h_out - h_in is h / 2
    expected = -torch.tensor([0.5, 1.0]) * hidden.detach().sum((1, 2))
    torch.testing.assert_close(products[7], expected.double(), rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_the_whole_stack_are_never_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 150,000 would need 2.8 GB for six variants of one block of 768 tokens; here a small likeness."""
    directory, vocabulary = save_tiny_model(tmp_path / "model", "qwen3", vocab_size=5000), 5000
    family, tokens, chunk = family_of(directory), 24, 5 * 5000
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk)
    model = load_causal_lm(directory, torch.float32).eval()
    install_layer_sweep(model, family, 60)
    input_ids = torch.randint(0, 250, (1, tokens))
    with torch.no_grad(), LargestTensor() as largest:
        assert model(input_ids, input_ids).shape == (6,)
    assert chunk <= largest.elements < 6 * tokens * vocabulary / 10
    assert largest.elements == chunk


def test_the_sweep_moves_its_bar_layer_by_layer(workspace: Workspace, sample: Sample) -> None:
    """Only the beginning of a batch may communicate; shares rise, with the work of a layer: one variant more each."""
    checks: list[tuple[float, str]] = []
    moves: list[tuple[float, str]] = []
    progress = PassProgress(5, lambda *report: checks.append(report), lambda *report: moves.append(report))
    model = load_causal_lm(workspace.model, torch.float32).eval()
    install_layer_sweep(model, family_of(workspace.model), 8192, progress.layer)
    two = dataclasses.replace(sample, indices=sample.indices[:2], sources=(0, 0))
    bypass_losses(model, 5, two, batch_size=1, device="cpu", progress=progress)
    assert checks == [(0.0, "block 1 of 2"), (0.5, "block 2 of 2")]
    assert [text for _, text in moves] == [
        f"block {block} of 2, layer {layer} of 5" for block, layer in itertools.product((1, 2), range(1, 6))
    ]
    shares = [share for share, _ in moves]
    assert shares[:5] == pytest.approx([done / 30 for done in (1, 3, 6, 10, 15)])
    assert shares[5:] == pytest.approx([0.5 + share for share in shares[:5]])


# --- the corpus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "weights", "available", "expected"),
    [
        pytest.param(32, [1], [100], [32], id="one source"),
        pytest.param(32, [1], [7], [7], id="less than asked for"),
        pytest.param(32, [2, 1], [100, 100], [21, 11], id="21.33 and 10.67"),
        pytest.param(10, [1, 1, 1], [9, 9, 9], [4, 3, 3], id="a tie goes to the first"),
        pytest.param(8, [100, 1, 1], [50, 50, 50], [6, 1, 1], id="at least one each"),
        pytest.param(12, [1, 1, 1], [2, 50, 50], [2, 5, 5], id="one has too little, the others share the rest"),
        pytest.param(7, [3, 2, 2], [9, 1, 9], [4, 1, 2], id="the rest in proportion"),
    ],
)
def test_sequences_are_shared_out_by_weight(
    count: int, weights: list[float], available: list[int], expected: list[int]
) -> None:
    assert share_out(count, weights, available) == expected


def fake_blocks(count: int, first: int) -> Any:
    from datasets import Dataset

    from adept_ds.data.blocks import Blocks

    return Blocks(Dataset.from_dict({"input_ids": [[first + i, 1, 2] for i in range(count)]}), 3)


def test_any_stretch_of_a_sample_is_mixed_like_the_whole() -> None:
    """So is a batch, in stage one and stage two: of weights 1, 3 and 2, every six in a row hold 1, 3 and 2, +- 1."""
    mixture = Mixture.of([fake_blocks(n, 100 * i) for i, n in enumerate((40, 90, 60))], (1, 3, 2), ("a", "b", "c"))
    found = mixture.sample(48, seed=0)
    assert [found.sources.count(source) for source in range(3)] == [8, 24, 16]
    for start in range(43):
        window = found.sources[start : start + 6]
        assert all(abs(window.count(source) - share) <= 1 for source, share in enumerate((1, 3, 2)))
    tokens = found.batch(range(48))[0][:, 0].tolist()
    assert [token // 100 for token in tokens] == list(found.sources), "indices point into their own source"
    assert len(set(tokens)) == 48


def test_one_source_is_sampled_as_any_other_corpus() -> None:
    from adept_ds.data.order import block_order

    mixture = Mixture.of([fake_blocks(50, 0)])
    assert list(mixture.sample(12, seed=4).indices) == block_order(50, 4)[:12]


# --- standard errors ------------------------------------------------------------------------------------------------


def made_up(method: str, counts: Sequence[int], weights: Sequence[float], seed: int = 0) -> LayerScores:
    """Sequences of unequal length whose scores scatter about three layers' means, differently in each source."""
    generator = np.random.default_rng(seed)
    sources = np.repeat(np.arange(len(counts)), counts)
    tokens = generator.integers(20, 40, len(sources)).astype(float)
    means = np.array([0.1, 0.5, 2.0]) + 0.3 * sources[:, None]
    noise = generator.normal(size=(len(sources), 3)) * np.array([0.2, 0.05, 1.0])
    return LayerScores(method, 1.0, tokens * 3, tokens, sources, np.array(weights), tokens[:, None] * (means + noise))


def test_bootstrap_errors_are_those_of_a_stratified_ratio_estimator() -> None:
    """Analytic: var = sum_s (w_s / W)^2 N / (N - 1) sum_n (d_n - delta_s t_n)^2 / T_s^2 (Cochran, chapter 6).

    The spread of 1000 replicates is itself uncertain by 1 / sqrt(2000) = 2.2 %; four times that is allowed for. With
    N = 9 in one source, drawing N instead of N - 1 would be off by 6 %, and more where both sources are small.
    """
    scores = made_up("mask", (9, 30), (2.0, 1.0))
    variance = np.zeros(3)
    for source, weight in enumerate(scores.weights):
        rows = scores.sources == source
        values, tokens = scores.scores[rows], scores.tokens[rows]
        residuals = values - values.sum(0) / tokens.sum() * tokens[:, None]
        count = len(tokens)
        variance += (weight / 3) ** 2 * count / (count - 1) * (residuals**2).sum(0) / tokens.sum() ** 2
    replicates = scores.replicates(0)
    assert replicates is not None and replicates.shape == (1000, 3)
    np.testing.assert_allclose(replicates.std(axis=0, ddof=1), np.sqrt(variance), rtol=0.09)
    # centred on the deltas: the mean of 1000 replicates is uncertain by a thirtieth of their spread
    assert (np.abs(replicates.mean(0) - scores.deltas) < 4 / 30 * np.sqrt(variance)).all()


def test_bootstrap_errors_of_gradient_scores_are_those_of_a_mean_over_batches() -> None:
    """s / sqrt(N), by definition; the tolerance as above. Four batches: N - 1 of N matters by 15 %."""
    scores = dataclasses.replace(made_up("fisher", (32,), (1.0,)), scores=made_up("fisher", (4,), (1.0,)).scores)
    replicates = scores.replicates(0)
    assert replicates is not None
    analytic = scores.scores.std(axis=0, ddof=1) / np.sqrt(4)
    np.testing.assert_allclose(replicates.std(axis=0, ddof=1), analytic, rtol=0.09)
    assert scores.deltas == pytest.approx(scores.scores.mean(0))


def test_where_nothing_can_be_drawn_there_is_no_error() -> None:
    assert made_up("mask", (5, 1), (1.0, 1.0)).replicates(0) is None
    one_batch = dataclasses.replace(made_up("gradient", (8,), (1.0,)), scores=np.ones((1, 3)))
    assert one_batch.replicates(0) is None
    assert one_batch.halves() is None
    assert one_batch.deltas == [1, 1, 1]


def test_kept_scores_give_bit_identical_replicates(tmp_path: Path) -> None:
    """Also from arrays that are views of others, which safetensors would write as they lie in memory."""
    scores = made_up("mask", (9, 30), (2.0, 1.0))
    table = np.concatenate([scores.losses[:, None], scores.scores], axis=1)
    strided = dataclasses.replace(scores, losses=table[:, 0], scores=table[:, 1:])
    strided.save(tmp_path / "layer_scores.safetensors")
    loaded = LayerScores.load(tmp_path / "layer_scores.safetensors")
    assert (loaded.method, loaded.seconds, loaded.deltas) == (scores.method, scores.seconds, scores.deltas)
    assert loaded.base_loss == scores.base_loss == pytest.approx(3)
    first, second, other = scores.replicates(5), loaded.replicates(5), loaded.replicates(6)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_halves_take_every_other_sequence_of_each_source() -> None:
    scores = made_up("mask", (5, 2), (1.0, 3.0))
    by_hand = []
    for rows in ([0, 2, 4, 5], [1, 3, 6]):
        parts = []
        for source in (0, 1):
            mine = [row for row in rows if scores.sources[row] == source]
            parts.append(scores.scores[mine].sum(0) / scores.tokens[mine].sum())
        by_hand.append((parts[0] + 3 * parts[1]) / 4)
    halves = scores.halves()
    assert halves is not None
    np.testing.assert_allclose(halves, by_hand, rtol=1e-12)


# --- stability ------------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    """Of six pairs of four layers, five are in the same order: tau = (5 - 1) / 6. One of three layers is shared."""
    found = compare("corpus", "x", ([3, 1], [0, 3]), ([1, 2, 3, 4], [1, 3, 2, 4]))
    assert found.selected == ((1, 3), (0, 3))
    assert found.jaccard == pytest.approx(1 / 3)
    assert found.kendall_tau == pytest.approx(4 / 6)
    assert "Jaccard 0.33, Kendall tau of the deltas 0.67" in found.sentence()
    assert compare("halves", "", ([0], [0]), ([1, 1], [1, 2])).kendall_tau is None, "JSON has no NaN"
    assert rank_correlations({"mask": {"deltas": [1, 2, 3]}, "taylor": {"deltas": [9, 5, 1]}}) == {"taylor": -1}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """The model and method of every probe that really passes a model."""
    seen: list[tuple[Path, str]] = []
    real = stages.score_layers

    def counting(probe: Any, method: str, progress: Any) -> LayerScores:
        seen.append((probe.model_dir, method))
        return real(probe, method, progress)

    monkeypatch.setattr(stages, "score_layers", counting)
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
    assert halves.stability is not None and halves.stability["against"] == "halves"


def test_the_command_compares_all_methods_and_prints_json_and_nothing_else(
    workspace: Workspace, tmp_path: Path
) -> None:
    config = workspace.config(tmp_path / "run", probe={"corpus": [str(workspace.root / "general.jsonl")]})
    result = adept(1, "probe", config, "--method", "all", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["methods"].keys() == set(METHODS)
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
        expected = select_layers(ExpandSection(**section), result.deltas, model_size(workspace.model), 0)
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
        different = {"weight": {"corpus": corpus}, "method": {"method": "mask"}, "sequences": {"sequences": 6}}[change]
        options = {"method": "taylor", "stability": None} | different
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
    plain = {"corpus": [str(workspace.root / "general.jsonl")], "method": "taylor"}
    found = {}
    for name, stability in {
        "corpus": {"corpus": plain["corpus"]},
        "same": {"model": str(same)},
        "different": {"model": str(different)},
    }.items():
        result = probe_stage(open_run(probe_config(workspace, tmp_path / "run", **plain, stability=stability)))
        found[name] = result.stability
        assert result.stability is not None
        assert result.stability["selected"][0] == result.selected
    assert [model for model, _ in passes] == [workspace.model, workspace.model, same, different]
    assert (found["corpus"]["against"], found["corpus"]["name"]) == ("corpus", "general")
    assert (found["same"]["against"], found["same"]["name"]) == ("model", str(same))
    for name in ("corpus", "same"):
        assert (found[name]["jaccard"], found[name]["kendall_tau"]) == (1.0, pytest.approx(1.0))
    assert found["different"]["kendall_tau"] < 1
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


def test_result_files_of_older_versions_can_be_read(tmp_path: Path) -> None:
    from adept_ds.probing.result import LayerImportance

    record = {
        "method": "mask",
        "base_loss": 2.0,
        "tokens": 10,
        "layers": [{"index": 0, "loss": 2.5, "delta": 0.5}],
        "selected": [0],
        "a key of a later version": 1,
    }
    (tmp_path / "l.json").write_text(json.dumps(record))
    result = LayerImportance.load(tmp_path / "l.json")
    assert (result.deltas, result.selected, result.stability) == ([0.5], (0,), None)
    assert result.layers[0].standard_error is None


def test_documentation_names_every_method_and_key() -> None:
    text = (ROOT / "docs" / "probing.md").read_text()
    for word in (*METHODS, "gradient_batch_sequences", "question_template", "stability", "layer_scores.safetensors"):
        assert word in text
