"""A model that is not what it seems is refused in one line by every command that reads it, before anything heavy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from harness.complaints import assert_one_line, files_under, refused
from harness.fresh_process import run_fresh
from harness.incomplete import holding, with_tensors, without
from harness.launching import adept
from harness.marks import slow
from harness.models import save_tiny_model
from harness.spoiling import changed_json
from harness.workspace import Workspace
from safetensors.torch import load_file, save_file

from adept_ds.base.files import write_json

COMMANDS: dict[str, Sequence[str]] = {
    "probe": ("probe", "{model}", "--corpus", "{ws}/general.jsonl"),
    "eval": ("eval", "{model}", "--text", "{ws}/general.jsonl"),
    "expand": ("expand", "{model}", "{out}", "--layers", "1"),
    "show": ("show", "{ws}/config.yaml", "model={model}"),
    "run": ("run", "{ws}/config.yaml", "model={model}"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("whole") / "model", "qwen3")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture(scope="module")
def ws(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora and the configuration of a run on them."""
    root = tmp_path_factory.mktemp("ws")
    for file in workspace.root.glob("*.jsonl"):
        shutil.copy(file, root)
    Workspace(root).config(root / "config")
    return root


def config(**keys: object) -> Callable[[Path], object]:
    return lambda model: changed_json(model / "config.json", lambda tree: tree.update(keys))


def beside_newer_shards(model: Path) -> None:
    """As a second download leaves them: transformers would read the old file."""
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    write_json(model / "model.safetensors.index.json", index)


def several_without_index(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "model_ema.safetensors")
    (model / "model.safetensors").rename(model / "consolidated.safetensors")


def not_listed(model: Path) -> None:
    names = sorted(load_file(model / "model.safetensors"))[1:]
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    write_json(model / "model.safetensors.index.json", index)


DOWN = "model.layers.2.mlp.down_proj.weight"

BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "an old file beside newer shards": (
        beside_newer_shards,
        ["model.safetensors beside model.safetensors.index.json", "model-00001-of-00001.safetensors", "away"],
    ),
    "several files without an index": (several_without_index, ["consolidated.safetensors", "and 1 more", "neither"]),
    "a tensor that the index does not list": (not_listed, ["holds 'lm_head.weight'", "does not name"]),
    "no head": (lambda model: with_tensors(model, model, without("lm_head.weight")), ["lacks 'lm_head.weight'"]),
    "no down_proj": (lambda model: with_tensors(model, model, without(DOWN)), [f"lacks '{DOWN}'", "random numbers"]),
    "fewer layers than config.json says": (
        config(num_hidden_layers=6, layer_types=None),
        ["lacks 'model.layers.5.", "complete the download"],
    ),
    "more layers than config.json says": (
        config(num_hidden_layers=4, layer_types=None),
        ["holds 'model.layers.4.", "num_hidden_layers=4", "the config.json that belongs"],
    ),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), ["'fp8'", "give the unquantised checkpoint"]),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["'gptq'", "dequantise"]),
    "bnb": (config(quantization_config={"quant_method": "bitsandbytes"}), ["'bitsandbytes'", "dequantise"]),
    "fp8 that config.json hides": (
        lambda model: with_tensors(model, model, holding(DOWN, 20, 37, dtype=torch.float8_e4m3fn)),
        ["quantised", f"'{DOWN}' in F8_E4M3", "dequantise"],
    ),
    "a number as text": (config(vocab_size="600"), ["vocab_size='600'", "whole number above 0"]),
}


def arguments(command: str, model: Path, ws: Path) -> list[str]:
    return [part.format(model=model, ws=ws, out=model.parent / "out") for part in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mistake", BAD_MODELS)
def test_it_is_refused_by_what_is_wrong(mistake: str, command: str, model: Path, ws: Path) -> None:
    change, words = BAD_MODELS[mistake]
    change(model)
    before = files_under(model.parent, ws)
    refused(arguments(command, model, ws), ["model", str(model), *words])
    assert files_under(model.parent, ws) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_it_does_not_wait_for_any_library(command: str, model: Path, ws: Path) -> None:
    several_without_index(model)
    found = run_fresh(*arguments(command, model, ws))
    assert (found.code, found.loaded) == (2, set())


# --- what only transformers and the first pass can say -------------------------------------------------------------


@pytest.mark.parametrize("command", ["probe", "eval", "run"])
def test_what_no_neighbour_shows_is_refused_before_texts_are_read(command: str, model: Path, ws: Path) -> None:
    """Every layer lacks the same norm."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(5):
            tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.zeros(3, 20)

    with_tensors(model, model, spoil)
    texts = shutil.copytree(ws, model.parent / "texts")
    for corpus in texts.glob("*.jsonl"):  # would be complained about next
        corpus.write_text('{"text": "one"}\n{"text": ')
    result = adept(1, *arguments(command, model, texts))
    assert result.returncode == 2
    assert_one_line(result.stderr, ["holds 'model.layers.0.mlp.gate.weight'", "architecture", "config.json"])


RUN = ("run", "{ws}/config.yaml", "model={model}", "run_dir={out}", "expand.k=null", "expand.layers=[1]")


@pytest.mark.parametrize("value", [float("nan"), slow(float("inf"))])
@pytest.mark.parametrize(
    "given",
    [
        *(["probe", "{model}", "--corpus", "{ws}/general.jsonl", "--method", name] for name in ("mask", "fisher")),
        ["eval", "{model}", "--text", "{ws}/general.jsonl"],
        [*RUN, "lr_policy.map=linear"],
        [*RUN, "lr_policy.map=constant", "data.general_eval=[]", "data.domain_eval=[]"],
    ],
    ids=["probe", "probe by gradients", "eval", "importance", "training"],
)
def test_the_first_pass_names_the_tensor_that_is_not_finite(
    given: list[str], value: float, model: Path, ws: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][3, 5] = value

    with_tensors(model, model, spoil)
    result = adept(1, *(part.format(model=model, ws=ws, out=model.parent / "run") for part in given))
    assert result.returncode == 2, result.stderr
    # In the expanded model of a run the layer has moved up by one.
    name = DOWN.replace(".2.", ".3.") if "lr_policy.map=constant" in given else DOWN
    assert_one_line(result.stderr, [f"holds NaN or infinity in '{name}'", "give a model whose weights are finite"])
