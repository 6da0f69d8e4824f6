"""Models of random weights are whole models of their family, the same for the same seed, however they are written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.domains import all_tensors
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.models import FEW_EXPERTS

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.weights.expansion import expand_checkpoint
from adept_ds.weights.synthetic import Synthetic, write_synthetic
from adept_ds.weights.verification import verify_expansion


def written(folder: Path, family: str = "llama", parameters: int = 200_000, **options: Any) -> Path:
    write_synthetic(Synthetic(family, parameters, **options), folder)
    return folder


@pytest.mark.parametrize("family", MOSTLY_SLOW_FAMILIES)
def test_every_family_loads_generates_and_is_expanded(family: str, tmp_path: Path) -> None:
    """Of experts, matrices of so many bytes that torch's grouped product takes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = written(tmp_path / "model", family, dtype="float32")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Sums of 7 and π\n"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0]) == text
    assert torch.isfinite(model(input_ids=tokens).logits).all()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 0.6 < count / 200_000 < 1.4
    expand_checkpoint(folder, tmp_path / "expanded", [0])
    assert verify_expansion(folder, tmp_path / "expanded", logits=True).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2", "olmo2"])
def test_weights_begin_as_the_familys_own_do(family: str, tmp_path: Path) -> None:
    """Constant where transformers' fresh model of this configuration is, else of its spread (5 standard errors)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = written(tmp_path / "model", family, dtype="float32")
    mine = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    torch.manual_seed(1)
    fresh = dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).named_parameters())
    assert mine.keys() == fresh.keys()
    kinds = set()
    for name, parameter in fresh.items():
        low, high = parameter.min(), parameter.max()
        kinds.add(bool(low == high))
        if low == high:
            assert (mine[name] == low).all(), name
        elif not name.endswith("c_proj.weight"):  # GPT-2's own are narrower with depth
            error = 0.02 / (2 * parameter.numel()) ** 0.5
            assert float(mine[name].std()) == pytest.approx(0.02, abs=5 * error), name
    assert kinds == {True, False}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    parts = (name.encode() + tensors[name].view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_same_seed_gives_the_same_tensors_however_they_fall_on_files(tmp_path: Path) -> None:
    whole = all_tensors(written(tmp_path / "whole", seed=5))
    sharded = written(tmp_path / "sharded", seed=5, shard_bytes=100_000)
    files = sorted(sharded.glob("*.safetensors"))
    assert [file.name for file in files[:2]] == [f"model-0000{n}-of-{len(files):05d}.safetensors" for n in (1, 2)]
    assert all(file.stat().st_size < 110_000 for file in files)
    index = read_json(sharded / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert digest(all_tensors(sharded)) == digest(whole)
    assert digest(all_tensors(written(tmp_path / "other", seed=6))) != digest(whole)
    names = list(whole)
    same = [n for n in names if whole[n].dim() > 1 and torch.equal(whole[n], whole[names[0]]) and n != names[0]]
    assert same == [], "each tensor has numbers of its own"


def test_its_configuration_can_be_set(tmp_path: Path) -> None:
    from transformers import AutoConfig

    options = FEW_EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4}
    folder = written(tmp_path / "model", "qwen3_moe", options=options)
    config = AutoConfig.from_pretrained(folder)
    assert {key: getattr(config, key) for key in options} == options
    experts = {name for name in all_tensors(folder) if ".experts." in name}
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in experts, "named as checkpoints name them"
    assert {name.split(".")[2] for name in experts} == {"1", "3"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"family": "lama"}, "--family: 'lama' is none that is known; choose one of gemma,"),
        ({"parameters": 100}, r"--parameters: 100 is too few for llama; give \d+ or more"),
        ({"vocabulary": 100}, "--vocabulary: 100 is too small; the tokenizer of bytes has 257 tokens"),
        ({"dtype": "int8"}, "--dtype: 'int8' is not possible; choose one of"),
        ({"options": {"hiden_size": 4}}, "--set: 'hiden_size' is no key of a llama configuration; give 'hidden_size'"),
        ({"options": {"num_attention_heads": 0}}, "--set: transformers makes no llama model of this"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model: dict[str, Any] = {"family": "llama", "parameters": 200_000, **given}
    with pytest.raises(InputError, match=words) as refusal:
        write_synthetic(Synthetic(**model), tmp_path / "model")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
