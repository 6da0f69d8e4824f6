"""A domain is a package: over its base it is the adapted model byte for byte, and without it the base is as it was.

No training here: an adapted model is an expanded one whose copies hold random numbers, saved by the safetensors
library as the export does. Equality is of bytes or bits throughout: nothing is computed, so nothing may differ.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import ROOT, adept
from harness.models import VOCABULARY, save_tiny_model
from safetensors.torch import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.deltas import operations as delta_module
from adept_ds.deltas.operations import apply_packages, pack_copies, strip_copies
from adept_ds.deltas.package import Package, PackageManifest
from adept_ds.weights import expansion as expansion_module
from adept_ds.weights.expansion import Expansion, expand_checkpoint
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.tensor_files import in_library_order, read_header, write_tensors

MATH, LAW = [1, 3], [1, 4]  # both copy layer 1
MATH_LAW = [
    ("base", 0),
    ("base", 1),
    ("math", 1),
    ("law", 1),
    ("base", 2),
    ("base", 3),
    ("math", 3),
    ("base", 4),
    ("law", 4),
]
"""Layers of the base with both deltas over it, lowest first, by hand: whose, and which layer of the base."""


@dataclass(frozen=True)
class Domains:
    """A base, and two models adapted from it."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def math(self) -> Path:
        return self.root / "math"

    @property
    def law(self) -> Path:
        return self.root / "law"

    def packages(self, out: Path) -> tuple[Path, Path]:
        pack_copies(self.math, out / "d_math", name="math")
        pack_copies(self.law, out / "d_law", name="law")
        return out / "d_math", out / "d_law"


def layer_of(name: str) -> int | None:
    """The first number in a tensor's name; the next would be an expert's."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def adapt(base: Path, out: Path, layers: list[int], seed: int) -> Path:
    """What a run exports, without the training."""
    expansion = expand_checkpoint(base, out, layers)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in sorted(tensors.items()):
            if layer_of(name) in expansion.copy_indices:
                tensors[name] = (torch.randn(tensor.shape, generator=generator) * 0.2).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def save_base(directory: Path, model_type: str, shard_size: str | None, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(directory, model_type), dtype=dtype)
    if shard_size:
        (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size=shard_size or "1GB")
    # Whatever a base may look like, it must come back as it was: odd spaces and line ends, companions.
    config = json.dumps(read_json(directory / "config.json"), indent=7).replace("\n", "\r\n")
    (directory / "config.json").write_bytes(config.encode())
    (directory / "LICENSE").write_bytes(b"free\r\n\xff")
    return directory


def make(root: Path, model_type: str, shard_size: str | None = None) -> Domains:
    base = save_base(root / "base", model_type, shard_size)
    adapt(base, root / "math", MATH, seed=1)
    adapt(base, root / "law", LAW, seed=2)
    return Domains(root)


@pytest.fixture(
    scope="module",
    params=[("llama", "20KB"), ("qwen2", None), ("mixtral", "100KB"), ("gpt2", None)],
    ids=["llama-tied-sharded", "qwen2", "mixtral-sharded", "gpt2-tied"],
)
def domains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return make(tmp_path_factory.mktemp(request.param[0]), *request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return make(tmp_path_factory.mktemp("domains"), "llama", "20KB")


@pytest.fixture(scope="module")
def packages(llama: Domains) -> tuple[Path, Path]:
    return llama.packages(llama.root)


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


# --- round trips ---------------------------------------------------------------------------------------------------


def test_a_package_over_its_base_is_the_adapted_model_byte_for_byte(domains: Domains, tmp_path: Path) -> None:
    package = domains.packages(tmp_path)[0]
    applied = apply_packages(domains.base, [package], tmp_path / "out")
    wanted, found = content(domains.math), content(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == ["expansion.json"]
    before = Expansion.read(domains.math)
    assert (applied.copies, applied.source_layers) == (before.copies, before.source_layers)
    assert set(applied.silenced) == set(before.silenced)


def test_a_package_holds_the_copies_and_nothing_else(domains: Domains, tmp_path: Path) -> None:
    package = domains.packages(tmp_path)[0]
    assert content(package).keys() == {"delta.json", "delta.safetensors"}
    adapted, found = all_tensors(domains.math), load_file(package / "delta.safetensors")
    wanted = {
        name.replace(f".{index}.", f".{source}.", 1): tensor
        for source, index in ((1, 2), (3, 5))  # of MATH, by hand
        for name, tensor in adapted.items()
        if layer_of(name) == index
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_stripping_gives_every_file_of_the_base_back_byte_for_byte(domains: Domains, tmp_path: Path) -> None:
    d_math, d_law = domains.packages(tmp_path)
    apply_packages(domains.base, [d_math, d_law], tmp_path / "both")
    base = content(domains.base)
    fingerprints = set()
    for number, adapted in enumerate((domains.math, domains.law, tmp_path / "both")):
        fingerprints.add(strip_copies(adapted, tmp_path / f"back{number}").fingerprint)
        assert content(tmp_path / f"back{number}") == base
    assert fingerprints == {Package.load(d_math).manifest.base.fingerprint}


def test_one_of_several_is_packed_as_it_was(domains: Domains, tmp_path: Path) -> None:
    d_math, d_law = domains.packages(tmp_path)
    apply_packages(domains.base, [d_law, d_math], tmp_path / "both")
    for name, package in (("math", d_math), ("law", d_law)):
        pack_copies(tmp_path / "both", tmp_path / f"again_{name}", only=name)
        assert content(tmp_path / f"again_{name}") == content(package)


# --- several over one base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["math first", "law first"])
def test_copies_of_one_layer_stand_in_the_order_of_the_command_line(
    domains: Domains, tmp_path: Path, order: str
) -> None:
    """Against layers put together by hand in PyTorch, with logits of the resulting stack."""
    packages, layers = list(domains.packages(tmp_path)), list(MATH_LAW)
    if order == "law first":
        packages.reverse()
        layers[2:4] = [("law", 1), ("math", 1)]
    expansion = apply_packages(domains.base, packages, tmp_path / "both")

    by_hand, adapted = load(domains.base), {"math": load(domains.math), "law": load(domains.law)}
    stack = by_hand.transformer.h if hasattr(by_hand, "transformer") else by_hand.model.layers
    own = list(stack)
    del stack[:]
    place = {("math", 1): 2, ("math", 3): 5, ("law", 1): 2, ("law", 4): 6}  # where a copy stands in its own model
    for whose, source in layers:
        if whose == "base":
            stack.append(own[source])
        else:
            model = adapted[whose]
            inside = model.transformer.h if hasattr(model, "transformer") else model.model.layers
            stack.append(copy.deepcopy(inside[place[whose, source]]))
    if hasattr(by_hand.config, "layer_types"):  # whatever the model looks up by index follows the layer
        by_hand.config.layer_types = [by_hand.config.layer_types[source] for _, source in layers]
    by_hand.config.num_hidden_layers = len(layers)
    merged = load(tmp_path / "both")
    assert torch.equal(logits(merged), logits(by_hand))

    claimed = {delta.name: delta.copies for delta in expansion.packages}
    assert list(claimed) == [path.name.removeprefix("d_") for path in packages]
    for name in claimed:
        assert list(claimed[name]) == [index for index, (whose, _) in enumerate(layers) if whose == name]
    assert Expansion.read(tmp_path / "both") == expansion


def test_the_order_matters_only_where_packages_copy_one_layer(llama: Domains, tmp_path: Path) -> None:
    adapt(llama.base, tmp_path / "art", [0, 2], seed=3)
    pack_copies(tmp_path / "art", tmp_path / "d_art", name="art")
    (d_math, d_law), d_art = llama.packages(tmp_path), tmp_path / "d_art"
    outputs = {}
    for name, order in {
        "ml": [d_math, d_law],
        "lm": [d_law, d_math],
        "ma": [d_math, d_art],
        "am": [d_art, d_math],
    }.items():
        apply_packages(llama.base, order, tmp_path / name)
        outputs[name] = logits(load(tmp_path / name))
    assert not torch.equal(outputs["ml"], outputs["lm"])
    assert torch.equal(outputs["ma"], outputs["am"])


def test_an_adapted_model_can_be_a_base_itself(llama: Domains, packages: tuple[Path, Path], tmp_path: Path) -> None:
    adapt(llama.math, tmp_path / "twice", [0, 2], seed=4)
    pack_copies(tmp_path / "twice", tmp_path / "d")
    apply_packages(llama.math, [tmp_path / "d"], tmp_path / "out")
    assert all_tensors(tmp_path / "out").keys() == all_tensors(tmp_path / "twice").keys()
    strip_copies(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(llama.math)
    strip_copies(tmp_path / "back", tmp_path / "first")
    assert content(tmp_path / "first") == content(llama.base)


def test_tensors_of_all_dtypes_lie_in_a_file_as_the_library_puts_them(tmp_path: Path) -> None:
    """The export writes with the library; otherwise `apply` would not give the same files."""
    wide, narrow = "float64 int64 uint64 float32 int32 uint32", "bfloat16 float16 int16 uint16 int8 uint8 bool"
    kinds = f"{narrow} float8_e4m3fn float8_e5m2 {wide}".split()
    tensors = {f"t{i % 4}.{kind}": torch.ones(3, dtype=getattr(torch, kind)) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    write_tensors(tmp_path / "b", in_library_order(dict(reversed(read_header(tmp_path / "a").items()))))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


# --- what a package says -------------------------------------------------------------------------------------------


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


def test_a_package_does_not_care_how_its_base_falls_on_files(llama: Domains, tmp_path: Path) -> None:
    whole = tmp_path / "base"
    whole.mkdir()
    shutil.copy(llama.base / "config.json", whole)
    stored = stored_tensors(llama.base)  # one file instead of several, in an order that no library writes
    write_tensors(whole / "model.safetensors", {name: stored[name] for name in sorted(stored, reverse=True)})
    pack_copies(llama.math, tmp_path / "d", base=whole)
    apply_packages(whole, [tmp_path / "d"], tmp_path / "out")
    wanted, found = all_tensors(llama.math), all_tensors(tmp_path / "out")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    strip_copies(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(whole)
    # Another text of the same configuration is no other base either.
    write_json(whole / "config.json", read_json(whole / "config.json") | {"transformers_version": "1.2.3"})
    apply_packages(whole, [tmp_path / "d"], tmp_path / "again")


def test_a_model_that_lost_its_record_is_packed_with_its_base(llama: Domains, tmp_path: Path) -> None:
    old = shutil.copytree(llama.math, tmp_path / "math")
    (old / "base_files.json").unlink()
    new_keys = ("deltas", "base_fingerprint")
    changed_json(old / "expansion.json", lambda tree: {key: tree[key] for key in tree.keys() - new_keys})
    assert pack_copies(old, tmp_path / "d", base=llama.base) == pack_copies(llama.math, tmp_path / "new")


def run_dir(domains: Domains, directory: Path) -> Path:
    """What a run leaves behind, as far as packing reads it."""
    shutil.copytree(domains.math, directory / "export")
    (directory / "config.yaml").write_text("model: base\n")
    losses = {"base": {"general": 3.0, "domain": 4.0}, "adapted": {"general": 3.01, "domain": 2.5}}
    rows = {model: {c: {"loss": loss, "tokens": 99} for c, loss in of.items()} for model, of in losses.items()}
    write_json(directory / "evaluation.json", rows)
    write_json(directory / "summary.json", {"steps": 7, "tokens": 800, "seconds": 1.5, "world_size": 2})
    return directory


def test_the_losses_of_a_run_come_along_unless_they_are_of_another_export(llama: Domains, tmp_path: Path) -> None:
    run = run_dir(llama, tmp_path / "algebra")
    manifest = pack_copies(run, tmp_path / "d")
    assert manifest.name == "algebra"
    assert manifest.metrics.model_dump() == {
        "losses": {"base": {"general": 3.0, "domain": 4.0}, "adapted": {"general": 3.01, "domain": 2.5}},
        "training": {"steps": 7, "tokens": 800, "seconds": 1.5},
    }
    assert PackageManifest.load(tmp_path / "d" / "delta.json") == manifest
    [applied] = apply_packages(llama.base, [tmp_path / "d"], tmp_path / "out").packages
    assert applied.metrics == manifest.metrics.model_dump()
    assert pack_copies(tmp_path / "out", tmp_path / "again") == manifest
    os.utime(run / "export" / "config.json", (4e9, 4e9))
    assert pack_copies(run, tmp_path / "stale").metrics.losses == {}


# --- refusals ------------------------------------------------------------------------------------------------------


def changed_json(path: Path, change: Callable[[Any], Any]) -> None:
    """`change` mutates what the file holds, or returns something else to hold."""
    value = read_json(path)
    result = change(value)
    write_json(path, value if result is None else result)


def flip_bit(path: Path, position: int = -1) -> None:
    text = bytearray(path.read_bytes())
    text[position] ^= 1
    path.write_bytes(text)


def put(name: str, *keys: Any, value: Any) -> Callable[[Path], None]:
    """Set one entry of a JSON file."""

    def change(directory: Path) -> None:
        def at(tree: Any) -> None:
            for key in keys[:-1]:
                tree = tree[key]
            tree[keys[-1]] = value

        changed_json(directory / name, at)

    return change


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


def cut(name: str) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size - 5)


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


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
    "cut manifest": (cut("delta.json"), ["delta.json", "no manifest"]),
    "empty manifest": (text("delta.json", ""), ["delta.json", "no manifest"]),
    "nested manifest": (text("delta.json", "[" * 100_000), ["delta.json", "no manifest"]),
    "list": (text("delta.json", "[1, 2]"), ["delta.json", "no manifest"]),
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


def assert_refused(tmp_path: Path, words: list[str], work: Callable[[Path], Any]) -> None:
    """One line with all `words`; nothing else in the directory than before."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as refusal:
        work(tmp_path / "out")
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mistake", BAD_PACKAGES)
def test_a_package_that_was_tampered_with_is_refused(
    llama: Domains, packages: tuple[Path, Path], tmp_path: Path, mistake: str
) -> None:
    change, words = BAD_PACKAGES[mistake]
    bad = shutil.copytree(packages[0], tmp_path / "bad")
    change(bad)
    assert_refused(tmp_path, words, lambda out: apply_packages(llama.base, [packages[1], bad], out))


def bit_in_a_tensor(base: Path) -> None:
    flip_bit(max(base.glob("*.safetensors")))


def other_layer_count(base: Path) -> None:
    shutil.rmtree(base)
    save_tiny_model(base, num_hidden_layers=6)


def other_architecture(base: Path) -> None:
    shutil.rmtree(base)
    save_tiny_model(base, "qwen3")


def other_dtype(base: Path) -> None:
    shutil.rmtree(base)
    save_base(base, "llama", None, torch.bfloat16)
    changed_json(base / "config.json", lambda tree: tree.update(dtype="float32"))


BAD_BASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "one bit": (bit_in_a_tensor, ["its weights differ"]),
    "layers": (other_layer_count, ["layers is 6, not 5"]),
    "architecture": (other_architecture, ["'qwen3', not 'llama'"]),
    "dtype": (other_dtype, ["do not agree about tensor 'model.layers.1."]),
    "configuration": (
        lambda base: changed_json(base / "config.json", lambda tree: tree.update(rms_norm_eps=0.1)),
        ["config.json"],
    ),
    "no model": (shutil.rmtree, ["config.json", "cannot be read"]),
}


@pytest.mark.parametrize("difference", BAD_BASES)
def test_another_base_is_refused(llama: Domains, packages: tuple[Path, Path], tmp_path: Path, difference: str) -> None:
    change, words = BAD_BASES[difference]
    other = shutil.copytree(llama.base, tmp_path / "other")
    change(other)
    if difference != "no model":
        words = [*words, f"'{packages[0]}' belongs to another base than '{other}'", "give the model"]
    assert_refused(tmp_path, words, lambda out: apply_packages(other, [packages[0]], out))


def test_combinations_that_make_no_sense_are_refused(
    llama: Domains, packages: tuple[Path, Path], tmp_path: Path
) -> None:
    d_math, d_law = packages
    namesake = shutil.copytree(d_law, tmp_path / "namesake")
    put("delta.json", "name", value="math")(namesake)
    renamed = shutil.copytree(d_math, tmp_path / "renamed")
    put("delta.json", "name", value="algebra")(renamed)
    both = tmp_path / "both"
    apply_packages(llama.base, packages, both)
    full = shutil.copytree(d_law, tmp_path / "full")
    for words, deltas in (
        (["hold the same copies", "once"], [d_math, renamed]),
        (["both named 'math'", '"name"'], [d_math, namesake]),
    ):
        assert_refused(tmp_path, words, lambda out, deltas=deltas: apply_packages(llama.base, deltas, out))
    assert_refused(
        tmp_path, ["layers is 9, not 5", "strip", "at once"], lambda out: apply_packages(both, [d_math], out)
    )
    assert_refused(tmp_path, ["OUT", "exists", "new directory"], lambda _: apply_packages(llama.base, [d_math], full))
    assert_refused(tmp_path, ["(math, law)", "--only NAME"], lambda out: pack_copies(both, out))
    assert_refused(tmp_path, ["--only", "'art'", "math, law"], lambda out: pack_copies(both, out, only="art"))
    assert_refused(tmp_path, ["--only", "none that has"], lambda out: pack_copies(llama.math, out, only="art"))
    assert_refused(tmp_path, ["--name", "'a/b'", "letters"], lambda out: pack_copies(llama.math, out, name="a/b"))
    other = shutil.copytree(llama.base, tmp_path / "other")
    bit_in_a_tensor(other)
    assert_refused(tmp_path, ["--base", "does not stand on"], lambda out: pack_copies(llama.math, out, base=other))
    assert_refused(tmp_path, ["unlike its base"], lambda out: pack_copies(llama.math, out, base=llama.law))
    assert_refused(tmp_path, ["expansion.json", "adept expand"], lambda out: pack_copies(llama.base, out))
    assert_refused(tmp_path, ["expansion.json", "adept expand"], lambda out: strip_copies(llama.base, out))
    run = tmp_path / "run"
    run.mkdir()
    assert_refused(tmp_path, ["neither a run directory"], lambda out: pack_copies(run, out))
    (run / "config.yaml").write_text("model: base\n")
    assert_refused(tmp_path, ["no exported model", "adept export"], lambda out: pack_copies(run, out))


def other_export_dtype(adapted: Path) -> None:
    for file in adapted.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)


def other_header(adapted: Path) -> None:
    def swap(tree: Any) -> None:
        name, header = next(iter(tree["headers"].items()))
        tree["headers"][name] = header.replace('"data_offsets":[0,', '"data_offsets":[8,')

    changed_json(adapted / "base_files.json", swap)


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
    "no config": (
        lambda d: changed_json(d / "base_files.json", lambda t: t["texts"].pop("config.json") and None),
        ["config.json"],
    ),
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


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "^C"])
def test_interrupted_work_leaves_nothing(
    llama: Domains, packages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: Any) -> str:
        assert any(path.is_dir() for path in tmp_path.iterdir()), "writing has begun"
        raise error

    monkeypatch.setattr(expansion_module, "write_json", interrupted)
    monkeypatch.setattr(delta_module, "write_json", interrupted)
    monkeypatch.setattr(delta_module, "copy_companions", interrupted)
    for work in (
        lambda: apply_packages(llama.base, packages, tmp_path / "out"),
        lambda: pack_copies(llama.math, tmp_path / "out"),
        lambda: strip_copies(llama.math, tmp_path / "out"),
    ):
        with pytest.raises(type(error)):
            work()
        assert not list(tmp_path.iterdir())


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_commands_do_it_and_refuse_with_code_2_and_one_line(llama: Domains, tmp_path: Path) -> None:
    run = run_dir(llama, tmp_path / "math")

    def done(*arguments: str | Path) -> str:
        result = adept(1, "delta", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    found = json.loads(done("pack", run, tmp_path / "d_math", "--base", llama.base, "--json"))
    assert (found["name"], found["metrics"]["losses"]["adapted"]["domain"]) == ("math", 2.5)
    assert found["fingerprint"] == Package.load(tmp_path / "d_math").manifest.fingerprint
    assert "copies of layers 1, 4" in done("pack", llama.law, tmp_path / "d_law", "--name", "law")
    said = done("apply", llama.base, tmp_path / "d_law", tmp_path / "d_math", tmp_path / "both")
    assert "5 + 4 layers" in said and "law at 2, 8; math at 3, 6" in said
    assert json.loads(done("strip", tmp_path / "both", tmp_path / "back", "--json"))["num_bytes"] > 0
    assert content(tmp_path / "back") == content(llama.base)
    for words, arguments in (
        (["d_law' exists"], ["apply", llama.base, tmp_path / "d_math", tmp_path / "d_law"]),  # OUT forgotten
        (["another base"], ["apply", llama.law, tmp_path / "d_math", tmp_path / "new"]),
    ):
        result = adept(1, "delta", *arguments)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("adept: ")
        assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "new").exists() and (tmp_path / "d_law" / "delta.json").is_file()


def test_no_torch_is_needed(llama: Domains, packages: tuple[Path, Path], tmp_path: Path) -> None:
    """A package can be applied where nothing can be trained."""
    script = (
        "import sys; from pathlib import Path; from adept_ds.deltas.operations import apply_packages\n"
        "base, delta, out = map(Path, sys.argv[1:]); apply_packages(base, [delta], out)\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(llama.base), str(packages[0]), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
