"""Bad input through the real command: exit code 2 and one line that names the key, the value and the remedy.

No traceback, and nothing half-written. What can be seen without loading anything is reported before torch is
imported, so most of these take half a second.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.complaints import assert_one_line, files_under, refused
from harness.launching import adept, start
from harness.probe_worker import open_run
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import load_config
from adept_ds.run.evaluate import eval_stage
from adept_ds.run.expand import expand_stage
from adept_ds.run.export import export_stage
from adept_ds.run.train import train_stage
from adept_ds.weights.expansion import expand_checkpoint


@dataclass(frozen=True)
class Case:
    """`adept ARGUMENTS`, and what its complaint must say. {config}, {bad}, {ws} and {run} stand for paths."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    """The key, the value and a word of the remedy."""
    ranks: int = 1
    """How many ranks the environment announces; only rank 0 is started."""


def case(name: str, *arguments: str, words: Sequence[str], ranks: int = 1) -> Any:
    return pytest.param(Case(arguments, tuple(words), ranks), id=name)


def override(name: str, *overrides: str, words: Sequence[str], ranks: int = 1) -> Any:
    return case(name, "run", "{config}", *overrides, words=words, ranks=ranks)


@pytest.fixture(scope="module")
def bad(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory full of mistakes."""
    root = tmp_path_factory.mktemp("bad")
    config = json.loads((workspace.model / "config.json").read_text())

    def model(name: str, *weights: str, **changes: Any) -> None:
        (root / name).mkdir()
        tree = {key: value for key, value in (config | changes).items() if value is not None}
        (root / name / "config.json").write_text(json.dumps(tree))
        for file in weights:
            (root / name / file).write_bytes(b"")

    model("mamba", "model.safetensors", model_type="mamba")
    model("pickled", "pytorch_model.bin")
    model("no_weights")
    model("no_count", "model.safetensors", num_hidden_layers=None)
    model("list_config", "model.safetensors")
    (root / "list_config" / "config.json").write_text("[1, 2]")
    model("half_config", "model.safetensors")
    (root / "half_config" / "config.json").write_text('{"model_type": "lla')
    (root / "no_config").mkdir()

    texts = {
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "short.jsonl": '{"text": "a b c"}\n',
        "malformed.jsonl": '{"text": "fine"}\n{"text": "cut sho\n{"text": "fine"}\n',
        "few.jsonl": json.dumps({"text": "x" * 170}) + "\n",  # five blocks of 32 tokens
        "unclosed.yaml": "model: m\ntrain: {lr: 1e-4\nrun_dir: r\n",
        "list.yaml": "- model\n- run_dir\n",
        "empty.yaml": "",
        "twice.yaml": "model: m\nrun_dir: r\ntrain:\n  lr: 1\n  lr: 2\n",
        "tagged.yaml": "model: !!python/object/apply:os.getcwd []\nrun_dir: r\n",
        "control.yaml": "model: 'a\ab'\nrun_dir: r\n",
        "brackets.yaml": "[" * 100_000,
        "loop.yaml": "model: m\nrun_dir: r\ndata: &d {domain: *d}\n",
        "large.yaml": "#" * (1 << 20) + "\nmodel: m\n",
        "no_run_dir.yaml": "model: m\n",
        "owned.json": '{"zero_optimization": {"stage": 3}, "train_batch_size": 4}',
        "stage0.json": '{"zero_optimization": {"stage": 0}}',
        "no_stage.json": "{}",
        "nvme.json": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
        "half.json": '{"zero_optimization": {"stage": 3',
        "list.json": "[1, 2]",
        "brackets.json": "[" * 100_000,
        "twice.json": '{"zero_optimization": {"stage": 3, "stage": 1}}',
        "misspelt_top.json": '{"zero_optimization": {"stage": 3}, "wall_clock_breakdwn": true}',
        "misspelt.json": '{"zero_optimization": {"stage": 3, "overlap_com": true}}',
        "stage_only.json": '{"zero_optimization": 3}',
        "offload_text.json": '{"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}',
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin1.yaml").write_bytes(b"model: caf\xe9\n")
    (root / "utf16.yaml").write_text("model: m\n", encoding="utf-16")
    (root / "folder.yaml").mkdir()
    os.mkfifo(root / "pipe.yaml")
    return root


def arguments_of(case: Case, workspace: Workspace, bad: Path, run_dir: Path) -> list[str]:
    places = {"ws": workspace.root, "bad": bad, "run": run_dir, "config": workspace.config(run_dir)}
    arguments = []
    for argument in case.arguments:
        for name, path in places.items():
            argument = argument.replace("{" + name + "}", str(path))
        arguments.append(argument)
    return arguments


def assert_nothing_half_written(run_dir: Path) -> None:
    left = [path for path in run_dir.rglob("*") if path.is_file() or not any(path.iterdir())]
    names = {part for path in left for part in path.relative_to(run_dir).parts}
    assert not names & {"layer_importance.json", "expanded", "export", "checkpoints", "model.safetensors"}
    assert not [name for name in names if name.startswith(".") or "tmp" in name]


CHEAP = [
    # the configuration file
    case("no such file", "run", "{bad}/nothing.yaml", words=["nothing.yaml", "no such", "give"]),
    case("invalid YAML", "run", "{bad}/unclosed.yaml", words=["unclosed.yaml", "not valid YAML", "line 3"]),
    case("not UTF-8", "run", "{bad}/latin1.yaml", words=["latin1.yaml", "line 1 is no UTF-8", "convert"]),
    case("UTF-16", "show", "{bad}/utf16.yaml", words=["utf16.yaml", "UTF-16", "save it as UTF-8"]),
    case("a directory", "run", "{bad}/folder.yaml", words=["folder.yaml", "directory", "give"]),
    case("a pipe, of either form", "expand", "{bad}/pipe.yaml", words=["pipe.yaml", "a pipe", "give"]),
    case("a pipe", "show", "{bad}/pipe.yaml", words=["pipe.yaml", "a pipe", "give"]),
    case("a name without end", "show", "x" * 5000, words=["xxx...", "name too long", "give"]),
    case("a name without end, of either form", "probe", "x" * 5000, words=["xxx...", "name too long", "give"]),
    case("a key twice", "show", "{bad}/twice.yaml", words=["twice.yaml: line 5", "'lr' stands twice", "remove"]),
    case("a tag", "show", "{bad}/tagged.yaml", words=["tagged.yaml: line 1", "'!!python/object/apply:os.getcwd'"]),
    case("a control character", "show", "{bad}/control.yaml", words=["control.yaml: line 1", "U+0007", "remove it"]),
    case("brackets", "show", "{bad}/brackets.yaml", words=["brackets.yaml: line 1", "more than 32 levels"]),
    case("an alias in itself", "show", "{bad}/loop.yaml", words=["loop.yaml: line 3", "aliases", "write out"]),
    case("a large file", "show", "{bad}/large.yaml", words=["large.yaml", "larger than 1 MiB", "give"]),
    case("a list", "run", "{bad}/list.yaml", words=["list.yaml", "model:", "list"]),
    case("an empty file", "run", "{bad}/empty.yaml", words=["empty.yaml", "expected keys"]),
    case("a missing key", "run", "{bad}/no_run_dir.yaml", words=["'run_dir' is missing", "add it"]),
    override(
        "unknown key", "train.global_batchsize=8", words=["'train.global_batchsize'", "'train.global_batch_size'"]
    ),
    override("unknown top-level key", "modle=x", words=["'modle'", "did you mean 'model'"]),
    override("wrong type", "train.steps=many", words=["train.steps", "'many'", "integer"]),
    override("out of range", "train.lr=0", words=["train.lr", "0", "greater than 0"]),
    override("unknown choice", "train.precision=fp64", words=["train.precision", "'fp64'", "'bf16'"]),
    override("exclusive keys", "expand.layers=[1]", words=["expand", "k and layers", "remove one"]),
    override("a truth for a number", "expand.k=true", words=["override 'expand.k=true': expand.k: True", "an integer"]),
    override("a truth for a rate", "train.lr=True", words=["override 'train.lr=True': train.lr: True", "a number"]),
    override("a seed of twenty digits", "train.seed=12345678901234567890", words=["train.seed", "4294967295"]),
    override("a date that is none", "train.lr=2020-13-45", words=["train.lr: '2020-13-45'", "a number"]),
    override("an override's tag", "train.lr=!!bool 7", words=["override 'train.lr=!!bool 7'", "write the value alone"]),
    override("an override's line break", "train.lr='a\n\nb'", words=["override 'train.lr='a\\n\\nb''", "a number"]),
    override("a section without a name", "a..b=1", words=["'a..b=1'", "key=value"]),
    override("a section's value", "train=5", words=["override 'train=5': train: 5 is no section", "keys below it"]),
    override(
        "a template that explodes",
        "data.question_template='{{ question * 10 ** 10 }}'",
        words=["data.question_template", "'{{ question * 10 ** 10 }}'", "512 MiB", "simplify it"],
    ),
    # where the run would be
    override("a file for a run", "run_dir={ws}/general.jsonl", words=["run_dir", "/general.jsonl' is a file", "give"]),
    override("below a file", "run_dir={ws}/general.jsonl/a", words=["run_dir", "/general.jsonl' is a file", "give"]),
    override("a run for the root", "run_dir=/", words=["run_dir: '/' is or holds", "give"]),
    override("a run where the user is", "run_dir=.", words=["run_dir: '.' is or holds", "give"]),
    override("a run in the model", "run_dir={ws}/model/run", words=["run_dir", "lies in model", "give"]),
    override("a run around the model", "run_dir={ws}", words=["run_dir", "holds model", "give"]),
    override("an empty name", "run_dir=''", words=["run_dir: '' is no path", "write one"]),
    override("no override", "train.lr", words=["'train.lr'", "key=value"]),
    override("override below a value", "train.lr.x=1", words=["train.lr.x=1", "not a section"]),
    override("override that is no YAML", "train.betas=[0.9", words=["train.betas", "[0.9"]),
    # the model
    override("missing model", "model={bad}/nothing", words=["model:", "/nothing'", "does not exist", "give"]),
    override("a file for a model", "model={bad}/no_count/config.json", words=["model:", "is a file", "give"]),
    override("a hub name offline", "model=some/model", words=["model:", "'some/model'", "give"]),
    override("no config.json", "model={bad}/no_config", words=["model:", "/no_config'", "config.json", "give"]),
    override("half a config.json", "model={bad}/half_config", words=["model:", "half_config", "give"]),
    override("a list for config.json", "model={bad}/list_config", words=["model:", "list_config"]),
    override("no layer count", "model={bad}/no_count", words=["model:", "no_count", "num_hidden_layers"]),
    override("no weights", "model={bad}/no_weights", words=["model:", "no_weights", "*.safetensors", "give"]),
    override("pickled weights", "model={bad}/pickled", words=["pickled", "pytorch_model.bin", "save_pretrained"]),
    override(
        "unknown architecture",
        "model={bad}/mamba",
        words=["model:", "'mamba'", "llama", "mistral", "qwen2", "qwen3", "CONTRIBUTING.md"],
    ),
    override("k above the layers", "expand.k=6", words=["expand.k", "6", "5 layers", "at most 5"]),
    override("layer too high", "expand.k=", "expand.layers=[1,5]", words=["expand.layers", "5", "0 to 4"]),
    override("negative layer", "expand.k=", "expand.layers=[-1]", words=["expand.layers", "-1"]),
    # corpora
    override("missing corpus", "data.domain=[{bad}/no.jsonl]", words=["data.domain", "/no.jsonl'", "give"]),
    override("empty corpus", "probe.corpus=[{bad}/empty.jsonl]", words=["probe.corpus", "/empty.jsonl'", "is empty"]),
    override(
        "a directory of other things as corpus",
        "data.domain_eval=[{ws}]",
        words=["data.domain_eval", "config.json", "data.format"],
    ),
    override("no corpus", "data.domain=[]", words=["data.domain", "no corpus", "list"]),
    # batches and ranks
    override("uneven batch", "train.global_batch_size=5", words=["train.global_batch_size", "5", "use 4"]),
    override(
        "uneven over ranks",
        "train.global_batch_size=8",
        words=["train.global_batch_size", "8", "ranks (3)", "use 6"],
        ranks=3,
    ),
    override(
        "fewer blocks than ranks",
        "train.global_batch_size=2",
        words=["train.global_batch_size", "2", "4 ranks", "at least 4"],
        ranks=4,
    ),
    override(
        "nothing is replayed",
        "data.replay=[{ws}/general.jsonl]",
        "data.replay_share=0.01",
        words=["data.replay_share: 0.01", "0 of the 12 sequences", "use 0.0833333, which replays 1"],
    ),
    override(
        "replayed sequences that do not fill micro-batches",
        "data.replay=[{ws}/general.jsonl]",
        "data.replay_share=0.25",
        "importance.source=online",
        words=[
            "replays 3 of the 12",
            "train.micro_batch_size (2)",
            "ranks (2)",
            "importance.source: online",
            "use 0.33",
        ],
        ranks=2,
    ),
    override(
        "no room for both texts",
        "data.replay=[{ws}/general.jsonl]",
        "importance.source=online",
        "train.micro_batch_size=6",
        words=["data.replay_share", "ranks (2)", "raise train.global_batch_size to at least 24"],
        ranks=2,
    ),
    override("missing replay", "data.replay=[{bad}/no.jsonl]", words=["data.replay", "/no.jsonl'", "give"]),
    # DeepSpeed's file
    override("missing DeepSpeed file", "deepspeed={bad}/no.json", words=["deepspeed", "/no.json'", "give"]),
    override(
        "another batch", "deepspeed={bad}/owned.json", words=["train_batch_size: 4, but train.global_batch_size is 12;"]
    ),
    override("stage 0", "deepspeed={bad}/stage0.json", words=["stage is 0", "1, 2 or 3"]),
    override("no stage", "deepspeed={bad}/no_stage.json", words=["stage is None", "1, 2 or 3"]),
    override("NVMe", "deepspeed={bad}/nvme.json", words=["offload_param", "'nvme'", "use 'cpu'"]),
    override("brackets for DeepSpeed", "deepspeed={bad}/brackets.json", words=["brackets.json", "nested too deeply"]),
    override("a key twice for DeepSpeed", "deepspeed={bad}/twice.json", words=["twice.json", "'stage' stands twice"]),
    override(
        "a misspelt key for DeepSpeed",
        "deepspeed={bad}/misspelt_top.json",
        words=["'wall_clock_breakdwn'", "did you mean 'wall_clock_breakdown'"],
    ),
    override(
        "a misspelt key for ZeRO",
        "deepspeed={bad}/misspelt.json",
        words=["'zero_optimization.overlap_com'", "did you mean 'zero_optimization.overlap_comm'"],
    ),
    override("invalid JSON", "deepspeed={bad}/half.json", words=["deepspeed", "half.json", "not valid JSON"]),
    override("a list for DeepSpeed", "deepspeed={bad}/list.json", words=["deepspeed", "list.json"]),
    override("a number for ZeRO", "deepspeed={bad}/stage_only.json", words=["deepspeed", "zero_optimization"]),
    override("a text for offload", "deepspeed={bad}/offload_text.json", words=["deepspeed", "offload_optimizer"]),
    # the command line
    case("no argument", "run", words=["CONFIG", "--help"]),
    case("unknown command", "trian", "{config}", words=["'trian'", "--help"]),
    case("unknown option", "run", "{config}", "--fast", words=["--fast", "--help"]),
    case("not a number", "probe", "{ws}/model", "-k", "four", words=["-k", "four", "--help"]),
    case("expand without OUT", "expand", "{ws}/model", "--layers", "1", words=["OUT is missing", "give"]),
    case("expand without layers", "expand", "{ws}/model", "{run}/out", words=["--layers", "write"]),
    case("expand a missing layer", "expand", "{ws}/model", "{run}/out", "--layers", "1,9", words=["9", "0 to 4"]),
    case("expand pickles", "expand", "{bad}/pickled", "{run}/out", "--layers", "1", words=["pytorch_model.bin"]),
    case("probe without corpus", "probe", "{ws}/model", words=["--corpus", "list"]),
    case(
        "probe of no text",
        "probe",
        "{ws}/model",
        "--corpus",
        "{bad}/no.jsonl",
        words=["--corpus", "/no.jsonl'", "give"],
    ),
    case("eval without text", "eval", "{ws}/model", words=["--text", "list"]),
    case("eval on no text", "eval", "{ws}/model", "--text", "{bad}/no.jsonl", words=["--text", "/no.jsonl'", "give"]),
    case(
        "eval on an empty text",
        "eval",
        "{ws}/model",
        "--text",
        "{bad}/empty.jsonl",
        words=["--text", "is empty", "give"],
    ),
    case("export without base", "export", "{ws}", "{run}/out", words=["--base is missing", "give"]),
    case("export of a model", "export", "{ws}/model", "{run}/out", words=["--alpha is missing", "no checkpoint"]),
    case(
        "export to an unknown type",
        *("export", "{ws}", "{run}/out", "--base", "{ws}/model", "--dtype", "int8"),
        words=["--dtype", "'int8'", "bfloat16"],
    ),
    case("an unknown method", "probe", "{config}", "--method", "guess", words=["--method", "'guess'", "mask"]),
    case(
        "an unknown method for a model",
        *("probe", "{ws}/model", "--corpus", "{ws}/general.jsonl", "--method", "guess"),
        words=["method", "'guess'", "mask"],
    ),
]


@pytest.mark.parametrize("case", CHEAP)
def test_it_is_refused_in_one_line_before_anything_is_written(
    case: Case, workspace: Workspace, bad: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = arguments_of(case, workspace, bad, run_dir)
    before = files_under(tmp_path, bad, workspace.root)
    refused(arguments, case.words, ranks=case.ranks)
    assert files_under(tmp_path, bad, workspace.root) == before


# --- seen only when the texts are read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        override(
            "malformed JSON", "data.domain=[{bad}/malformed.jsonl]", words=["data.domain", "malformed.jsonl' line 2"]
        ),
        override(
            "shorter than a block", "data.domain=[{bad}/short.jsonl]", words=["data.domain", "short.jsonl", "32", "add"]
        ),
    ],
)
def test_a_corpus_that_cannot_be_packed_is_refused_in_one_line(
    case: Case, workspace: Workspace, bad: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    result = adept(1, *arguments_of(case, workspace, bad, run_dir))
    assert result.returncode == 2, result.stderr
    assert_one_line(result.stderr, case.words)
    assert_nothing_half_written(run_dir)


# --- two ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        override("seen at once", "train.lr=fast", words=["train.lr", "'fast'", "number"]),
        override(
            "seen when packed: fewer blocks than a global batch",
            "data.domain=[{bad}/few.jsonl]",
            words=["data.domain", "5 blocks", "global_batch_size 12", "12 of them", "add text"],
        ),
    ],
)
def test_two_ranks_complain_once_and_both_end_with_exit_code_2(
    case: Case, workspace: Workspace, bad: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    processes = start(2, ["-m", "adept_ds", *arguments_of(case, workspace, bad, run_dir)])
    try:
        errors = [process.communicate(timeout=120.0)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], errors
    assert_one_line("".join(errors), case.words)
    assert_nothing_half_written(run_dir)


# --- stages in the wrong order -------------------------------------------------------------------------------------


def test_a_stage_without_its_inputs_names_the_stage_to_run_first(workspace: Workspace, tmp_path: Path) -> None:
    """In this process: the command's own path is the same as above."""
    run = open_run(load_config(workspace.config(tmp_path / "run")))
    for stage, first in ((expand_stage, "probe"), (train_stage, "expand"), (export_stage, "train")):
        with pytest.raises(InputError, match=f"adept {first}"):
            stage(run)
    with pytest.raises(InputError, match="adept export"):
        eval_stage(run)
    assert_nothing_half_written(tmp_path / "run")


def test_weights_that_are_cut_short_are_an_input_error_and_leave_no_expansion(
    workspace: Workspace, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace.model, model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])  # a download that broke off
    with pytest.raises(InputError, match=r"model\.safetensors"):
        expand_checkpoint(model, tmp_path / "out", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
