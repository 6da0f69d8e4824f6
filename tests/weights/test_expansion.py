"""The expanded checkpoint computes exactly the function of its source, whatever the family and the files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.expanding import COPIES, SELECTED, change_after_one_step, layers_of, load, random_tokens
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.marks import slow
from harness.models import FAMILY_OPTIONS, save_tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.base.outputs import MARK_NAME
from adept_ds.models.families import Family
from adept_ds.models.family_table import FAMILIES
from adept_ds.weights import expansion as expansion_module
from adept_ds.weights.expansion import Expansion, LayerCopy, expand_checkpoint, layer_origins, plan_copies
from adept_ds.weights.fingerprints import fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.tensor_files import write_tensors

ORIGINS = [0, 0, 1, 2, 2, 3, 4, 4]  # source layer of each expanded layer, by hand
PROMPT_TOKENS, NEW_TOKENS = 12, 20  # 32 positions: the sliding windows of 16 are crossed while generating


@pytest.fixture(scope="module", params=sorted(FAMILY_OPTIONS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model of each family and its expansion."""
    root = tmp_path_factory.mktemp(request.param)
    source = save_tiny_model(root / "source", request.param)
    expand_checkpoint(source, root / "expanded", SELECTED)
    return source, root / "expanded"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def sharded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("sharded") / "source"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def family_of_model(model: Any) -> Family:
    return FAMILIES[model.config.model_type]


def logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return load(directory, dtype)(input_ids=random_tokens(2, 40)).logits


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def stamps(root: Path) -> dict[Path, tuple[int, int]]:
    """All that lies there, and when it was written."""
    return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in root.rglob("*")}


# --- the same function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_the_same_bit_for_bit(pair: tuple[Path, Path], dtype: torch.dtype) -> None:
    source, expanded = pair
    before = logits(source, dtype)
    assert torch.isfinite(before).all()
    assert before.std() > 0.1, "a model that says nothing proves nothing"
    assert torch.equal(logits(expanded, dtype), before)


@pytest.mark.parametrize("pair", MOSTLY_SLOW_FAMILIES, indirect=True)
def test_generation_with_a_cache_gives_the_same_tokens(pair: tuple[Path, Path]) -> None:
    prompt = random_tokens(2, PROMPT_TOKENS)
    generated = [
        load(directory).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
        )
        for directory in pair
    ]
    assert generated[0].shape == (2, PROMPT_TOKENS + NEW_TOKENS)
    assert torch.equal(*generated)


@pytest.mark.parametrize("pair", MOSTLY_SLOW_FAMILIES, indirect=True)
def test_cached_generation_is_generation_without_a_cache(pair: tuple[Path, Path]) -> None:
    """A wrong layer index mixes up caches; without a cache nothing can be mixed up."""
    prompt = random_tokens(1, PROMPT_TOKENS)
    model = load(pair[1])
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones_like(prompt)
    cached, plain = (model.generate(prompt, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("pair", MOSTLY_SLOW_FAMILIES, indirect=True)
def test_a_copy_does_something_once_its_zeros_are_filled(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Identity because of the zeros alone: the copies are really in the model's path."""
    for index in COPIES:
        model = load(pair[1])
        with torch.no_grad():
            before = model(input_ids=random_tokens(2, 40)).logits
            for parameter in layers_of(model)[index].parameters():
                parameter.add_(0.1)
            after = model(input_ids=random_tokens(2, 40)).logits
        assert not torch.equal(before, after)


@pytest.mark.parametrize("pair", MOSTLY_SLOW_FAMILIES, indirect=True)
def test_training_starts_smoothly(pair: tuple[Path, Path]) -> None:
    assert 0 < change_after_one_step(pair[1]) < 0.05


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2"])
def test_zeroed_projections_before_a_norm_would_not_start_smoothly(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test before is there for: the norm brings the smallest update to full size."""
    source = save_tiny_model(tmp_path / "source", model_type)
    projections = replace(FAMILIES[model_type], residual_writers=FAMILIES["llama"].residual_writers, silent=0.0)
    monkeypatch.setitem(FAMILIES, model_type, projections)
    expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    assert torch.equal(logits(tmp_path / "expanded"), logits(source))
    assert change_after_one_step(tmp_path / "expanded") > 0.05


# --- where everything stands ---------------------------------------------------------------------------------------


def test_every_layer_is_its_source_layer_and_only_the_recorded_tensors_are_silenced(pair: tuple[Path, Path]) -> None:
    source, expanded = (all_tensors(directory) for directory in pair)
    record = read_json(pair[1] / "expansion.json")
    silent = -1 if "gemma" in read_json(pair[0] / "config.json")["model_type"][:-1] else 0  # gemma 2 and 3: gain 1 + w
    assert set(record["zeroed"]) == {name for name, tensor in expanded.items() if (tensor == silent).all()}
    for index in COPIES:  # attention and MLP
        assert sum(re.search(rf"\.{index}\.", name) is not None for name in record["zeroed"]) >= 2
    seen = set()
    for name, tensor in expanded.items():
        match = re.fullmatch(r"(.*?(?:layers|h)\.)(\d+)(\..*)", name)
        origin = f"{match[1]}{ORIGINS[int(match[2])]}{match[3]}" if match else name
        seen.add(origin)
        assert tensor.dtype == source[origin].dtype
        if name not in record["zeroed"]:
            assert torch.equal(tensor, source[origin]), name
    assert seen == source.keys()


def test_expansion_json_says_what_the_design_says(pair: tuple[Path, Path]) -> None:
    record = read_json(pair[1] / "expansion.json")
    assert record["source_layers"] == 5
    assert record["copies"] == [{"source": s, "index": i} for s, i in zip(SELECTED, COPIES, strict=True)]
    loaded = Expansion.read(pair[1])
    assert (loaded.source_indices, loaded.copy_indices) == (SELECTED, COPIES)


def test_the_file_has_the_keys_that_it_always_had(pair: tuple[Path, Path]) -> None:
    """Checkpoints and packages lie on disks for years, whatever the fields are called in the program."""
    keys = ["source_layers", "copies", "zeroed", "fingerprint", "deltas", "base_fingerprint"]
    assert list(read_json(pair[1] / "expansion.json")) == keys
    expansion = Expansion.read(pair[1])
    assert expansion.silenced == tuple(read_json(pair[1] / "expansion.json")["zeroed"])
    assert expansion.packages == ()


def settings_of(layer: torch.nn.Module) -> dict[str, Any]:
    """What the modules of a layer were built with: sliding windows, kinds of attention, experts or none."""
    return {
        f"{path}.{key}": value
        for path, module in layer.named_modules()
        for key, value in ({"class": type(module)} | vars(module)).items()
        if isinstance(value, str | int | float | type) and key != "layer_idx"
    }


def test_every_layer_is_built_like_its_source_and_knows_its_own_place(pair: tuple[Path, Path]) -> None:
    source, expanded = (load(directory) for directory in pair)
    before, after = (layers_of(model) for model in (source, expanded))
    assert expanded.config.num_hidden_layers == len(after) == len(ORIGINS)
    for position, (layer, origin) in enumerate(zip(after, ORIGINS, strict=True)):
        indices = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        assert indices == {position}
        assert settings_of(layer) == settings_of(before[origin])
    for key in ("layer_types", "no_rope_layers"):
        entries = getattr(source.config, key, None)
        if entries is not None:
            assert getattr(expanded.config, key) == [entries[origin] for origin in ORIGINS]
            assert len(set(entries)) > 1 or source.config.model_type == "qwen3", "says nothing"


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.derived_config])
@pytest.mark.parametrize("old_style", ["absent", slow("null")])
def test_lists_that_old_files_lack_are_inherited_and_not_derived_again(
    tmp_path: Path, old_style: str, model_type: str
) -> None:
    """Derived anew for 8 layers, every second one would slide again, or those from the fourth on."""
    source = save_tiny_model(tmp_path / "source", model_type)
    expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    wanted = {key: getattr(load(tmp_path / "expanded").config, key) for key in FAMILIES[model_type].derived_config}
    config = read_json(source / "config.json")
    for key in wanted:
        del config[key]
    config |= {} if old_style == "absent" else dict.fromkeys(wanted)
    if "_sliding_window_pattern" in config:
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")  # as files had it
    write_json(source / "config.json", config)
    expand_checkpoint(source, tmp_path / "expanded", SELECTED, overwrite=True)
    expanded = load(tmp_path / "expanded").config
    assert {key: getattr(expanded, key) for key in wanted} == wanted
    assert torch.equal(logits(tmp_path / "expanded"), logits(source))


@pytest.mark.parametrize(
    ("layers", "selected", "origins", "copies"),
    [
        (3, [1], [0, 1, 1, 2], [LayerCopy(source=1, index=2)]),
        (3, [2, 0], [0, 0, 1, 2, 2], [LayerCopy(source=0, index=1), LayerCopy(source=2, index=4)]),
        (2, [0, 1], [0, 0, 1, 1], [LayerCopy(source=0, index=1), LayerCopy(source=1, index=3)]),
        (2, [], [0, 1], []),
    ],
)
def test_each_copy_stands_directly_above_its_source(
    layers: int, selected: Sequence[int], origins: list[int], copies: list[LayerCopy]
) -> None:
    assert layer_origins(layers, selected) == origins
    assert plan_copies(selected) == copies


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_sharded_source_gives_a_valid_sharded_result(sharded: Path, tmp_path: Path) -> None:
    expanded = tmp_path / "expanded"
    expand_checkpoint(sharded, expanded, SELECTED)
    index = read_json(expanded / "model.safetensors.index.json")
    files = {file.name for file in expanded.glob("*.safetensors")}
    assert len(files) == len(list(sharded.glob("*.safetensors")))
    assert set(index["weight_map"].values()) == files
    for file in files:
        with safe_open(expanded / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert set(shard.keys()) == {name for name, place in index["weight_map"].items() if place == file}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(expanded).values())
    assert torch.equal(logits(expanded), logits(sharded))


def test_sharded_and_whole_sources_give_the_same_tensors(llama: Path, sharded: Path, tmp_path: Path) -> None:
    expand_checkpoint(sharded, tmp_path / "a", SELECTED)
    expand_checkpoint(llama, tmp_path / "b", SELECTED)
    several, one = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    assert several.keys() == one.keys()
    assert all(torch.equal(several[name], one[name]) for name in one)


def test_tied_embeddings_stay_tied(llama: Path, tmp_path: Path) -> None:
    expand_checkpoint(llama, tmp_path / "expanded", SELECTED)
    assert "lm_head.weight" not in all_tensors(tmp_path / "expanded")
    model = load(tmp_path / "expanded")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_untied_embeddings_stay_untied(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "qwen3")
    expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    model = load(tmp_path / "expanded")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, load(source).lm_head.weight)


def test_the_dtype_of_the_source_is_kept(llama: Path, tmp_path: Path) -> None:
    load(llama, torch.bfloat16).save_pretrained(tmp_path / "source")
    expand_checkpoint(tmp_path / "source", tmp_path / "expanded", SELECTED)
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "expanded").values()} == {torch.bfloat16}
    assert load(tmp_path / "expanded", "auto").dtype == torch.bfloat16
    expected = logits(tmp_path / "source", torch.bfloat16)
    assert torch.equal(logits(tmp_path / "expanded", torch.bfloat16), expected)


def test_the_configuration_differs_only_in_what_expansion_changes(pair: tuple[Path, Path]) -> None:
    source, expanded = (load(directory).config.to_dict() for directory in pair)
    changed = {key for key in source if source[key] != expanded.get(key)} | (expanded.keys() - source.keys())
    lists = {"layer_types", "no_rope_layers", "mlp_only_layers", "decoder_sparse_step"}
    assert changed <= {"num_hidden_layers", "n_layer", "_name_or_path"} | lists
    assert changed & {"num_hidden_layers", "n_layer"}


def test_tokenizer_generation_config_and_licence_are_carried_over_and_weights_of_other_formats_not(
    llama: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    write_json(source / "generation_config.json", {"temperature": 0.5, "do_sample": True})
    (source / "LICENSE").write_text("free")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"):
        (source / name).write_text("old")
    expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    kept = {file.name for file in source.iterdir()} - {
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.gguf",
    }
    ours = {"expansion.json", "base_files.json", MARK_NAME}
    assert {file.name for file in (tmp_path / "expanded").iterdir()} == kept | ours
    for name in ("generation_config.json", "LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "expanded" / name).read_bytes() == (source / name).read_bytes()


def test_an_earlier_expansion_is_replaced_whole(llama: Path, sharded: Path, tmp_path: Path) -> None:
    destination = tmp_path / "expanded"
    expand_checkpoint(sharded, destination, SELECTED)
    expand_checkpoint(llama, destination, [1], overwrite=True)
    assert [file.name for file in destination.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["expanded"]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "^C"])
def test_an_interrupted_expansion_leaves_what_was_there(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool, error: BaseException
) -> None:
    destination = tmp_path / "expanded"
    if existed:
        expand_checkpoint(sharded, destination, [1])
    before = stamps(tmp_path)
    written: list[str] = []

    def interrupted(path: Path, *arguments: Any) -> dict[str, str]:
        written.append(path.name)
        digests = write_tensors(path, *arguments)
        if len(written) == 2:
            assert not (path.parent / "config.json").exists(), "killed now, it must not look like a model"
            raise error
        return digests

    monkeypatch.setattr(expansion_module, "write_tensors", interrupted)
    with pytest.raises(type(error)):
        expand_checkpoint(sharded, destination, SELECTED, overwrite=True)
    assert len(written) == 2
    assert stamps(tmp_path) == before


def test_a_missing_shard_is_an_input_error_and_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    victim = sorted(source.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=victim.name):
        expand_checkpoint(source, tmp_path / "expanded", SELECTED)
    assert not (tmp_path / "expanded").exists()


def test_the_fingerprint_belongs_to_the_weights(llama: Path, tmp_path: Path) -> None:
    whole = expand_checkpoint(llama, tmp_path / "a", SELECTED)
    first = whole.fingerprint
    assert expand_checkpoint(llama, tmp_path / "b", SELECTED).fingerprint == first
    other = expand_checkpoint(llama, tmp_path / "c", [0, 2, 3])
    assert other.fingerprint != first
    assert other.base_fingerprint == whole.base_fingerprint == fingerprint_of(hash_tensors(stored_tensors(llama)))
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    changed = expand_checkpoint(source, tmp_path / "d", SELECTED)
    assert changed.fingerprint != first
    assert changed.base_fingerprint != whole.base_fingerprint
    assert Expansion.read(tmp_path / "a").fingerprint == first


def test_a_directory_that_is_no_expansion_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match=r"expansion\.json"):
        Expansion.read(llama)
