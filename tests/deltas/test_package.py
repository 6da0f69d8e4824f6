"""A package says what it is for, and one that was tampered with is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.domains import Domains, all_tensors
from harness.spoiling import assert_refused, changed_json, cut, flip_bit, put, text
from safetensors.torch import load_file, save_file

from adept_ds.base.files import read_json
from adept_ds.deltas.operations import apply_packages
from adept_ds.deltas.package import Package


def test_fingerprints_are_the_documented_hashes(llama: Domains, packages: tuple[Path, Path]) -> None:
    def listed(tensors: dict[str, torch.Tensor]) -> list[Any]:
        of = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return [[n, "F32", list(tensors[n].shape), hashlib.sha256(of[n]).hexdigest()] for n in sorted(tensors)]

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    manifest = read_json(packages[0] / "delta.json")
    config = read_json(llama.base / "config.json")
    del config["transformers_version"]
    assert manifest["base"] == {
        "fingerprint": digest(listed(all_tensors(llama.base))),
        "config": digest(config),
        "model_type": "llama",
        "layers": 5,
    }
    tensors = listed(load_file(packages[0] / "delta.safetensors"))
    assert manifest["tensors"] == {name: {"sha256": s, "dtype": d, "shape": n} for name, d, n, s in tensors}
    assert manifest["copies"] == [{"source": 1, "index": 2}, {"source": 3, "index": 5}]
    base = manifest["base"]
    assert Package.load(packages[0]).manifest.fingerprint == digest(
        [base["fingerprint"], base["config"], digest(tensors)]
    )


def rename_tensor(directory: Path) -> None:
    """In manifest and file alike, with its right hash."""
    old, new = "model.layers.3.mlp.up_proj.weight", "../../etc/passwd"
    save_file(
        {new if name == old else name: tensor for name, tensor in load_file(directory / "delta.safetensors").items()},
        directory / "delta.safetensors",
    )
    changed_json(directory / "delta.json", lambda tree: tree["tensors"].update({new: tree["tensors"].pop(old)}))


def move_layers(directory: Path) -> None:
    changed_json(directory / "delta.json", lambda tree: tree["copies"].reverse())


def link_away(directory: Path) -> None:
    (directory / "delta.safetensors").rename(directory.parent / "elsewhere.safetensors")
    (directory / "delta.safetensors").symlink_to("../elsewhere.safetensors")


BAD_PACKAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tensor with another bit": (
        lambda d: flip_bit(d / "delta.safetensors"),
        ["'model.layers.3.self_attn.v_proj.weight'", "delta.json", "copy the package again"],
    ),
    "hash of another tensor": (
        put("delta.json", "tensors", "model.layers.1.mlp.up_proj.weight", "sha256", value="0" * 64),
        ["'model.layers.1.mlp.up_proj.weight'", "copy the package again"],
    ),
    "cut tensors": (cut("delta.safetensors"), ["delta.safetensors", "damaged"]),
    "cut manifest": (cut("delta.json"), ["delta.json", "damaged", "copy the package again"]),
    "empty manifest": (text("delta.json", ""), ["delta.json", "damaged", "copy the package again"]),
    "nested manifest": (text("delta.json", "[" * 100_000), ["delta.json", "damaged", "copy the package again"]),
    "list": (text("delta.json", "[1, 2]"), ["delta.json", "damaged", "copy the package again"]),
    "no manifest": (lambda d: (d / "delta.json").unlink(), ["no delta.json", "adept delta pack"]),
    "no tensors": (lambda d: (d / "delta.safetensors").unlink(), ["no delta.safetensors", "adept delta pack"]),
    "file names": (put("delta.json", "files", value=["../../secret"]), ["'files'", "Extra inputs"]),
    "path in name": (put("delta.json", "name", value="../math"), ["'name'", "pattern"]),
    "line break in name": (put("delta.json", "name", value="math\n"), ["'name'", "pattern"]),
    "line break in key": (put("delta.json", "a\nb", value=1), ["a\\nb", "Extra inputs"]),
    "path as tensor": (rename_tensor, ["'../../etc/passwd'"]),
    "link": (link_away, ["delta.safetensors", "link", "cp -rL"]),
    "format": (put("delta.json", "format", value=2), ["'format'"]),
    "hash that is none": (put("delta.json", "base", "fingerprint", value="A" * 64), ["'base.fingerprint'", "pattern"]),
    "text for a number": (put("delta.json", "base", "layers", value="5"), ["'base.layers'", "integer"]),
    "negative layer": (put("delta.json", "copies", 0, "source", value=-1), ["'copies.0.source'"]),
    "layer that is none": (put("delta.json", "copies", 1, value={"source": 5, "index": 7}), ["[1, 5] of 5"]),
    "layer twice": (put("delta.json", "copies", 1, value={"source": 1, "index": 3}), ["[1, 1]", "one at most"]),
    "another place": (put("delta.json", "copies", 1, "index", value=6), ["[1, 3]", "directly above"]),
    "another order": (move_layers, ["[3, 1]", "directly above"]),
    "no copies": (put("delta.json", "copies", value=[]), ["'copies'"]),
    "copy of another layer": (put("delta.json", "copies", 1, value={"source": 4, "index": 6}), ["layers.3"]),
    "not a number": (put("delta.json", "metrics", "losses", value={"base": {"general": float("nan")}}), ["'metrics"]),
    "tensor too many": (
        put("delta.json", "tensors", "x", value={"sha256": "0" * 64, "dtype": "F32", "shape": [1]}),
        ["'x'", "only in one"],
    ),
    "another shape": (
        put("delta.json", "tensors", "model.layers.1.mlp.up_proj.weight", "shape", value=[740]),
        ["'model.layers.1.mlp.up_proj.weight'", "not what delta.json says"],
    ),
}


@pytest.mark.parametrize("mistake", BAD_PACKAGES)
def test_a_package_that_was_tampered_with_is_refused(
    llama: Domains, packages: tuple[Path, Path], tmp_path: Path, mistake: str
) -> None:
    change, words = BAD_PACKAGES[mistake]
    bad = shutil.copytree(packages[0], tmp_path / "bad")
    change(bad)
    assert_refused(tmp_path, words, lambda out: apply_packages(llama.base, [packages[1], bad], out))
