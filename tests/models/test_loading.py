"""A model is loaded as its files say, whole, or refused by the tensor: nothing is made up, and nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.expanding import load, random_tokens
from harness.incomplete import Change, holding, save_tensors, with_tensors, without
from harness.models import FAMILY_OPTIONS, save_tiny_model
from harness.spoiling import changed_json
from safetensors.torch import load_file

from adept_ds.base.errors import InputError
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import check_architecture, load_causal_lm


@pytest.fixture(scope="module", params=sorted(FAMILY_OPTIONS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


def refuse(path: Path, *words: str) -> None:
    """By the check alone, and by what loads: in one line."""
    for work in (check_architecture, lambda model: load_causal_lm(model, torch.float32)):
        with pytest.raises(InputError) as refusal:
            work(ModelDirectory.read(path))
        message = str(refusal.value)
        assert "\n" not in message and message.startswith("model: ") and str(path) in message
        for word in words:
            assert word in message, message


# --- every family --------------------------------------------------------------------------------------------------


def test_what_every_family_saves_is_loaded_and_random_numbers_stay_as_they_were(model: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_architecture(ModelDirectory.read(model))
    assert torch.equal(torch.get_rng_state(), before)
    loaded, plain = load_causal_lm(ModelDirectory.read(model), torch.float32), load(model)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), plain.parameters(), strict=True))
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_every_single_tensor_is_missed(model: Path, tmp_path: Path) -> None:
    copy = with_tensors(model, tmp_path / "model", lambda _: None)
    tensors, directory = load_file(model / "model.safetensors"), ModelDirectory.read(copy)
    for name in tensors:
        save_tensors(copy, {other: tensor for other, tensor in tensors.items() if other != name})
        with pytest.raises(InputError, match=f"lacks '{name}'"):
            check_architecture(directory)


# --- what no neighbour shows ---------------------------------------------------------------------------------------


def of_all_layers(change: Callable[[str], Change]) -> Change:
    """In every layer, so that layers are alike."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(5):
            change(f"model.layers.{layer}.mlp.up_proj.weight")(tensors)

    return spoil


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(of_all_layers(without), [f"lacks '{UP}'"], id="missing everywhere"),
        pytest.param(
            of_all_layers(lambda name: holding(name, 36, 20)),
            [f"holds '{UP}' of shape (36, 20), where (37, 20) is needed"],
            id="of another shape everywhere",
        ),
        pytest.param(
            holding("model.norm.weight", 19), ["holds 'model.norm.weight' of shape (19,), where (20,)"], id="a norm"
        ),
        pytest.param(without("lm_head.weight"), ["lacks 'lm_head.weight'"], id="no head"),
        pytest.param(holding("v_head.weight", 1, 20), ["holds 'v_head.weight'", "architecture"], id="another head"),
        pytest.param(
            holding("model.layers.2.mlp.gate.weight", 3, 20),
            ["holds 'model.layers.2.mlp.gate.weight'", "architecture"],
            id="a tensor that nothing reads",
        ),
        pytest.param(
            holding("visual.blocks.0.weight", 3, 3), ["holds 'visual.blocks.0.weight'"], id="another model beside it"
        ),
    ],
)
def test_the_tensor_is_named(qwen3: Path, tmp_path: Path, change: Change, words: list[str]) -> None:
    refuse(with_tensors(qwen3, tmp_path / "model", change), *words)


# --- what is dropped on purpose ------------------------------------------------------------------------------------


def test_rotary_buffers_and_a_tied_head_that_is_stored_twice_change_nothing(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    tokens, tied = random_tokens(2, 20), load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    with torch.no_grad():
        wanted = load(model)(input_ids=tokens).logits
    with_tensors(model, model, lambda tensors: tensors.update({"lm_head.weight": tied.clone()}))
    for layer in (0, 3):
        with_tensors(model, model, holding(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", 5))
    check_architecture(ModelDirectory.resolve("model", str(model)))
    with torch.no_grad():
        found = load(model)(input_ids=tokens).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_base_model_with_a_tied_head_is_loaded(tmp_path: Path, model_type: str) -> None:
    """Its names lack the first component."""
    from transformers import AutoModel

    model = save_tiny_model(tmp_path / "model", model_type)
    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "base")
    assert not any(
        name.startswith(("model.", "transformer.")) for name in load_file(tmp_path / "base/model.safetensors")
    )
    loaded = load_causal_lm(ModelDirectory.resolve("model", str(tmp_path / "base")), torch.float32)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), load(model).parameters(), strict=True))


def test_a_base_model_without_its_head_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = save_tiny_model(tmp_path / "model", "qwen3")
    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "base")
    refuse(tmp_path / "base", "lacks 'lm_head.weight'")


# --- what transformers itself says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "no_such_function"),
        ("rope_parameters", {"rope_type": "no_such_type"}),
        ("rope_parameters", "linear"),
        ("attention_dropout", "none"),
        ("layer_types", ["no_such_kind"] * 5),
        ("num_attention_heads", 7),
        ("head_dim", 3),
        ("hidden_size", 1 << 30),
        ("pad_token_id", 262),
        ("dtype", "no_such_dtype"),
    ],
)
def test_a_configuration_that_transformers_cannot_use_is_one_line(
    qwen3: Path, tmp_path: Path, key: str, value: Any
) -> None:
    copy = with_tensors(qwen3, tmp_path / "model", lambda _: None)
    changed_json(copy / "config.json", lambda tree: tree.update({key: value}))
    refuse(copy)


def test_code_and_pickles_in_a_model_are_never_run(qwen3: Path, tmp_path: Path) -> None:
    copy = with_tensors(qwen3, tmp_path / "model", lambda _: None)
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changed_json(copy / "config.json", lambda tree: tree.update(auto_map=auto_map))
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    load_causal_lm(ModelDirectory.resolve("model", str(copy)), torch.float32)
    assert not (tmp_path / "ran").exists()
