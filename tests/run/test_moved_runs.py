"""A run is what it is made of, not where that lies: copied or moved it goes on; made of something else it is refused.

Whatever is refused leaves every file of the run as it was, and no complaint tells anybody to delete something.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.complaints import assert_one_line
from harness.launching import ROOT, adept, launch
from harness.method_runs import MethodRun
from harness.spoiling import changed_json, flip_bit
from harness.trained_run import TrainedRun
from harness.workspace import Workspace, write_corpus
from safetensors.torch import load_file, save_file

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag, manifest_of
from adept_ds.training.checkpoint import CheckpointManifest

STAGES = 5
"""probe, expand, train, export, eval."""
LARGE = ("*.safetensors", "*.pt")


def run(copy: TrainedRun, **sections: Any) -> subprocess.CompletedProcess[str]:
    return adept(1, "run", copy.config(**sections))


def contents(copy: TrainedRun) -> dict[str, bytes]:
    """Every file of a run but its logs, who is at work, and the cache of what can be found out again."""
    root, besides = copy.files.root, ("logs", "cache")
    kept = [path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] not in besides]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


def times(copy: TrainedRun) -> dict[Path, int]:
    found = [path for pattern in LARGE for path in copy.files.root.rglob(pattern)]
    return {path: path.stat().st_mtime_ns for path in found if not path.name.startswith("document_losses")}


def weights(copy: TrainedRun) -> dict[str, torch.Tensor]:
    return load_file(copy.files.export / "model.safetensors")


def assert_same_weights(found: TrainedRun, expected: TrainedRun) -> None:
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(found).items())
    assert weights(found).keys() == weights(expected).keys()


@pytest.fixture
def copy(trained_run: TrainedRun, tmp_path: Path) -> TrainedRun:
    return trained_run.copied(tmp_path / "elsewhere")


# --- what is the same ----------------------------------------------------------------------------------------------


def leave(copy: TrainedRun) -> None:
    pass


def split_weights(copy: TrainedRun) -> None:
    """The same tensors in three files with an index, as a hub may offer them anew."""
    model = copy.workspace.model
    tensors = load_file(model / "model.safetensors")
    names, weight_map = sorted(tensors), dict[str, str]()
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[shard::3]}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::3], file)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite_config(copy: TrainedRun) -> None:
    """Other spaces, other order, and another place that it came from."""
    path = copy.workspace.model / "config.json"
    config = {"_name_or_path": "/elsewhere", **dict(reversed(read_json(path).items()))}
    path.write_text(json.dumps(config, indent=7))


def into_a_hub_snapshot(copy: TrainedRun) -> None:
    """Links to files with names of digests."""
    blobs = copy.workspace.root / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.workspace.model.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))


def old_and_future_times(copy: TrainedRun) -> None:
    for number, path in enumerate(path for path in copy.workspace.root.rglob("*") if path.is_file()):
        seconds = number % 2 * 4_000_000_000
        os.utime(path, (seconds, seconds))


@pytest.mark.parametrize(
    "move", [leave, split_weights, rewrite_config, into_a_hub_snapshot, old_and_future_times], ids=lambda f: f.__name__
)
def test_a_finished_run_that_was_copied_with_its_inputs_finds_every_stage_unchanged(
    copy: TrainedRun, move: Callable[[TrainedRun], None]
) -> None:
    move(copy)
    before, stamps = contents(copy), times(copy)
    result = run(copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == STAGES, result.stdout
    assert times(copy) == stamps
    changed = {name for name, content in contents(copy).items() if content != before.get(name)}
    assert changed <= {"config.yaml", "report.html", "summary.json", "layer_importance.json"}


def test_corpora_under_other_names_are_the_same_corpora(copy: TrainedRun) -> None:
    root = copy.workspace.root
    for name in ("domain", "general"):
        (root / f"{name}.jsonl").rename(root / f"{name}_renamed.jsonl")
    result = run(
        copy,
        data={"domain": [str(root / "domain_renamed.jsonl")]},
        probe={"corpus": [str(root / "general_renamed.jsonl")]},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == STAGES, result.stdout


def test_a_second_start_reads_no_large_file_again(copy: TrainedRun) -> None:
    """What files are is kept beside the run, and known by their stamps."""
    assert run(copy).returncode == 0
    known = {Path(file["path"]).name for entry in read_json(copy.files.digests)["entries"] for file in entry["files"]}
    assert {"model.safetensors", "domain.jsonl", "general.jsonl"} <= known


def interrupt(copy: TrainedRun) -> None:
    """As if the run had ended after its first checkpoint."""
    shutil.rmtree(copy.files.checkpoints / "step_4")
    shutil.rmtree(copy.files.export)
    copy.files.evaluation.unlink()
    copy.files.summary.unlink()


def test_training_goes_on_in_the_copy_where_it_was_and_ends_with_the_same_weights(
    copy: TrainedRun, trained_run: TrainedRun
) -> None:
    interrupt(copy)
    split_weights(copy)
    result = run(copy)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stdout
    assert_same_weights(copy, trained_run)


def test_a_finished_run_is_finished_on_any_ranks(copy: TrainedRun) -> None:
    result = adept(2, "run", copy.config())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == STAGES, result.stdout


# --- what is not the same ------------------------------------------------------------------------------------------


def one_weight(copy: TrainedRun) -> None:
    flip_bit(copy.workspace.model / "model.safetensors")


def one_setting_of_the_model(copy: TrainedRun) -> None:
    changed_json(copy.workspace.model / "config.json", lambda config: config | {"rms_norm_eps": 2e-6})


def the_tokenizer(copy: TrainedRun) -> None:
    changed_json(copy.workspace.model / "tokenizer.json", lambda file: file | {"normalizer": {"type": "Lowercase"}})


def rewritten(name: str) -> Callable[[TrainedRun], None]:
    def change(copy: TrainedRun) -> None:
        write_corpus(copy.workspace.root / f"{name}.jsonl", seed=99)

    change.__name__ = f"text_of_{name}"
    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_weight, ["model: ", "(weights differ)", "give the model that this run began with"]),
        (one_setting_of_the_model, ["model: ", "(config.json differ)", "give the model"]),
        (the_tokenizer, ["model: ", "(tokenizer differ)", "give the model"]),
        (rewritten("domain"), ["data.domain: ", "was trained on other texts; set it back"]),
        (rewritten("general"), ["probe.corpus: ", "was trained on other texts; set it back"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_input_is_noticed_and_refused_without_harm(
    copy: TrainedRun, change: Callable[[TrainedRun], None], words: list[str]
) -> None:
    change(copy)
    assert_refused_without_harm(copy, words)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"lr": 5e-3}}, ["train.lr: ", "with 0.01, not 0.005; set it back"]),
        ({"train": {"steps": 6}}, ["train.steps: ", "with 4, not 6; set it back"]),
        ({"data": {"seq_len": 24}}, ["data.seq_len: ", "with 32, not 24"]),
        ({"data": {"bos": "never"}}, ["data.bos: ", "'auto', not 'never'"]),
        ({"data": {"special_tokens_in_text": "parse"}}, ["data.special_tokens_in_text: ", "'text', not 'parse'"]),
        ({"data": {"packing": "documents"}}, ["data.packing: ", "'concat', not 'documents'"]),
        ({"data": {"max_bad_records": 5}}, ["data.max_bad_records: ", "with 0, not 5"]),
        ({"data": {"question_template": "{{ question }}"}}, ["data.question_template: "]),
        ({"expand": {"k": None, "layers": [0, 4]}}, ["expand: ", "trains copies of layers", "set expand.layers to ["]),
        ({"expand": {"k": 3}}, ["expand: ", "trains copies of layers", "set expand.layers to ["]),
    ],
    ids=lambda value: next(iter(next(iter(value.values())))) if isinstance(value, dict) else "",
)
def test_another_setting_of_a_run_that_has_trained_is_refused_without_harm(
    copy: TrainedRun, sections: dict[str, Any], words: list[str]
) -> None:
    assert_refused_without_harm(copy, words, sections)


def assert_refused_without_harm(copy: TrainedRun, words: list[str], sections: dict[str, Any] | None = None) -> None:
    """Set back, it goes on as if nothing had been."""
    before = contents(copy)
    result = run(copy, **(sections or {}))
    assert result.returncode == 2, result.stdout + result.stderr
    assert_one_line(result.stderr, words)
    assert not re.search(r"\b(delete|remove|erase)\b", result.stderr)
    after = contents(copy)
    assert before.keys() <= after.keys()
    changed = {name for name, content in before.items() if after[name] != content}
    assert changed <= {"config.yaml", "layer_importance.json"}, "what is written anew at every start"


def test_the_way_out_that_a_complaint_names_is_one(copy: TrainedRun) -> None:
    """After another k: the layers that are trained, by their numbers."""
    result = run(copy, expand={"k": 3})
    (layers,) = re.findall(r"set expand\.layers to (\[[\d, ]+\])", result.stderr)
    result = run(copy, expand={"k": None, "layers": json.loads(layers)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == STAGES - 1, "nothing needs the probe"
    result = run(copy)
    assert result.stdout.count("not run again") == STAGES, "and the old configuration still fits"


def test_another_held_out_text_is_evaluated_and_nothing_else_is_done(copy: TrainedRun) -> None:
    rewritten("domain_heldout")(copy)
    stamps, losses = times(copy), read_json(copy.files.evaluation)
    result = run(copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == STAGES - 1, result.stdout
    assert times(copy) == stamps
    found = read_json(copy.files.evaluation)
    assert found["adapted"]["general"] == losses["adapted"]["general"]
    assert found["adapted"]["domain"]["loss"] != losses["adapted"]["domain"]["loss"]


def test_another_model_is_noticed_by_the_probe_before_it_takes_the_place_of_the_old_one(copy: TrainedRun) -> None:
    one_weight(copy)
    before = contents(copy)
    result = adept(1, "probe", copy.config())
    assert result.returncode == 2
    assert_one_line(result.stderr, ["model: ", "(weights differ)"])
    assert contents(copy) == before


# --- another device --------------------------------------------------------------------------------------------------

ON_AN_ACCELERATOR = """
import torch
from adept_ds.cli.app import main
from adept_ds.run import context

resolve_precision = context.resolve_precision
context.resolve_precision = lambda said: torch.bfloat16 if said == "auto" else resolve_precision(said)
main()
"""
"""`train.precision: auto` is bf16 there, which the CPU computes as well."""


def on_an_accelerator(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return launch(1, ["-c", ON_AN_ACCELERATOR, command, *map(str, arguments)])


def test_what_a_cpu_trained_is_not_trained_on_in_the_precision_of_another_device(copy: TrainedRun) -> None:
    """The way out that the complaint names is one; what the device would choose anyway may be said, too."""
    before = contents(copy)
    result = on_an_accelerator("run", copy.config())
    assert result.returncode == 2, result.stdout
    words = ["train.precision: ", "step_4' was trained in fp32, not bf16; set train.precision to fp32 to go on"]
    assert_one_line(result.stderr, words)
    assert contents(copy) == before
    for start in (on_an_accelerator, partial(adept, 1)):
        result = start("run", copy.config(), "train.precision=fp32")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("not run again") == STAGES, result.stdout


@pytest.mark.parametrize("command", ["probe", "eval"])
def test_what_a_cpu_computed_is_computed_again_in_the_precision_of_another_device(
    copy: TrainedRun, command: str
) -> None:
    """Losses of the base are not compared with those of another precision, and layers are not chosen by them."""
    made = copy.files.layer_scores() if command == "probe" else copy.files.base_document_losses
    before = made.read_bytes()
    assert adept(1, command, copy.config()).returncode == 0
    assert made.read_bytes() == before
    result = on_an_accelerator(command, copy.config())
    assert result.returncode == 0, result.stderr
    assert made.read_bytes() != before


def test_a_checkpoint_of_an_older_version_tells_its_precision_beside_its_settings(copy: TrainedRun) -> None:
    """These say auto, whatever that was."""
    interrupt(copy)
    file = manifest_of(copy.files.checkpoints / checkpoint_tag(2))
    manifest = CheckpointManifest.load(file)
    settings = manifest.settings | {"train.precision": "auto"}
    manifest.model_copy(update={"settings": settings}).sealed().save(file)
    result = on_an_accelerator("train", copy.config())
    assert result.returncode == 2, result.stdout
    assert_one_line(result.stderr, ["train.precision: ", "was trained in fp32, not bf16"])
    assert adept(1, "train", copy.config()).returncode == 0


# --- training in place, which keeps no model that it began with ------------------------------------------------------


@pytest.fixture(scope="module")
def trained_in_place(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> MethodRun:
    run = MethodRun(workspace, tmp_path_factory.mktemp("in_place"), {"name": "full"})
    run.start()
    return run


@pytest.fixture
def in_place(trained_in_place: MethodRun, tmp_path: Path) -> TrainedRun:
    """A copy of it, with copies of its inputs; its configuration is `configured`."""
    places = {trained_in_place.workspace.root: tmp_path / "inputs", trained_in_place.folder: tmp_path / "made"}
    for old, new in places.items():
        shutil.copytree(old, new, copy_function=shutil.copy)
    file = tmp_path / "made" / "run.yaml"
    text = file.read_text()
    for old, new in places.items():
        text = text.replace(str(old), str(new))
    file.write_text(text)
    return TrainedRun(Workspace(tmp_path / "inputs"), RunDirectory(tmp_path / "made" / "run"))


def configured(copy: TrainedRun) -> Path:
    return copy.files.root.with_suffix(".yaml")


@pytest.mark.parametrize("command", ["run", "train", "export"])
@pytest.mark.parametrize(
    ("change", "what"), [(one_setting_of_the_model, "config.json"), (the_tokenizer, "tokenizer")], ids=["config", "tok"]
)
def test_in_place_another_configuration_or_tokenizer_is_refused_without_harm(
    in_place: TrainedRun, command: str, change: Callable[[TrainedRun], None], what: str
) -> None:
    """It would train on in another model, or export what was learned beside another tokenizer."""
    change(in_place)
    before = contents(in_place)
    result = adept(1, command, configured(in_place))
    assert result.returncode == 2, result.stdout + result.stderr
    assert_one_line(result.stderr, ["model: ", f"step_4' was trained with another {what}; set it back"])
    after = contents(in_place)
    assert {name for name, content in before.items() if after[name] != content} <= {"config.yaml"}


@pytest.mark.parametrize("move", [split_weights, rewrite_config, into_a_hub_snapshot], ids=lambda f: f.__name__)
def test_in_place_a_run_that_was_moved_with_its_model_finds_every_stage_unchanged(
    in_place: TrainedRun, move: Callable[[TrainedRun], None]
) -> None:
    move(in_place)
    stamps = times(in_place)
    result = adept(1, "run", configured(in_place))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not run again") == 2, "training and export"
    assert times(in_place) == stamps


def test_in_place_checkpoints_that_do_not_tell_are_exported_again_beside_another_tokenizer(
    in_place: TrainedRun,
) -> None:
    """Of an older version: what is in export/ is at least made of what is there."""
    for step in (2, 4):
        file = manifest_of(in_place.files.checkpoints / checkpoint_tag(step))
        manifest = CheckpointManifest.load(file)
        told = {key: value for key, value in manifest.settings.items() if key != "model"}
        assert len(told) < len(manifest.settings)
        manifest.model_copy(update={"settings": told}).sealed().save(file)
    assert adept(1, "export", configured(in_place)).returncode == 0
    the_tokenizer(in_place)
    result = adept(1, "export", configured(in_place))
    assert result.returncode == 0, result.stderr
    tokenizers = [folder / "tokenizer.json" for folder in (in_place.files.export, in_place.workspace.model)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


# --- what was lost -------------------------------------------------------------------------------------------------


def test_without_a_ledger_training_is_not_done_again_and_nothing_is_thrown_away(
    copy: TrainedRun, trained_run: TrainedRun
) -> None:
    """In a copy, an export cannot be told from one that somebody worked on: it is kept beside the new one."""
    copy.files.ledger.unlink()
    result = run(copy)
    assert result.returncode == 0, result.stderr
    assert "finished before, not run again" in result.stdout
    assert "kept as 'export.kept1'" in result.stdout
    assert_same_weights(copy, trained_run)
    assert (copy.files.root / "export.kept1" / "model.safetensors").is_file()


def test_a_lost_expansion_is_made_again_and_training_goes_on_from_its_checkpoint(
    copy: TrainedRun, trained_run: TrainedRun
) -> None:
    interrupt(copy)
    shutil.rmtree(copy.files.expanded)
    result = run(copy)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 2" in result.stdout
    assert_same_weights(copy, trained_run)


def test_an_expansion_of_other_layers_in_its_place_is_noticed(copy: TrainedRun) -> None:
    """Made while the right one was away: then the checkpoints say that they belong to another."""
    shutil.rmtree(copy.files.expanded)
    other = {"expand": {"k": None, "layers": [1]}}
    result = run(copy, **other)
    assert result.returncode == 2
    assert_one_line(result.stderr, ["model: ", "another model", "expand.layers"])
    result = adept(1, "export", copy.config(**other))
    assert result.returncode == 2
    assert_one_line(result.stderr, ["another model"])
    result = run(copy)
    assert result.returncode == 0, "with its own layers it goes on"


# --- what complaints say -------------------------------------------------------------------------------------------


def spoken(module: Path) -> list[str]:
    """Every text of a module that is no docstring."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in silent)
    return [constant.value for constant in constants if isinstance(constant.value, str)]


def test_no_text_of_the_program_tells_anybody_to_delete_something() -> None:
    """Files are put aside. `remove` is said of keys in a configuration, in the package that reads it."""
    found = [
        (module.relative_to(ROOT).as_posix(), text)
        for module in (ROOT / "adept_ds").rglob("*.py")
        for text in spoken(module)
        if re.search(r"\b(delete|erase|wipe|rm -)\b", text)
        or (
            re.search(r"\b[Rr]emove (it|them|this|that)\b", text)
            and module.parent.name in ("run", "training", "report")
        )
    ]
    assert found == []
