"""Nothing that is given runs: no code beside a model, no pickle, whichever command reads it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness.inprocess import run_here
from harness.launching import ROOT, adept
from harness.models import save_tiny_model
from harness.spoiling import changed_json
from harness.workspace import Workspace

SOURCES = sorted((ROOT / "adept_ds").rglob("*.py"))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def calls(file: Path, name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Those of a function or method of this name: its class, and keywords with their values if these are literals."""
    for node in nodes(file):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            given = {key.arg or "": getattr(key.value, "value", None) for key in node.keywords}
            yield ast.unparse(node.func.value), given


def loads() -> dict[str, dict[str, object]]:
    """Where transformers reads a directory; what has a configuration and tensors already reads none."""
    found = {f"{file.stem}: {of}": given for file in SOURCES for of, given in calls(file, "from_pretrained")}
    return {place: given for place, given in found.items() if "state_dict" not in given}


def test_transformers_never_takes_code_from_a_directory_or_anything_from_the_hub() -> None:
    assert len(loads()) >= 5, "this test sees nothing"
    for place, given in loads().items():
        assert given["trust_remote_code"] is False, place
        assert given["local_files_only"] is True, place
        if place.endswith(": AutoModelForCausalLM"):
            assert given["use_safetensors"] is True, place


def test_nothing_is_unpickled_but_as_data() -> None:
    """Where `torch.load` is called, it reads data alone."""
    users = {file.name for file in SOURCES if "torch.load" in file.read_text(encoding="utf-8")}
    assert users == {"deepspeed_files.py"}
    imported = {name for file in SOURCES for node in nodes(file) for name in imported_by(node)}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A model beside which lies what would run if anything loaded it, and corpora."""
    root = tmp_path_factory.mktemp("hostile")
    model, ran = save_tiny_model(root / "model", num_hidden_layers=2), root / "ran"
    touch = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(f"{touch}class Model: pass\nclass Config: pass\nclass Tokenizer: pass\n")
    auto_map = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    changed_json(model / "config.json", lambda tree: tree.update(auto_map=auto_map))
    tokenizer = {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}
    changed_json(model / "tokenizer_config.json", lambda tree: tree.update(auto_map=tokenizer))
    (model / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {ran}'\ntR.".encode())
    for name in ("general", "domain"):
        (root / f"{name}.jsonl").write_text('{"text": "the norm of x is zero and the sum is seven"}\n' * 40)
        shutil.copy(root / f"{name}.jsonl", root / f"{name}_heldout.jsonl")
    return Workspace(root)


Command = Callable[[Workspace, Path], list[list[object]]]

COMMANDS: dict[str, Command] = {
    "show": lambda at, out: [["show", at.config(out / "run")]],
    "expand, verify and strip": lambda at, out: [
        ["expand", at.model, out / "expanded", "--layers", "1"],
        ["verify", at.model, out / "expanded"],
        ["delta", "pack", out / "expanded", out / "package"],
        ["delta", "apply", at.model, out / "package", out / "applied"],
        ["delta", "strip", out / "applied", out / "stripped"],
    ],
}
LOADING: dict[str, Command] = {
    "probe": lambda at, out: [
        ["probe", at.model, "--corpus", at.root / "general.jsonl", "-k", "1", "--sequences", "2", "--seq-len", "24"]
    ],
    "eval": lambda at, out: [["eval", at.model, "--text", at.root / "domain.jsonl", "--seq-len", "24"]],
    "run": lambda at, out: [
        ["run", at.config(out / "run", expand={"k": 1}, train={"steps": 1}, importance={"initial": "ones"})]
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_code_beside_a_model_does_not_run_where_its_files_are_read(
    hostile: Workspace, tmp_path: Path, name: str
) -> None:
    for line in COMMANDS[name](hostile, tmp_path):
        ended = run_here(list(map(str, line)), tmp_path)
        assert ended.code == 0, ended.err
    assert not (hostile.root / "ran").exists()


@pytest.mark.parametrize("name", LOADING)
def test_code_beside_a_model_does_not_run_where_it_is_loaded(hostile: Workspace, tmp_path: Path, name: str) -> None:
    for line in LOADING[name](hostile, tmp_path):
        result = adept(1, *line)
        assert result.returncode == 0, result.stderr
    assert not (hostile.root / "ran").exists()


def test_these_tests_would_see_it(hostile: Workspace, tmp_path: Path) -> None:
    """Loaded as it must not be."""
    from transformers import AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        patch.syspath_prepend(tmp_path / "modules")
        with suppress(Exception):  # it is no tokenizer
            AutoTokenizer.from_pretrained(hostile.model, trust_remote_code=True)
    assert (hostile.root / "ran").exists()
    (hostile.root / "ran").unlink()
