"""A model that cannot be told apart into its base and its copies is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.domains import Domains
from harness.spoiling import assert_refused, bit_in_a_tensor, changed_json, put, text
from safetensors.torch import load_file, save_file

from adept_ds.deltas.operations import apply_packages, pack_copies, strip_copies


def other_export_dtype(adapted: Path) -> None:
    for file in adapted.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)


def other_header(adapted: Path) -> None:
    def swap(tree: Any) -> None:
        name, header = next(iter(tree["headers"].items()))
        tree["headers"][name] = header.replace('"data_offsets":[0,', '"data_offsets":[8,')

    changed_json(adapted / "base_files.json", swap)


def without_config(adapted: Path) -> None:
    def remove(tree: Any) -> None:
        del tree["texts"]["config.json"]

    changed_json(adapted / "base_files.json", remove)


def outside(name: str) -> Callable[[Path], None]:
    def change(adapted: Path) -> None:
        def move(tree: Any) -> None:
            tree["headers"][name] = tree["headers"].pop(next(iter(tree["headers"])))

        changed_json(adapted / "base_files.json", move)

    return change


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "path": (outside("../../x.safetensors"), ["base_files.json", "no name of a weight file"]),
    "absolute path": (outside("/tmp/x.safetensors"), ["base_files.json", "no name of a weight file"]),
    "no weight file": (outside("tokenizer.json"), ["base_files.json", "no name of a weight file"]),
    "other text": (put("base_files.json", "texts", "../x", value="y"), ["base_files.json", "'texts.../x"]),
    "no config": (without_config, ["config.json"]),
    "config of text": (put("base_files.json", "texts", "config.json", value="{"), ["base_files.json"]),
    "config of a list": (put("base_files.json", "texts", "config.json", value="[]"), ["config.json: no JSON object"]),
    "deep config": (put("base_files.json", "texts", "config.json", value="[" * 10**5), ["config.json: nested too"]),
    "offsets": (other_header, ["base_files.json", "does not fit its tensors"]),
    "header": (put("base_files.json", "headers", "a.safetensors", value="{"), ["header cannot be read"]),
    "no record": (lambda d: (d / "base_files.json").unlink(), ["no base_files.json", "with --base"]),
    "expansion": (text("expansion.json", "{}"), ["expansion.json", "damaged"]),
    "place": (put("expansion.json", "copies", 0, "index", value=3), ["expansion.json", "not about the layers"]),
    "owner": (put("expansion.json", "deltas", 0, "copies", value=[2]), ["expansion.json", "not about the layers"]),
    "dtype": (other_export_dtype, ["as BF16, its base as F32", "export.dtype=source"]),
    "base": (bit_in_a_tensor, ["weights of its base are not those", "make it again"]),
}


@pytest.mark.parametrize("mistake", BAD_MODELS)
def test_a_model_that_cannot_be_told_apart_is_neither_stripped_nor_packed(
    llama: Domains, packages: tuple[Path, Path], tmp_path: Path, mistake: str
) -> None:
    change, words = BAD_MODELS[mistake]
    apply_packages(llama.base, [packages[0]], tmp_path / "adapted")
    change(tmp_path / "adapted")
    assert_refused(tmp_path, words, lambda out: strip_copies(tmp_path / "adapted", out))
    if mistake != "offsets":  # packing needs no offsets
        assert_refused(tmp_path, words, lambda out: pack_copies(tmp_path / "adapted", out))
