"""Checkpoints of every ZeRO stage become models that transformers loads, with each trained weight to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.domains import all_tensors, content
from harness.launching import launch
from harness.marks import slow
from harness.models import save_tiny_model
from harness.own_task import expected_scores, needs_lm_eval, scored_by_the_command_line
from harness.tool_runs import run_tool
from harness.trained_run import train_two_steps
from harness.workspace import Workspace
from safetensors.torch import load_file, save_file

from adept_ds.base.files import read_json, write_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag

AT_EVERY_COMMIT = ("some-zero2", "some-zero3", "some-zero2-full", "some-zero3-full", "all-zero3")
SLOW = ("some-zero0", "some-zero1", "some-groups3", "some-zero1-full", "all-zero2")


class Plain(dict[str, Any]):
    """What two ranks train with DeepSpeed alone, when it is asked for: weights as DeepSpeed itself gathers them."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, cell: str) -> Any:
        cells = AT_EVERY_COMMIT if cell in AT_EVERY_COMMIT else SLOW
        result = launch(2, ["-m", "harness.plain_worker", str(self.root), "train", *cells])
        assert result.returncode == 0, result.stderr[-4000:]
        self.update(torch.load(self.root / "train_2.pt", weights_only=False))
        return self[cell]

    def saved(self, cell: str) -> Path:
        """Where its checkpoint is."""
        assert self[cell]
        return self.root / cell


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    root = tmp_path_factory.mktemp("plain")
    save_tiny_model(root / "model")
    return Plain(root)


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_two_steps(workspace, tmp_path_factory.mktemp("trained") / "run")


def refused(*arguments: object) -> str:
    """The one line that the tool ends with."""
    result = run_tool("tools/zero_to_hf.py", *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line.removeprefix("zero_to_hf: ")


@pytest.mark.parametrize("cell", [*AT_EVERY_COMMIT, *map(slow, SLOW)])
def test_what_deepspeed_wrote_is_joined_to_its_base(plain: Plain, tmp_path: Path, cell: str) -> None:
    """Weights are those that DeepSpeed gathered when it saved; those that were frozen are the base's own bits."""
    from transformers import AutoModelForCausalLM

    result = run_tool("tools/zero_to_hf.py", plain.saved(cell), tmp_path / "hf", "--base", plain.root / "model")
    assert result.returncode == 0, result.stderr
    expected, base = plain[cell]["weights"], load_file(plain.root / "model" / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == base.keys() == expected.keys()
    moved = {name for name, weight in expected.items() if not torch.equal(weight, base[name])}
    assert len(moved) == (len(base) if cell.startswith("all") else 18), "otherwise this would prove little"
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def test_a_run_says_itself_which_checkpoint_and_which_base(trained: RunDirectory, tmp_path: Path) -> None:
    result = run_tool("tools/zero_to_hf.py", trained.root, tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "hf") == content(trained.export)
    result = run_tool("tools/zero_to_hf.py", trained.root, tmp_path / "hf", "--step", 2, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "hf") == content(trained.export)
    assert "no checkpoint of step 9; choose one of [2]" in refused(trained.root, tmp_path / "new", "--step", 9)


def test_without_a_base_it_says_that_what_is_there_is_no_model(
    trained: RunDirectory, plain: Plain, tmp_path: Path
) -> None:
    checkpoint = trained.checkpoints / checkpoint_tag(2)
    line = refused(checkpoint, tmp_path / "hf")
    assert line.startswith(f"--base is missing; '{checkpoint}' holds 18 trained tensors and no frozen ones, and is no ")
    assert "--base DIR" in line and "--tensors-only" in line
    assert "18 trained tensors and 30 frozen ones" in refused(plain.saved("some-zero3-full"), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", [slow(1), 2, 3])
def test_what_is_there_can_be_had_as_it_is(plain: Plain, tmp_path: Path, stage: int) -> None:
    for saved, is_whole in {f"some-zero{stage}": False, f"some-zero{stage}-full": True}.items():
        out = tmp_path / f"{saved}.safetensors"
        result = run_tool("tools/zero_to_hf.py", plain.saved(saved) / "step_2", out, "--tensors-only")
        assert result.returncode == 0, result.stderr
        weights = plain[saved]["weights"]
        trained = {name for name in weights if ".layers.1." in name or ".layers.3." in name}
        tensors = load_file(out)
        assert tensors.keys() - {"lm_head.weight"} == (weights.keys() if is_whole else trained)  # tied
        assert all(torch.equal(tensors[name], weights[name]) for name in tensors.keys() & weights.keys())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 2, "and nothing else"


def test_a_base_with_other_frozen_weights_is_refused(plain: Plain, tmp_path: Path) -> None:
    """A single bit of one that the checkpoint holds as well."""
    other = tmp_path / "other"
    shutil.copytree(plain.root / "model", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for stage in (2, 3):
        line = refused(plain.saved(f"some-zero{stage}-full"), tmp_path / "hf", "--base", other)
        assert "was trained with another 'model.layers.0.mlp.up_proj.weight' than" in line
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_base_of_another_shape_is_refused(plain: Plain, tmp_path: Path) -> None:
    wide = save_tiny_model(tmp_path / "wide", intermediate_size=41)
    assert "of shape (20, 37), its base (20, 41); give its own base" in refused(
        plain.saved("some-zero2"), tmp_path / "hf", "--base", wide
    )
    flat = save_tiny_model(tmp_path / "flat", num_hidden_layers=3)
    assert "holds 'model.layers.3." in refused(plain.saved("some-zero2"), tmp_path / "hf", "--base", flat)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallel"),
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("layer_00-model_00-model_states.pt", "pipeline stages"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
    ],
)
def test_what_is_not_understood_is_refused(plain: Plain, tmp_path: Path, name: str, word: str) -> None:
    """Files that tell of ranks which share a tensor: put together without them, weights would be wrong."""
    shutil.copytree(plain.saved("some-zero2"), tmp_path / "odd")
    shutil.copy(plain.saved("some-zero2") / "step_2" / "mp_rank_00_model_states.pt", tmp_path / "odd" / "step_2" / name)
    line = refused(tmp_path / "odd", tmp_path / "hf", "--base", plain.root / "model")
    assert word in line and name in line
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_that_misses_a_rank_is_refused(plain: Plain, tmp_path: Path) -> None:
    for cell in ("some-zero2", "some-zero3"):
        shutil.copytree(plain.saved(cell), tmp_path / cell)
        next((tmp_path / cell / "step_2").glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")).unlink()
        line = refused(tmp_path / cell, tmp_path / "hf", "--base", plain.root / "model")
        assert "is damaged (" in line
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_of_a_run_is_refused(trained: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(trained.root, tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints" / "step_2").glob("*_optim_states.pt"))
    content_of = bytearray(file.read_bytes())
    content_of[len(content_of) // 2] ^= 1
    file.write_bytes(content_of)
    assert f"'{file}' is not as it was written" in refused(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_dtypes_are_converted_as_torch_converts(plain: Plain, tmp_path: Path) -> None:
    """And config.json says so, under the name that the base has for it: here the older one."""
    base = tmp_path / "base"
    shutil.copytree(plain.root / "model", base)
    config = read_json(base / "config.json")
    config.pop("dtype", None)
    write_json(base / "config.json", config | {"torch_dtype": "float32"})
    arguments = (plain.saved("some-zero3"), tmp_path / "hf", "--base", base, "--dtype", "bfloat16")
    result = run_tool("tools/zero_to_hf.py", *arguments)
    assert result.returncode == 0, result.stderr
    found, config = all_tensors(tmp_path / "hf"), read_json(tmp_path / "hf" / "config.json")
    assert {key: config[key] for key in ("dtype", "torch_dtype") if key in config} == {"torch_dtype": "bfloat16"}
    assert all(torch.equal(found[name], of.bfloat16()) for name, of in plain["some-zero3"]["weights"].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], "'nowhere' does not exist; give a run directory"),
        (["{plain}", "out", "--base", "nowhere"], "--base: 'nowhere' has no config.json"),
        (["{plain}/some-zero2", "out", "--step", "2"], "--step goes with a run directory"),
        (["{plain}/some-zero2", "out.bin", "--tensors-only"], "'out.bin' is no .safetensors file"),
        (["{plain}/some-zero2", "out", "--tensors-only", "--base", "{plain}/model"], "--tensors-only writes a new"),
        (["{plain}/model", "out", "--base", "{plain}/model"], "holds no DeepSpeed checkpoint"),
        (["{plain}/some-zero2", "{plain}/model", "--base", "{plain}/model"], "is --base"),
    ],
)
def test_mistakes_are_one_line(plain: Plain, arguments: list[str], words: str) -> None:
    assert words in refused(*(argument.format(plain=plain.saved("some-zero2").parent) for argument in arguments))


def test_a_file_that_exists_is_never_replaced(plain: Plain, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"old")
    assert (
        refused(plain.saved("some-zero2"), out, "--tensors-only") == f"OUT: '{out}' exists; give the name of a new file"
    )
    assert out.read_bytes() == b"old"


@pytest.mark.slow
@needs_lm_eval
def test_what_it_writes_is_scored_by_lm_evals_command_line(plain: Plain, tmp_path: Path) -> None:
    result = run_tool("tools/zero_to_hf.py", plain.saved("all-zero2"), tmp_path / "hf", "--base", plain.root / "model")
    assert result.returncode == 0, result.stderr
    (tmp_path / "scoring").mkdir()
    accuracy, right = scored_by_the_command_line(tmp_path / "hf", tmp_path / "scoring")
    assert right == expected_scores(tmp_path / "hf")
    assert accuracy == pytest.approx(sum(right) / len(right))
