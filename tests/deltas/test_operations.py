"""A domain is a package: over its base it is the adapted model byte for byte, and without it the base is as it was.

No training here: an adapted model is an expanded one whose copies hold random numbers, saved by the safetensors
library as the export does. Equality is of bytes or bits throughout: nothing is computed, so nothing may differ.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.domains import Domains, adapt, all_tensors, content, layer_of, load, logits, make, run_dir, save_base
from harness.launching import ROOT
from harness.marks import slow
from harness.models import save_tiny_model
from harness.spoiling import assert_refused, bit_in_a_tensor, changed_json, put
from safetensors.torch import load_file

from adept_ds.base import records as records_module
from adept_ds.base.files import read_json, write_json
from adept_ds.deltas import operations as delta_module
from adept_ds.deltas.operations import apply_packages, pack_copies, strip_copies
from adept_ds.deltas.package import Package, PackageManifest
from adept_ds.weights import expansion as expansion_module
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.tensor_files import write_tensors

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


@pytest.fixture(
    scope="module",
    params=[slow(("llama", "20KB")), slow(("qwen2", None)), ("mixtral", "100KB"), ("gpt2", None)],
    ids=["llama-tied-sharded", "qwen2", "mixtral-sharded", "gpt2-tied"],
)
def domains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return make(tmp_path_factory.mktemp(request.param[0]), *request.param)


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
    twice, of_one_name = [d_math, renamed], [d_math, namesake]
    assert_refused(tmp_path, ["hold the same copies", "once"], lambda out: apply_packages(llama.base, twice, out))
    assert_refused(tmp_path, ["both named 'math'", '"name"'], lambda out: apply_packages(llama.base, of_one_name, out))
    assert_refused(
        tmp_path, ["layers is 9, not 5", "strip", "at once"], lambda out: apply_packages(both, [d_math], out)
    )
    assert_refused(
        tmp_path, ["OUT", "by `adept delta pack`", "new"], lambda _: apply_packages(llama.base, [d_math], full)
    )
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


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "^C"])
def test_interrupted_work_leaves_nothing(
    llama: Domains, packages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: Any) -> str:
        assert any(path.is_dir() for path in tmp_path.iterdir()), "writing has begun"
        raise error

    monkeypatch.setattr(expansion_module, "write_json", interrupted)
    monkeypatch.setattr(records_module, "write_json", interrupted)
    monkeypatch.setattr(delta_module, "copy_companions", interrupted)
    for work in (
        lambda: apply_packages(llama.base, packages, tmp_path / "out"),
        lambda: pack_copies(llama.math, tmp_path / "out"),
        lambda: strip_copies(llama.math, tmp_path / "out"),
    ):
        with pytest.raises(type(error)):
            work()
        assert not list(tmp_path.iterdir())


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
