"""What passes from hand to hand: expanded models with their records, and delta packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from harness.domains import adapt
from harness.fuzzing import Fuzzing, Kind, Sandbox, file_kind
from harness.models import save_tiny_model
from harness.mutations import changed_json, changed_safetensors, edited, json_text, spoiled
from hypothesis import strategies as st

from adept_ds.base.files import read_json
from adept_ds.deltas.operations import apply_packages, pack_copies, strip_copies
from adept_ds.weights.base_files import BASE_FILES_NAME, BaseFiles
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.verification import verify_expansion


def prepare(sandbox: Sandbox) -> Sandbox:
    inputs = sandbox.inputs
    save_tiny_model(inputs / "base", "llama", num_hidden_layers=3)
    for name, layers, seed in (("math", [0, 1], 1), ("law", [1], 2)):
        adapt(inputs / "base", inputs / name, layers, seed)
        pack_copies(inputs / name, inputs / f"d_{name}", name=name)
    apply_packages(inputs / "base", [inputs / "d_math", inputs / "d_law"], inputs / "both")
    return sandbox


def use_adapted(sandbox: Sandbox, name: str) -> None:
    """All that is done with a model that has copies. Its base is the same, or it is refused."""
    directory, base = sandbox.inputs / name, sandbox.inputs / "base"
    Expansion.read(directory)
    BaseFiles.read(directory).tensors()
    pack_copies(directory, sandbox.out / "package", name="again", only="law" if name == "both" else None)
    strip_copies(directory, sandbox.out / "stripped")
    with_weights = {path.name for path in (sandbox.out / "stripped").iterdir()}
    assert "model.safetensors" in with_weights
    if name == "expanded":
        verify_expansion(base, directory, logits=False)


def apply_package(sandbox: Sandbox) -> None:
    inputs = sandbox.inputs
    apply_packages(inputs / "base", [inputs / "d_law", inputs / "d_math"], sandbox.out / "both")


def changed_base_files(content: bytes) -> st.SearchStrategy[bytes]:
    """Also the JSON texts that stand in it as strings."""
    tree = json.loads(content)

    def inside(section: str, name: str, text: bytes) -> bytes:
        changed = tree[section] | {name: text.decode("utf-8", "replace")}
        return json_text(tree | {section: changed})

    places = [(section, name) for section in ("texts", "headers") for name in tree[section]]
    within = st.sampled_from(places).flatmap(
        lambda place: st.one_of(
            edited(json.loads(tree[place[0]][place[1]])).map(json_text), spoiled(tree[place[0]][place[1]].encode())
        ).map(partial(inside, *place))
    )
    return st.one_of(changed_json(content), within)


Change = Callable[[bytes], st.SearchStrategy[bytes]]


def adapted_kind(name: str, file: str, change: Change = changed_json, weight: float = 0.3) -> Kind:
    use = partial(use_adapted, name=name)
    return file_kind(f"{name}/{file}", change, use, names=("model:", name), weight=weight)


def package_kind(file: str, change: Change) -> Kind:
    return file_kind(f"d_math/{file}", change, apply_package, names=("d_math",), weight=0.5)


KINDS = [
    adapted_kind("math", "expansion.json"),
    adapted_kind("both", "expansion.json"),
    adapted_kind("math", BASE_FILES_NAME, changed_base_files, 0.6),
    adapted_kind("math", "config.json"),
    adapted_kind("both", "model.safetensors", changed_safetensors),
    package_kind("delta.json", changed_json),
    package_kind("delta.safetensors", changed_safetensors),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_passes_from_hand_to_hand_is_used_or_refused(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)


def test_seeds_are_what_they_should_be(sandbox: Sandbox) -> None:
    assert {copy["source"] for copy in read_json(sandbox.inputs / "both" / "expansion.json")["copies"]} == {0, 1}
    assert Path(sandbox.inputs / "d_math" / "delta.json").is_file()
