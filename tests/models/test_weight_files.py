"""A model consists of the files that transformers would load, or it is refused: nobody reads another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.models import save_tiny_model
from harness.spoiling import changed_json
from safetensors.torch import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.weight_files import weight_entries, weight_files
from adept_ds.weights.expansion import expand_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("one") / "model", "qwen3")


@pytest.fixture(scope="module")
def sharded(one_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(one_file).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def refuse(model: Path, *words: str) -> None:
    """By everything that reads weights, in one line that has all words."""
    for read in (
        lambda: weight_entries(model),
        lambda: ModelDirectory.resolve("model", str(model)),
        lambda: expand_checkpoint(model, model.parent / "out", [1]),
    ):
        with pytest.raises(InputError) as refusal:
            read()
        message = str(refusal.value)
        assert "\n" not in message and len(message) < 1000
        for word in (*words, str(model)):
            assert word in message, message
    assert not (model.parent / "out").exists()


def shards(model: Path) -> list[str]:
    return sorted(path.name for path in model.glob("model-*.safetensors"))


def loaded(model: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(model).state_dict())


# --- what a model consists of --------------------------------------------------------------------------------------


def test_one_file_is_the_model(one_file: Path) -> None:
    assert weight_files(one_file) == [one_file / "model.safetensors"]


def test_the_files_of_the_index_are_the_model(sharded: Path) -> None:
    assert {file.name for file in weight_files(sharded)} == set(shards(sharded))


@pytest.mark.parametrize("stranger", ["consolidated", "model_ema", "ema/model-00001-of-00001", "training_args"])
@pytest.mark.parametrize("form", ["one_file", "sharded"])
def test_files_that_transformers_passes_over_are_passed_over_and_not_copied(
    form: str, stranger: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = shutil.copytree(request.getfixturevalue(form), tmp_path / "model")
    other = model / f"{stranger}.safetensors"
    other.parent.mkdir(exist_ok=True)
    wanted = loaded(model)
    save_file({name: tensor + 1 for name, tensor in wanted.items()}, other)
    assert other not in weight_files(model)
    expand_checkpoint(model, tmp_path / "out", [])
    assert not (tmp_path / "out" / other.name).exists()
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_an_index_of_one_file_is_no_contradiction(one_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(one_file, tmp_path / "model")
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": names, "comment": 1}))
    assert weight_files(model) == [model / "model.safetensors"]
    assert len(weight_entries(model)) == 1


# --- two models in one directory -----------------------------------------------------------------------------------


def test_an_old_file_beside_newer_shards_is_refused(one_file: Path, sharded: Path, tmp_path: Path) -> None:
    """transformers would read the old one, whoever follows the index the new ones."""
    model = shutil.copytree(sharded, tmp_path / "model")
    shutil.copy(one_file / "model.safetensors", model)
    refuse(model, "model.safetensors beside model.safetensors.index.json", f"'{shards(model)[0]}'", "away")


def test_an_index_that_names_the_single_file_and_others_is_refused(
    one_file: Path, sharded: Path, tmp_path: Path
) -> None:
    """transformers would read the single file alone."""
    model = shutil.copytree(sharded, tmp_path / "model")
    last = shards(model)[-1]
    (model / last).rename(model / "model.safetensors")
    rename = {last: "model.safetensors"}
    changed_json(model / INDEX, lambda tree: tree.update(weight_map=renamed(tree["weight_map"], rename)))
    refuse(model, "model.safetensors beside model.safetensors.index.json")


def renamed(index: dict[str, str], names: dict[str, str]) -> dict[str, str]:
    return {tensor: names.get(file, file) for tensor, file in index.items()}


@pytest.mark.parametrize("names", [["model_ema"], ["consolidated"], ["consolidated", "model_ema"], ["a.model"]])
def test_files_of_other_names_alone_are_refused(one_file: Path, tmp_path: Path, names: list[str]) -> None:
    model = shutil.copytree(one_file, tmp_path / "model")
    for name in names:
        shutil.copy(model / "model.safetensors", model / f"{name}.safetensors")
    (model / "model.safetensors").unlink()
    refuse(model, f"'{names[0]}.safetensors'", "neither model.safetensors nor model.safetensors.index.json", "copy")


@pytest.mark.parametrize("with_single", [False, True])
def test_shards_without_their_index_are_refused(
    one_file: Path, sharded: Path, tmp_path: Path, with_single: bool
) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    (model / INDEX).unlink()
    if with_single:
        shutil.copy(one_file / "model.safetensors", model)
    refuse(model, f"'{shards(model)[0]}'", "no model.safetensors.index.json", "complete the download")


def test_an_adapter_is_refused_with_what_to_do(one_file: Path, tmp_path: Path) -> None:
    """With adapter_config.json, transformers would load the adapter's own base instead."""
    model = shutil.copytree(one_file, tmp_path / "model")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    refuse(model, "adapter_config.json", "merge")


# --- the index -----------------------------------------------------------------------------------------------------


BAD_INDICES: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "half": b'{"weight_map": {"a": ',
    "not UTF-8": b'{"weight_map": {"\xff": "model-00001-of-00002.safetensors"}}',
    "UTF-16": '{"weight_map": {"a": "b.safetensors"}}'.encode("utf-16"),
    "no map": b'{"metadata": {}}',
    "no entries": b'{"weight_map": {}}',
    "a list as map": b'{"weight_map": ["model-00001-of-00002.safetensors"]}',
    "a number as map": b'{"weight_map": 5}',
    "numbers as files": b'{"weight_map": {"a": 1}}',
    "lists as files": b'{"weight_map": {"a": ["model-00001-of-00002.safetensors"]}}',
    "null as file": b'{"weight_map": {"a": null}}',
    "an empty name": b'{"weight_map": {"a": ""}}',
    "metadata of another type": b'{"metadata": 5, "weight_map": {"a": "b.safetensors"}}',
    "100,000 brackets": b'{"weight_map": ' + b"[" * 100_000,
    "100,000 objects": b'{"weight_map": ' + b'{"a":' * 100_000,
    "outside": b'{"weight_map": {"a": "../../x.safetensors"}}',
    "outside, hidden": b'{"weight_map": {"a": "x/../../x.safetensors"}}',
    "absolute": b'{"weight_map": {"a": "/etc/x.safetensors"}}',
    "of another system": b'{"weight_map": {"a": "..\\\\x.safetensors"}}',
    "pickled": b'{"weight_map": {"a": "pytorch_model.bin"}}',
    "no file of weights": b'{"weight_map": {"a": "config.json"}}',
    "a zero byte": b'{"weight_map": {"a": "a\\u0000.safetensors"}}',
    "half a surrogate": b'{"weight_map": {"a": "\\ud83d.safetensors"}}',
    "a name too long for the disk": b'{"weight_map": {"a": "' + b"a" * 250 + b'.safetensors"}}',
    "a very long name": b'{"weight_map": {"a": "' + b"a" * 100_000 + b'.safetensors"}}',
}


@pytest.mark.parametrize("mistake", BAD_INDICES)
def test_a_bad_index_is_refused_in_one_line(sharded: Path, tmp_path: Path, mistake: str) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    (model / INDEX).write_bytes(BAD_INDICES[mistake])
    refuse(model, f"'{model / INDEX}' is damaged (", "complete the download")


def test_an_index_that_names_a_file_that_is_not_there_is_refused(sharded: Path, tmp_path: Path) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    victim = shards(model)[1]
    (model / victim).unlink()
    refuse(model, f"lacks weight file '{victim}'; complete the download")


# --- the index and the files ---------------------------------------------------------------------------------------


def unlist(name: str) -> Callable[[Path], None]:
    return lambda model: changed_json(model / INDEX, lambda tree: tree["weight_map"].pop(name) and None)


def in_shard(model: Path, name: str) -> Path:
    return model / json.loads((model / INDEX).read_text())["weight_map"][name]


def drop(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = in_shard(model, name)
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def twice(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = next(model / other for other in shards(model) if model / other != in_shard(model, name))
        save_file(load_file(file) | {name: torch.zeros(20)}, file, metadata={"format": "pt"})

    return change


def list_elsewhere(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = next(other for other in shards(model) if model / other != in_shard(model, name))
        changed_json(model / INDEX, lambda tree: tree["weight_map"].update({name: file}))

    return change


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(unlist(NORM), [f"holds '{NORM}'", "does not name"], id="not listed"),
        pytest.param(drop(NORM), [f"lacks '{NORM}'", "index.json names"], id="not in the file"),
        pytest.param(twice(NORM), [f"has '{NORM}' in both"], id="in two files"),
        pytest.param(list_elsewhere(NORM), [f"'{NORM}'", "index.json"], id="listed in another file"),
    ],
)
def test_index_and_files_that_do_not_agree_are_refused_by_the_tensor(
    sharded: Path, tmp_path: Path, change: Callable[[Path], None], words: list[str]
) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    change(model)
    refuse(model, *words, "download or save the model again")


def test_a_shard_that_is_damaged_is_named(sharded: Path, tmp_path: Path) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    (model / shards(model)[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(model, f"'{model / shards(model)[1]}' is damaged", "complete the download")


def test_a_link_to_a_shard_elsewhere_is_followed(sharded: Path, tmp_path: Path) -> None:
    """So lie files in the hub's cache."""
    model = shutil.copytree(sharded, tmp_path / "model")
    for name in shards(model):
        (model / name).rename(tmp_path / f"blob {name}")
        (model / name).symlink_to(tmp_path / f"blob {name}")
    assert len(weight_entries(model)) == len(shards(sharded))
